"""The models that one process serves, wherever their engines are."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from typing import Protocol

from app.engine.job import OnProgress
from app.engine.replicas import worst
from app.engine.request import Exactness, GenerateParams, ModelInfo, Progress, ReplicaState, Result, Status


class Served(Protocol):
    """A model as routes know it: replicas.py has the one of this process, and what each of these means."""

    name: str

    @property
    def info(self) -> ModelInfo | None: ...

    @property
    def exactness(self) -> Exactness | None: ...

    @property
    def status(self) -> Status: ...

    @property
    def states(self) -> list[ReplicaState]: ...

    @property
    def failure(self) -> BaseException | None: ...

    @property
    def idle(self) -> bool: ...

    def start(self) -> None: ...

    def on_failure(self, tell: Callable[[BaseException], None]) -> None: ...

    async def submit(self, params: GenerateParams, on_progress: OnProgress | None = None) -> Future[Result]: ...

    def progress(self, request_id: str, flow: str = "") -> Progress | None: ...

    def holds(self, key: str) -> bool: ...

    def cancel(self, request_id: str, flow: str = "") -> bool: ...

    def drain(self) -> None: ...

    def stop(self, timeout_s: float) -> bool: ...


class Engines:
    """What there is to serve; the first is what requests mean that name no model."""

    def __init__(self, engines: Sequence[Served]) -> None:
        self.by_name = {engine.name: engine for engine in engines}
        self.default = engines[0]

    def find(self, model: str | None) -> Served | None:
        """A model by its name, or by its id, name@first 12 of the weights' sha256."""
        if model is None:
            return self.default
        engine = self.by_name.get(model.partition("@")[0])
        known = (engine.name, engine.info.id if engine.info else None) if engine else ()
        return engine if model in known else None

    @property
    def status(self) -> Status:
        """The worst of theirs."""
        return worst([engine.status for engine in self.by_name.values()])

    @property
    def infos(self) -> list[ModelInfo]:
        """Of the models that have been loaded."""
        return [engine.info for engine in self.by_name.values() if engine.info is not None]

    @property
    def ready(self) -> bool:
        """Whether every model was loaded once."""
        return len(self.infos) == len(self.by_name)

    @property
    def failure(self) -> BaseException | None:
        """Why an engine has failed."""
        return next((engine.failure for engine in self.by_name.values() if engine.failure is not None), None)

    @property
    def idle(self) -> bool:
        """Whether no accepted request is left."""
        return all(engine.idle for engine in self.by_name.values())

    def start(self) -> None:
        """Starts loading: on each device one model after the other."""
        for engine in self.by_name.values():
            engine.start()

    def on_failure(self, tell: Callable[[BaseException], None]) -> None:
        """Tells of any engine that fails from now on, on its thread."""
        for engine in self.by_name.values():
            engine.on_failure(tell)

    def drain(self) -> None:
        """Refuses new requests from now on; accepted ones are served."""
        for engine in self.by_name.values():
            engine.drain()

    def stop(self, timeout_s: float) -> bool:
        """Drains for so long, ends what is left with an error, and the threads. Returns whether they ended in time."""
        until = time.monotonic() + timeout_s
        self.drain()
        ended = [engine.stop(max(0.0, until - time.monotonic())) for engine in self.by_name.values()]
        return all(ended)

    def holds(self, key: str) -> bool:
        """Whether a request of this key (GenerateParams.key) is in flight."""
        return any(engine.holds(key) for engine in self.by_name.values())

    def cancel(self, request_id: str, flow: str) -> bool:
        """Ends a request of a flow; its images make no further step. Returns whether there was such a one."""
        ended = [engine.cancel(request_id, flow) for engine in self.by_name.values()]
        return any(ended)
