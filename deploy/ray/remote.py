"""A model whose engines are replicas elsewhere in the cluster, as the routes of the app know it (engines.Served).

A result is a pure function of its request: one that is lost with its replica is drawn again by another.
"""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
import logging
from collections.abc import AsyncGenerator, Callable, Iterable
from concurrent.futures import Future
from contextlib import aclosing, suppress

from prometheus_client import CollectorRegistry, Metric

from app.engine.job import OnProgress
from app.engine.request import (
    Cancelled,
    DeadlinePassed,
    DuplicateRequest,
    EngineBusy,
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
from deploy.ray.engine import Described, Engine, Message
from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, DeploymentUnavailableError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

log = logging.getLogger("app.ray")

DESCRIBE_S = 2.0  # between two looks at all replicas
MOST_LOST = 3  # replicas that a request may be lost with: it may be what kills them
PATIENCE_S = 60.0  # in which some replica must take a request that has lost its own
PAUSE_S = 0.2  # before a request is sent again


class Lost(Exception):
    """The replica that had the request is gone, or cannot be reached."""


@dataclasses.dataclass(eq=False)
class _Flight:
    """A request on its way."""

    params: GenerateParams
    on_progress: OnProgress | None
    began: float  # by the loop's clock
    accepted: asyncio.Future[None]
    progress: Progress
    future: Future[Result] = dataclasses.field(default_factory=Future)
    lost: int = 0  # replicas
    reached: int = -1  # the step that the last of them came to
    task: asyncio.Task[None] | None = None

    def tell(self, news: Iterable[Progress]) -> None:
        """Hands on what is new: one that is drawn again does not go back."""
        for progress in news:
            if self.lost and progress.step <= self.reached:
                continue
            self.progress = progress
            if self.on_progress is not None:
                self.on_progress(progress)

    def left(self, now: float) -> GenerateParams:
        """The request as it is to be sent now. Raises DeadlinePassed."""
        if self.params.deadline_s is None:
            return self.params
        if (left_s := self.began + self.params.deadline_s - now) <= 0:
            raise DeadlinePassed("the deadline has passed")
        return dataclasses.replace(self.params, deadline_s=left_s)

    def end(self, answer: Result | Exception) -> None:
        """Its answer; of one that was not accepted, the refusal."""
        if not self.accepted.done():
            assert isinstance(answer, Exception)
            self.accepted.set_exception(answer)
        elif not self.future.done():
            if isinstance(answer, Result):
                self.future.set_result(answer)
            else:
                self.future.set_exception(answer)


class RemoteReplicas:
    """A model that an engine deployment serves. Used on the event loop of the ingress.

    Args:
        name: of the model.
        handle: of its engine deployment.
        metrics: of the ingress; refusals that no replica has heard of are counted there.
    """

    def __init__(self, name: str, handle: DeploymentHandle[Engine], metrics: Metrics) -> None:
        self.name, self.failure = name, None
        self._handle, self._metrics = handle, metrics
        self._draw = handle.options(method_name="draw", stream=True)
        self._flights: dict[str, _Flight] = {}
        self._described: list[Described] = []
        self._status: Status = "starting"
        self._info: ModelInfo | None = None
        self._watching: asyncio.Task[None] | None = None
        self._loop: asyncio.AbstractEventLoop | None = None

    async def submit(self, params: GenerateParams, on_progress: OnProgress | None = None) -> Future[Result]:
        """As Replicas.submit has it."""
        loop = asyncio.get_running_loop()
        try:
            if self._status != "ok":
                raise EngineNotReady(self._status)
            if self.holds(params.key):
                raise DuplicateRequest(params.request_id)
        except EngineError as error:
            self._metrics.refused.labels(error.reason).inc()
            raise
        unknown = Progress(0, params.steps, 0, 0.0, begun=False)
        flight = _Flight(params, on_progress, loop.time(), loop.create_future(), unknown)
        flight.future.set_running_or_notify_cancel()  # nobody but this ends it
        self._flights[params.key] = flight
        flight.task = loop.create_task(self._fly(flight))
        try:
            await flight.accepted
        except asyncio.CancelledError:  # its client has left
            flight.task.cancel()
            raise
        return flight.future

    async def _fly(self, flight: _Flight) -> None:
        """From the first sending to the answer, through as many replicas as it takes."""
        try:
            flight.end(await self._answer(flight))
        except (EngineError, ValueError) as error:
            flight.end(error)
        except asyncio.CancelledError:
            flight.end(Cancelled("the request was cancelled"))
            raise
        except Exception as error:
            log.exception("a request failed", extra={"request_id": flight.params.request_id})
            flight.end(EngineError(f"a step failed with {type(error).__name__}"))
        finally:
            del self._flights[flight.params.key]

    async def _answer(self, flight: _Flight) -> Result:
        loop = asyncio.get_running_loop()
        homeless_since = loop.time()
        tries = itertools.count(1)
        while True:
            lost_before = flight.lost
            try:
                return await self._one_replica(flight)
            except EngineError as error:
                again = isinstance(error, EngineBusy | EngineNotReady | DuplicateRequest)
                if not again or (not flight.accepted.done() and next(tries) >= max(1, len(self._described))):
                    raise
                failed: Exception = error
            except Lost as error:
                failed = error
            log.warning("sent again: %s", failed, extra={"request_id": flight.params.request_id})
            if flight.lost > lost_before:
                homeless_since = loop.time()
            if flight.lost >= MOST_LOST:
                raise EngineError(f"{flight.lost} replicas were lost while they drew this: it was given up")
            if loop.time() - homeless_since > PATIENCE_S:
                raise EngineNotReady("failed") if isinstance(failed, Lost) else failed
            await asyncio.sleep(PAUSE_S)

    async def _one_replica(self, flight: _Flight) -> Result:
        """What one replica makes of it. Raises its refusals and errors, or Lost."""
        taken = False
        params = flight.left(asyncio.get_running_loop().time())
        async with aclosing(self._messages(params, flight.on_progress is not None)) as messages:
            async for message in messages:
                match message:
                    case None:
                        taken = True
                        if not flight.accepted.done():
                            flight.accepted.set_result(None)
                    case Result():
                        return message
                    case Exception():
                        raise message
                    case _:
                        flight.tell(message)
        if taken:
            flight.lost, flight.reached = flight.lost + 1, flight.progress.step
        raise Lost("the replica is gone")

    async def _messages(self, params: GenerateParams, watched: bool) -> AsyncGenerator[Message]:
        """Of one replica, as far as they come; then it is gone."""
        response = self._draw.remote(params, watched)
        assert isinstance(response, DeploymentResponseGenerator)
        over = False
        try:
            async for message in response:
                over = isinstance(message, Result | Exception)
                yield message
            over = True
        except BackPressureError as error:  # no replica is up, and as many as may wait do
            raise EngineBusy("queue_full", "no replica has room for it now", PAUSE_S) from error
        except DeploymentUnavailableError as error:
            raise EngineNotReady("failed") from error
        except RayTaskError:
            over = True
            raise
        except (RayError, RayServeException) as error:
            over = True
            log.warning("%s: %s", type(error).__name__, error, extra={"request_id": params.request_id})
        finally:
            if not over:
                response.cancel()  # type: ignore[no-untyped-call]

    def cancel(self, request_id: str, flow: str = "") -> bool:
        """Ends a request of a flow; its images make no further step. Returns whether there was such a one."""
        flight = self._flights.get(GenerateParams.key_of(flow, request_id))
        if flight is None or flight.future.done():
            return False
        flight.end(Cancelled("the request was cancelled"))
        assert flight.task is not None
        flight.task.cancel()
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
        """ok from the first replica on: while there is none a request waits for the next."""
        return self._status

    @property
    def info(self) -> ModelInfo | None:
        """Of the model; None: no replica was there yet."""
        return self._info

    @property
    def exactness(self) -> Exactness | None:
        """What holds whichever replica draws; None: not known yet."""
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
        self._loop = asyncio.get_running_loop()
        self._watching = self._loop.create_task(self._watch())

    async def _watch(self) -> None:
        while True:
            with suppress(TimeoutError, RayError, RayServeException):
                response = self._handle.broadcast("describe")
                found = await response.results_async(timeout_s=DESCRIBE_S, return_exceptions=True)
                self._described = [one for one in found if isinstance(one, Described)]
            if self._described:
                self._info = self._described[0].info
                if self._status == "starting":
                    self._status = "ok"
            await asyncio.sleep(DESCRIBE_S if self._info else PAUSE_S)

    def on_failure(self, tell: Callable[[BaseException], None]) -> None:
        """Nothing here can fail for good: Ray Serve starts replicas anew."""

    def drain(self) -> None:
        """Refuses new requests from now on; accepted ones are served."""
        self._status = "draining"

    def stop(self, timeout_s: float) -> bool:
        """Ends what is left with an error: Ray Serve has waited for the rest. From any thread."""

        def end() -> None:
            for flight in self._flights.values():
                flight.end(EngineNotReady("draining"))
                assert flight.task is not None
                flight.task.cancel()
            if self._watching is not None:
                self._watching.cancel()

        self.drain()
        if self._loop is not None:
            self._loop.call_soon_threadsafe(end)
        return True


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
