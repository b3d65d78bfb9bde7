"""What holds a network: an engine of its own in an actor of its own, one a GPU or a share of the CPUs."""

from __future__ import annotations

import asyncio
import dataclasses
import logging
import os
import time
from collections.abc import AsyncIterator, Collection

from prometheus_client import Metric
from ray import serve

from app.engine.replicas import Replicas
from app.engine.request import EngineError, GenerateParams, ModelInfo, Progress, ReplicaState, Result
from app.main import local
from app.metrics import Metrics
from app.settings import Settings

log = logging.getLogger("app.ray")

POLL_S = 0.5  # of a request whose client does not watch it
LOAD_POLL_S = 0.05


@dataclasses.dataclass(frozen=True)
class Accepted:
    """A replica has a request."""


@dataclasses.dataclass(frozen=True)
class Refused:
    """It does not take it."""

    replica: str  # its name
    error: Exception  # an EngineError, or a ValueError of the plan


Message = Accepted | Refused | list[Progress] | Result | EngineError
"""Accepted, then progress, the newest last, then a result or an error; or else refused, and no more."""


@dataclasses.dataclass(frozen=True)
class Described:
    """What a replica says of itself."""

    info: ModelInfo
    state: ReplicaState
    metrics: list[Metric]


class Engine:
    """One replica. Its constructor ends when it is ready, or fails with what is wrong with model or device."""

    def __init__(self, settings: Settings) -> None:
        metrics = Metrics()
        self._registry = metrics.registry
        engines = local(settings, metrics)
        assert isinstance(engines.default, Replicas)
        self._replicas = engines.default
        self._replicas.start()
        while self._replicas.status == "starting":
            time.sleep(LOAD_POLL_S)
        if self._replicas.failure is not None:
            raise self._replicas.failure
        self._replicas.on_failure(_end)

    async def draw(self, params: GenerateParams, watched: bool, *, avoid: Collection[str]) -> AsyncIterator[Message]:
        """Accepts a request, or says why not, and serves it. Whoever stops reading ends it.

        Errors are answers here: raised ones would come wrapped.

        Args:
            params: checked against describe().info.
            watched: whether every step is told; else a word now and then.
            avoid: names of replicas that have refused it, for the router.
        """
        loop, news = asyncio.get_running_loop(), asyncio.Queue[Progress | None]()

        def tell(progress: Progress | None) -> None:
            loop.call_soon_threadsafe(news.put_nowait, progress)

        try:
            future = await self._replicas.submit(params, tell if watched else None)
        except (EngineError, ValueError) as error:
            yield Refused(_name(), error)
            return
        try:
            yield Accepted()
            future.add_done_callback(lambda _: tell(None))  # in its turn: after all that was told
            over = False
            while not over:
                try:
                    found = [await asyncio.wait_for(news.get(), POLL_S)]
                except TimeoutError:
                    found = [p] if (p := self._replicas.progress(params.request_id, params.flow)) else []
                while not news.empty():
                    found.append(news.get_nowait())
                over = None in found
                if told := [progress for progress in found if progress is not None]:
                    yield told
            failure = future.exception()
            assert failure is None or isinstance(failure, EngineError)
            yield failure or future.result()
        finally:
            if not future.done():
                self._replicas.cancel(params.request_id, params.flow)

    def describe(self) -> Described:
        """Its model, how it is, and what it has counted; refusals are its callers': one may be tried elsewhere."""
        info, (state,) = self._replicas.info, self._replicas.states
        assert info is not None
        counted = [family for family in self._registry.collect() if family.name != "ddpm_refused"]
        return Described(info, dataclasses.replace(state, name=_name()), counted)

    def record_autoscaling_stats(self) -> dict[str, float]:
        """What autoscaling.py decides by."""
        (state,) = self._replicas.states
        return {"slots": float(state.slots_running + state.slots_waiting), "rows": float(state.rows_limit)}

    def __del__(self) -> None:
        if (replicas := getattr(self, "_replicas", None)) is not None:
            replicas.stop(0)


def _name() -> str:
    return serve.get_replica_context().replica_tag


def _end(error: BaseException) -> None:
    """An engine without its thread is a dead replica: Ray Serve sees that at once, and starts another."""
    log.critical("the engine has failed: this replica ends", exc_info=error)
    logging.shutdown()
    os._exit(1)
