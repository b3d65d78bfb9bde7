"""Progress as an event stream: `progress` a step, then `completed` or `error`; comments keep idle connections open."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import logging
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from concurrent.futures import Future
from typing import Protocol

from fastapi import Request
from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool

from app import errors, images
from app.answers import b64
from app.engine.job import OnProgress
from app.engine.request import EngineError, Progress, Result
from app.schemas import Preview, ProblemBody, ProgressEvent

log = logging.getLogger("app")

EVENTS = "text/event-stream"
KEEP_ALIVE_S = 15.0
BACKLOG_BYTES = 2**22  # of events that a slow reader is behind; older ones are dropped


class Events(Protocol):
    """What a stream sends; b"" is nothing."""

    def progress(self, progress: Progress) -> bytes: ...

    def completed(self, result: Result) -> bytes: ...

    def failed(self, problem: errors.Problem) -> bytes: ...


@dataclasses.dataclass(frozen=True)
class OurEvents:
    """`progress` a step, then `completed` or `error`."""

    request_id: str
    scale: int  # of the previews
    encode: Callable[[Result], bytes]  # as JSON

    def progress(self, progress: Progress) -> bytes:
        previews = [
            Preview(index=index, b64_json=b64(images.encode_png(pixels, {}, scale=self.scale)))
            for index, pixels in progress.previews
        ]
        data = ProgressEvent(
            step=progress.step, steps=progress.steps, queue_position=progress.queue_position,
            eta_s=round(progress.eta_s, 3), previews=previews,
        )  # fmt: skip
        return event("progress", data)

    def completed(self, result: Result) -> bytes:
        return format_sse_event(event="completed", data_str=self.encode(result).decode())

    def failed(self, problem: errors.Problem) -> bytes:
        return event("error", ProblemBody(**problem.body(self.request_id)))


async def event_stream(
    request: Request,
    submit: Callable[[OnProgress], Awaitable[Future[Result]]],
    cancel: Callable[[], object],
    to_problem: Callable[[BaseException], errors.Problem],
    events_of: Events,
    headers: Mapping[str, str],
) -> EventSourceResponse:
    """Submits a request and tells its client of every step. A client that leaves ends it.

    Args:
        request: the client's; its end is the end of the stream, read or not.
        submit: hands the request to the engine; what it raises is an answer like any other.
        cancel: ends the request.
        to_problem: what an error of the engine is over HTTP.
        events_of: what is sent, made in a thread.
        headers: of the response.
    """
    loop = asyncio.get_running_loop()
    news: collections.deque[Progress | None] = collections.deque()  # None: that was all
    changed = asyncio.Event()

    def tell(progress: Progress | None) -> None:
        def note() -> None:
            news.append(progress)
            while len(news) > 2 and sum(_bytes(old) for old in news) > BACKLOG_BYTES:
                news.popleft()
            changed.set()

        loop.call_soon_threadsafe(note)

    future = await submit(tell)
    request.state.held.callback(lambda: future.done() or cancel())
    future.add_done_callback(lambda _: tell(None))  # in its turn: after all that was told

    async def events() -> AsyncIterator[bytes]:
        over = False
        while not over:
            changed.clear()
            while news:
                progress = news.popleft()
                if over := progress is None:
                    break
                yield await run_in_threadpool(events_of.progress, progress)
            else:
                try:
                    await asyncio.wait_for(changed.wait(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield KEEPALIVE_COMMENT
        try:
            yield await run_in_threadpool(lambda: events_of.completed(future.result()))
        except EngineError as error:
            problem = to_problem(error)
        except Exception:
            log.exception("the images could not be encoded")
            problem = errors.Problem("an unexpected error; the server's log has it by request id")
        else:
            return
        yield events_of.failed(problem)

    return EventSourceResponse(events(), headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def event(name: str, data: BaseModel) -> bytes:
    """One event."""
    return format_sse_event(event=name, data_str=data.model_dump_json(exclude_none=True))


def _bytes(progress: Progress | None) -> int:
    """About what an event that waits holds."""
    return 1024 + sum(pixels.nbytes for _, pixels in progress.previews) if progress else 0
