"""A model whose engines are replicas elsewhere in the cluster, as the routes of the app know it (engines.Served)."""

from __future__ import annotations

import asyncio
import contextvars
import itertools
import logging
import time
from collections.abc import Callable, Iterable
from concurrent.futures import Future

from prometheus_client import CollectorRegistry, Metric
from ray.serve.exceptions import DeploymentUnavailableError
from ray.serve.handle import DeploymentHandle

from app.engine.job import OnProgress
from app.engine.request import (
    DuplicateRequest,
    EngineError,
    EngineNotReady,
    Exactness,
    GenerateParams,
    ModelInfo,
    Progress,
    ReplicaState,
    Result,
    Status,
)
from app.metrics import Metrics
from deploy.ray.engine import Described, Engine
from deploy.ray.flight import Flight

log = logging.getLogger("app.ray")

DESCRIBE_S = 2.0  # between two looks at all replicas, and for their answers
SOON_S = 0.2  # between two until the first is there
SILENT = 5  # looks without an answer after which what was known is given up
STOP_POLL_S = 0.05


class RemoteReplicas:
    """A model that an engine deployment serves. Used on the event loop of the ingress.

    Args:
        name: of the model.
        handle: of its engine deployment.
        metrics: of the ingress, where refusals are counted.
    """

    failure: BaseException | None = None  # nothing here can fail for good: Ray Serve starts replicas anew

    def __init__(self, name: str, handle: DeploymentHandle[Engine], metrics: Metrics) -> None:
        self.name = name
        self._handle, self._metrics = handle, metrics
        self._draw = handle.options(method_name="draw", stream=True)
        self._flights: dict[str, Flight] = {}
        self._described: list[Described] = []
        self._silent = 0  # looks
        self._status: Status = "starting"
        self._info: ModelInfo | None = None
        self._context = contextvars.copy_context()
        self._watching: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def submit(self, params: GenerateParams, on_progress: OnProgress | None = None) -> Future[Result]:
        """As Replicas.submit has it."""
        try:
            if self._status != "ok":
                raise EngineNotReady(self._status)
            if self.holds(params.key):
                raise DuplicateRequest(params.request_id)
            flight = Flight(params, on_progress, self._draw, max(1, len(self._described)))
            self._flights[params.key] = flight
            # Not in the context of the client's request: what Ray Serve ends with that are not those who stay.
            flight.task = asyncio.get_running_loop().create_task(self._fly(flight), context=self._context.copy())
            try:
                await flight.accepted
            except asyncio.CancelledError:  # its client has left
                flight.task.cancel()
                raise
        except EngineError as error:
            self._metrics.refused.labels(error.reason).inc()
            raise
        return flight.future

    async def _fly(self, flight: Flight) -> None:
        try:
            await flight.fly()
        finally:
            del self._flights[flight.params.key]

    def cancel(self, request_id: str, flow: str = "") -> bool:
        """Ends a request of a flow; its images make no further step. Returns whether there was such a one."""
        flight = self._flights.get(GenerateParams.key_of(flow, request_id))
        if flight is None or flight.future.done():
            return False
        flight.cancel()
        return True

    def progress(self, request_id: str, flow: str = "") -> Progress | None:
        """How far a request of a flow is, as far as was heard; None: there is no such one."""
        flight = self._flights.get(GenerateParams.key_of(flow, request_id))
        return None if flight is None else flight.progress

    def holds(self, key: str) -> bool:
        """Whether a request of this key (GenerateParams.key) is in flight."""
        return key in self._flights

    @property
    def idle(self) -> bool:
        """Whether no accepted request is left."""
        return not self._flights

    @property
    def status(self) -> Status:
        """ok from the first replica on: while there is none a request waits for the next, as long as is bearable."""
        return self._status

    @property
    def info(self) -> ModelInfo | None:
        """Of the model; None: no replica was there yet."""
        return self._info

    @property
    def exactness(self) -> Exactness | None:
        """What holds whichever replica draws; None: not known."""
        found = [one.state.exactness for one in self._described if one.state.exactness is not None]
        return Exactness.of_all(found) if found else None

    @property
    def states(self) -> list[ReplicaState]:
        """How each replica was when it was last looked at."""
        return [one.state for one in self._described]

    def metrics(self) -> Iterable[Metric]:
        """What each replica had counted then, under its name."""
        for one in self._described:
            for family in one.metrics:
                found = Metric(family.name, family.documentation, family.type)
                found.samples = [
                    sample._replace(labels={**sample.labels, "replica": one.state.name}) for sample in family.samples
                ]
                yield found

    def start(self) -> None:
        """Begins to look at the replicas, on the running event loop."""
        self._loop, self._context = asyncio.get_running_loop(), contextvars.copy_context()
        self._watching = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            try:
                await self._look()
            except DeploymentUnavailableError:
                self._described = []
            except Exception as error:  # noqa: BLE001 - whatever Ray raises, it is looked again
                self._silent += 1
                log.warning("the replicas could not be looked at: %r", error)
                if self._silent >= SILENT:
                    self._described = []
            await asyncio.sleep(DESCRIBE_S if self._info else SOON_S)

    async def _look(self) -> None:
        response = self._handle.broadcast("describe")
        found = await response.results_async(timeout_s=DESCRIBE_S, return_exceptions=True)
        self._described, self._silent = [one for one in found if isinstance(one, Described)], 0
        if self._described:
            self._info = self._described[0].info
            if self._status == "starting":
                self._status = "ok"

    def on_failure(self, tell: Callable[[BaseException], None]) -> None:
        """Nobody is ever told: see `failure`."""

    def drain(self) -> None:
        """Refuses new requests from now on; accepted ones are served."""
        self._status = "draining"

    def stop(self, timeout_s: float) -> bool:
        """Drains for so long, and ends what is left with an error; on another thread than the event loop's.

        Returns:
            Whether all had ended in time.
        """
        self.drain()
        until = time.monotonic() + timeout_s
        while not self.idle and time.monotonic() < until:
            time.sleep(STOP_POLL_S)
        in_time = self.idle

        def end() -> None:
            for flight in self._flights.values():
                flight.end(EngineNotReady("draining"))
                flight.cancel()
            if self._watching is not None:
                self._watching.cancel()

        if self._loop is not None:
            self._loop.call_soon_threadsafe(end)
        return in_time


class Together(CollectorRegistry):
    """The metrics of a process and those of replicas elsewhere, as one registry."""

    def __init__(self, own: CollectorRegistry, replicas: Callable[[], Iterable[Metric]]) -> None:
        super().__init__()
        self._own, self._replicas = own, replicas

    def collect(self) -> Iterable[Metric]:
        """A family a name: own samples first."""
        found: dict[str, Metric] = {}
        for family in itertools.chain(self._own.collect(), self._replicas()):
            into = found.setdefault(family.name, Metric(family.name, family.documentation, family.type))
            into.samples = [*into.samples, *family.samples]
        return found.values()
