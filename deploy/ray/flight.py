"""One request on its way through as many replicas as it takes.

A result is a pure function of its request: one that is lost with its replica is drawn again by another.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import math
import random
import time
from collections.abc import AsyncGenerator, Iterable, Mapping
from concurrent.futures import Future
from contextlib import aclosing

from ray.exceptions import RayError, RayTaskError
from ray.serve.exceptions import BackPressureError, RayServeException
from ray.serve.handle import DeploymentHandle, DeploymentResponseGenerator

from app.engine.job import OnProgress
from app.engine.request import (
    Cancelled,
    DeadlinePassed,
    EngineBusy,
    EngineError,
    EngineNotReady,
    GenerateParams,
    Progress,
    Result,
)
from app.logs import request_id_of_log
from deploy.ray.engine import Accepted, Engine, Message, Refused

log = logging.getLogger("app.ray")

MOST_LOST = 3  # replicas that a request may be lost with: it may be what kills them
PATIENCE_S = 60.0  # in which a replica must say something: each does, every half second
PAUSE_S, LONGEST_PAUSE_S = 0.1, 5.0  # before what was lost or accepted is sent again: doubled each time, up to
GRACE_S = 0.2  # of a deadline, in which the replica itself should say that it has passed

_tries = itertools.count()


class Lost(Exception):
    """The replica is gone, or none could be reached."""


@dataclasses.dataclass(eq=False)
class Flight:
    """A request on its way.

    Args:
        params: the request.
        on_progress: whom to tell.
        draw: Engine.draw of any replica.
        replicas: how many there are, as far as is known.
    """

    params: GenerateParams
    on_progress: OnProgress | None
    draw: DeploymentHandle[Engine]
    replicas: int
    future: Future[Result] = dataclasses.field(default_factory=Future)
    accepted: asyncio.Future[None] = dataclasses.field(
        default_factory=lambda: asyncio.get_running_loop().create_future()
    )
    task: asyncio.Task[None] | None = None
    began: float = dataclasses.field(default_factory=time.monotonic)
    heard: float = dataclasses.field(default_factory=time.monotonic)  # of a replica, for the last time
    lost: int = 0  # replicas
    reached: int = -1  # the step that the last of them came to

    def __post_init__(self) -> None:
        self.progress = Progress(0, self.params.steps, 0, 0.0, begun=False)
        self._told: tuple[int, int] | None = None
        self._sent = False
        self.future.set_running_or_notify_cancel()  # nobody but this ends it

    @property
    def deadline(self) -> float:
        return math.inf if self.params.deadline_s is None else self.began + self.params.deadline_s

    def end(self, answer: Result | Exception) -> None:
        """Its answer; of one that was not accepted, the refusal. Only the first counts."""
        if not self.accepted.done():
            assert isinstance(answer, Exception)
            self.accepted.set_exception(answer)
        elif not self.future.done():
            if isinstance(answer, Result):
                self.future.set_result(answer)
            else:
                self.future.set_exception(answer)

    def cancel(self) -> None:
        """Ends it with the error that says so."""
        self.end(Cancelled("the request was cancelled"))
        assert self.task is not None
        self.task.cancel()

    async def fly(self) -> None:
        """From the first sending to the answer."""
        request_id_of_log.set(self.params.request_id)
        try:
            async with asyncio.timeout(None if math.isinf(self.deadline) else self.deadline + GRACE_S - self.began):
                self.end(await self._answer())
        except TimeoutError:
            self.end(DeadlinePassed("the deadline has passed"))
        except asyncio.CancelledError:
            self.end(Cancelled("the request was cancelled"))
            raise
        except Exception as error:
            log.exception("a request failed")
            self.end(EngineError(f"it failed with {type(error).__name__}"))

    async def _answer(self) -> Result | Exception:
        """By one replica after the other."""
        pauses = itertools.count()
        refusals: dict[str, EngineError] = {}  # by replica
        while True:
            try:
                answer = await self._one_replica(refusals)
                if not isinstance(answer, Refused):
                    return _soonest(refusals) if refusals and isinstance(answer, DeadlinePassed) else answer
                if not isinstance(answer.error, EngineError):
                    return answer.error
                asked_all = answer.replica in refusals or len(refusals) + 1 >= self.replicas
                refusals[answer.replica] = answer.error
                if not asked_all:
                    continue
                if not self.accepted.done():
                    return _soonest(refusals)
                refusals.clear()  # it has been promised: it waits for room
            except Lost as lost:
                if self.lost >= MOST_LOST:
                    return EngineError(f"{self.lost} replicas were lost while they drew this: it was given up")
                if isinstance(lost.__cause__, EngineError) and not self.accepted.done():
                    return lost.__cause__
                if time.monotonic() - self.heard > PATIENCE_S:
                    return EngineNotReady("starting")
            pause_s = min(PAUSE_S * 2 ** min(next(pauses), 10), LONGEST_PAUSE_S)
            await asyncio.sleep(pause_s * random.uniform(0.5, 1))

    async def _one_replica(self, refusals: Iterable[str]) -> Result | EngineError | Refused:
        """What one replica makes of it. Raises Lost."""
        params = self.params
        if params.deadline_s is not None:
            if (left_s := self.deadline - time.monotonic()) <= 0 and self._sent:
                return DeadlinePassed("the deadline has passed")
            # Even one that has passed: a replica says best what would have been enough.
            params = dataclasses.replace(params, deadline_s=max(left_s, 1e-6))
        self._sent = True
        # A key of its own for each sending: a replica may still have one that nobody reads any more.
        params = dataclasses.replace(params, request_id=f"{params.request_id}~{next(_tries)}")
        taken = False
        try:
            async with aclosing(self._messages(params, tuple(refusals))) as messages:
                async for message in messages:
                    self.heard = time.monotonic()
                    match message:
                        case Accepted():
                            taken = True
                            if not self.accepted.done():
                                self.accepted.set_result(None)
                        case EngineNotReady() if taken:  # it has failed, or ends: the request need not
                            break
                        case Result() | EngineError() | Refused():
                            return message
                        case _:
                            self._tell(message)
        except Lost:
            self._count(taken)
            raise
        self._count(taken)
        raise Lost("its answer ended too soon")

    def _count(self, taken: bool) -> None:
        if taken:
            self.lost, self.reached, self.heard = self.lost + 1, self.progress.step, time.monotonic()
            log.warning("lost with its replica, for the %d. time: it is drawn again", self.lost)

    def _tell(self, news: Iterable[Progress]) -> None:
        """Hands on what is new: one that is drawn again does not go back."""
        for progress in news:
            if self.lost and progress.step <= self.reached:
                if not progress.previews:
                    continue
                progress = dataclasses.replace(progress, step=self.reached)  # of an image that was behind the others
            self.progress = progress
            news_of = progress.step, progress.queue_position
            if self.on_progress is not None and (news_of != self._told or progress.previews):
                self._told = news_of
                self.on_progress(progress)

    async def _messages(self, params: GenerateParams, avoid: tuple[str, ...]) -> AsyncGenerator[Message]:
        """Of one replica. Raises Lost where it is gone, or where none answers."""
        response = self.draw.remote(params, self.on_progress is not None, avoid=avoid)
        assert isinstance(response, DeploymentResponseGenerator)
        over = False
        try:
            while not over:
                async with asyncio.timeout(max(0.0, self.heard + PATIENCE_S - time.monotonic())):
                    message = await anext(response, None)
                if message is None:
                    return
                over = isinstance(message, Result | EngineError | Refused)
                yield message
        except TimeoutError:
            raise Lost("no replica answers") from None
        except asyncio.CancelledError:
            task = asyncio.current_task()
            if task is not None and task.cancelling():
                raise
            raise Lost("Ray Serve has cancelled it") from None
        except BackPressureError:  # no replica is up, and as many as may wait for one do
            raise Lost from EngineBusy("queue_full", "no replica is up to take it", PATIENCE_S)
        except RayTaskError:
            raise
        except (RayError, RayServeException) as error:
            raise Lost(f"{type(error).__name__}: {error}") from None
        finally:
            if not over:
                with contextlib.suppress(Exception, asyncio.CancelledError):  # it raises what was raised
                    response.cancel()  # type: ignore[no-untyped-call]


def _soonest(refusals: Mapping[str, EngineError]) -> EngineError:
    """The refusal that will be over first."""
    return min(refusals.values(), key=lambda error: error.wait_s)
