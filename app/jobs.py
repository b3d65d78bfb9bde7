"""Requests that nobody waits for (Prefer: respond-async): their results are kept for a while, within bounds."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
import math
import time
from collections.abc import Coroutine, Iterator, Mapping
from contextlib import contextmanager

import anyio
from fastapi import Response

from app import errors
from app.engine.engines import Served
from app.engine.request import GenerateParams
from app.metrics import Metrics
from app.settings import Settings

log = logging.getLogger("app")


@dataclasses.dataclass(frozen=True)
class Answer:
    """A response before it is one."""

    content: bytes
    media_type: str
    headers: Mapping[str, str]

    def response(self) -> Response:
        return Response(self.content, media_type=self.media_type, headers=dict(self.headers))


@dataclasses.dataclass(eq=False)
class Kept:
    """One such request, from its acceptance to its end and a while beyond. Times are Unix seconds."""

    engine: Served
    params: GenerateParams
    created: float = dataclasses.field(default_factory=time.time)
    ended: float | None = None
    answer: Answer | None = None  # of one that has ended: this or the next
    problem: errors.Problem | None = None
    fetched: bool = False
    expiry: asyncio.TimerHandle | None = None

    def response(self) -> Response:
        """Of one that has ended. Raises its problem."""
        if self.problem is not None:
            raise self.problem
        assert self.answer is not None
        return self.answer.response()

    @property
    def size(self) -> int:
        """Bytes of its result."""
        return len(self.answer.content) if self.answer else 0


class Jobs:
    """Of one process; used on its event loop alone."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self._most, self._most_bytes, self.seconds = settings.jobs, settings.job_bytes, settings.job_s
        self._most_of_flow = max(1, settings.jobs // 2) if len(settings.keys) > 1 else settings.jobs
        self._refused = metrics.refused.labels(errors.JobsFull.reason)
        self.encoders = anyio.CapacityLimiter(2)  # nobody waits for these: whoever is waited for has all other threads
        self._by_key: dict[str, Kept] = {}  # the oldest first
        self._tasks: dict[Kept, asyncio.Task[None]] = {}
        self._entering = collections.Counter[str]()  # by flow
        metrics.jobs.set_function(lambda: len(self._by_key))
        metrics.job_bytes.set_function(lambda: self._bytes)

    @contextmanager
    def room(self, flow: str) -> Iterator[None]:
        """Keeps a place for a request that is about to be accepted. Raises JobsFull where so many have not ended."""
        own = [kept for kept in self._tasks if kept.params.flow == flow]
        places = (
            (list(self._tasks), self._entering.total(), self._most, ""),
            (own, self._entering[flow], self._most_of_flow, " of this API key"),
        )
        for unfinished, entering, most, whose in places:
            if (taken := len(unfinished) + entering) >= most:
                self._refused.inc()
                soon_s = min(map(_left_s, unfinished), default=0.0)
                raise errors.JobsFull(
                    f"{taken} of {most} asynchronous requests{whose} have not ended: try again later",
                    headers={"Retry-After": str(max(1, math.ceil(soon_s)))},
                )
        self._entering[flow] += 1
        try:
            yield
        finally:
            self._entering[flow] -= 1

    def add(self, engine: Served, params: GenerateParams, work: Coroutine[None, None, Answer]) -> Kept:
        """Keeps a request that an engine has accepted; `work` waits for its end."""
        kept = self._by_key[params.key] = Kept(engine, params)
        self._tasks[kept] = asyncio.create_task(self._finish(kept, work))
        return kept

    def find(self, key: str) -> Kept | None:
        """By GenerateParams.key."""
        return self._by_key.get(key)

    def remove(self, kept: Kept) -> None:
        """Forgets one that has ended."""
        if self._by_key.get(kept.params.key) is kept:
            del self._by_key[kept.params.key]
        if kept.expiry is not None:
            kept.expiry.cancel()  # it would keep the result alive

    @property
    def settled(self) -> bool:
        """Whether all that was kept has ended, and was fetched or failed."""
        return all(kept.fetched or (kept.ended and kept.problem) for kept in self._by_key.values())

    async def ended(self, kept: Kept, timeout_s: float) -> bool:
        """Waits so long for an end. Returns whether it came."""
        if (task := self._tasks.get(kept)) is not None:
            await asyncio.wait((task,), timeout=timeout_s)
        return kept.ended is not None

    async def close(self) -> None:
        """Ends all waiting."""
        for task in self._tasks.values():
            task.cancel()
        await asyncio.gather(*self._tasks.values(), return_exceptions=True)

    async def _finish(self, kept: Kept, work: Coroutine[None, None, Answer]) -> None:
        try:
            kept.answer = await work
            if kept.size > self._most_bytes:
                kept.problem = errors.ResultTooLarge(
                    f"the result has {kept.size:,} bytes, over the limit of {self._most_bytes:,} that are kept: ask "
                    "for fewer images, or without Prefer: respond-async"
                )
                kept.answer = None
        except errors.Problem as problem:
            kept.problem = problem
        except Exception:
            log.exception("the images could not be encoded", extra={"request_id": kept.params.request_id})
            kept.problem = errors.Problem("an unexpected error; the server's log has it by request id")
        finally:
            del self._tasks[kept]
        kept.ended = time.time()
        if self.find(kept.params.key) is kept:  # nobody has deleted it meanwhile
            kept.expiry = asyncio.get_running_loop().call_later(self.seconds, self.remove, kept)
            self._make_room()

    @property
    def _bytes(self) -> int:
        return sum(kept.size for kept in self._by_key.values())

    def _make_room(self) -> None:
        """Forgets the oldest results where there are too many, of the client that has the most."""
        while True:
            ended = [kept for kept in self._by_key.values() if kept.ended is not None]
            if len(ended) <= self._most and self._bytes <= self._most_bytes:
                return
            of_flow = collections.Counter[str]()
            for kept in ended:
                of_flow[kept.params.flow] += 1 if len(ended) > self._most else kept.size
            ((flow, _),) = of_flow.most_common(1)
            self.remove(next(kept for kept in ended if kept.params.flow == flow))


def _left_s(kept: Kept) -> float:
    """Seconds until an unfinished one has been drawn."""
    progress = kept.engine.progress(kept.params.request_id, kept.params.flow)
    return progress.eta_s if progress else 0.0
