"""One model on one or several devices of this process: an engine each, and the choice between them."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future

import anyio.to_thread

from app.engine.engine import Engine
from app.engine.job import OnProgress
from app.engine.request import (
    Cancelled,
    DuplicateRequest,
    EngineError,
    Exactness,
    GenerateParams,
    ModelInfo,
    Progress,
    ReplicaState,
    Result,
    Status,
)
from app.metrics import EngineMetrics

SHORT_PLAN = 100  # steps of which any sampler's plan is computed in some milliseconds
WORST: Sequence[Status] = ("failed", "draining", "starting", "ok")


def worst(found: Sequence[Status]) -> Status:
    """Of several, one at least."""
    return min(found, key=WORST.index)


class Replicas:
    """A model's engines. What is not a request is as of one engine; used on one event loop.

    Args:
        engines: one a device, all of one model, one at least.
        metrics: where refusals are counted.
    """

    def __init__(self, engines: Sequence[Engine], metrics: EngineMetrics) -> None:
        self.engines, self.name, self._metrics = engines, engines[0].name, metrics
        self._entering: dict[str, GenerateParams] = {}  # by key: accepted by none yet
        metrics.watch(engines)

    async def submit(self, params: GenerateParams, on_progress: OnProgress | None = None) -> Future[Result]:
        """Hands a request to the engine that is expected to end it first, or says why not.

        Its key is held from the call on, and where its plan is short nothing can come between the two.

        Args:
            params: checked against `info`.
            on_progress: called on any thread; must not block.

        Raises:
            EngineNotReady, EngineBusy, DuplicateRequest, DeadlineTooSoon: nothing was accepted.
            Cancelled: it was ended while its plan was made.
            ValueError: this model's timesteps do not allow the plan.
        """
        try:
            if self.holds(params.key):
                raise DuplicateRequest(params.request_id)
            self._entering[params.key] = params
            try:
                engine = await self._with_plan(params)
                return engine.submit(params, on_progress)
            finally:
                if self._entering.get(params.key) is params:
                    del self._entering[params.key]
        except EngineError as error:
            if not isinstance(error, Cancelled):
                self._metrics.refused.labels(error.reason).inc()
            raise

    async def _with_plan(self, params: GenerateParams) -> Engine:
        """The engine to submit to, which has the plan: nobody else waits for that, neither event loop nor steps."""
        have: set[int] = set()
        while True:
            place = self._first_to_end(params)
            engine = self.engines[place]
            if params.steps <= SHORT_PLAN or place in have:
                return engine
            await anyio.to_thread.run_sync(engine.make_plan, params)
            have.add(place)
            if self._entering.get(params.key) is not params:
                raise Cancelled("the request was cancelled")

    def _first_to_end(self, params: GenerateParams) -> int:
        """The place of that engine. Where all refuse, raises the refusal of the one that will have room first."""
        expected: list[tuple[float, int]] = []
        refusals: list[EngineError] = []
        for place, engine in enumerate(self.engines):
            try:
                expected.append((engine.expect(params), place))
            except EngineError as error:
                refusals.append(error)
        if not expected:
            raise min(refusals, key=lambda error: error.wait_s)
        return min(expected)[1]

    def cancel(self, request_id: str, flow: str = "") -> bool:
        """Ends a request of a flow; its images make no further step. Returns whether there was such a one."""
        if self._entering.pop(GenerateParams.key_of(flow, request_id), None) is not None:
            return True
        return any(engine.cancel(request_id, flow) for engine in self.engines)

    def progress(self, request_id: str, flow: str = "") -> Progress | None:
        """How far a request of a flow is; None: there is no such one."""
        if (entering := self._entering.get(GenerateParams.key_of(flow, request_id))) is not None:
            return Progress(0, entering.steps, 0, 0.0, begun=False)
        found = (engine.progress(request_id, flow) for engine in self.engines)
        return next((progress for progress in found if progress is not None), None)

    def holds(self, key: str) -> bool:
        """Whether a request of this key (GenerateParams.key) is in flight."""
        return key in self._entering or any(engine.holds(key) for engine in self.engines)

    @property
    def idle(self) -> bool:
        """Whether no accepted request is left."""
        return all(engine.idle for engine in self.engines)

    @property
    def status(self) -> Status:
        """The worst of theirs."""
        return worst([engine.status for engine in self.engines])

    @property
    def failure(self) -> BaseException | None:
        """Why an engine has failed."""
        return next((engine.failure for engine in self.engines if engine.failure is not None), None)

    @property
    def info(self) -> ModelInfo | None:
        """Of the model, on the first device; None: an engine has not loaded it yet."""
        infos = [engine.info for engine in self.engines]
        return None if None in infos else infos[0]

    @property
    def exactness(self) -> Exactness | None:
        """What holds whichever engine draws; None: not known yet."""
        found = [engine.exactness for engine in self.engines if engine.exactness is not None]
        return Exactness.of_all(found) if len(found) == len(self.engines) else None

    @property
    def states(self) -> list[ReplicaState]:
        """How each engine is."""
        return [engine.state for engine in self.engines]

    def start(self) -> None:
        """Starts loading."""
        for engine in self.engines:
            engine.start()

    def on_failure(self, tell: Callable[[BaseException], None]) -> None:
        """Tells of an engine that fails from now on, on its thread."""
        for engine in self.engines:
            engine.on_failure = tell

    def drain(self) -> None:
        """Refuses new requests from now on; accepted ones are served."""
        for engine in self.engines:
            engine.drain()

    def stop(self, timeout_s: float) -> bool:
        """Drains for so long, ends what is left with an error, and the threads. Returns whether they ended in time."""
        until = time.monotonic() + timeout_s
        self.drain()
        ended = [engine.stop(max(0.0, until - time.monotonic())) for engine in self.engines]
        return all(ended)
