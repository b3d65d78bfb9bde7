"""Progress as an event stream: `progress` a step, then `completed` or `error`; comments keep idle connections open."""

from __future__ import annotations

import asyncio
import collections
import logging
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future

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


def event_stream(
    request: Request,
    submit: Callable[[OnProgress], Future[Result]],
    cancel: Callable[[], object],
    encode: Callable[[Result], bytes],
    to_problem: Callable[[BaseException], errors.Problem],
    scale: int,
    headers: Mapping[str, str],
) -> EventSourceResponse:
    """Submits a request and tells its client of every step. A client that leaves ends it.

    Args:
        request: the client's; its end is the end of the stream, read or not.
        submit: hands the request to the engine; what it raises is an answer like any other.
        cancel: ends the request.
        encode: the data of the `completed` event, made in a thread.
        to_problem: what an error of the engine is over HTTP.
        scale: of the previews.
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

    future = submit(tell)
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
                yield _event("progress", await run_in_threadpool(_progress, progress, scale))
            else:
                try:
                    await asyncio.wait_for(changed.wait(), KEEP_ALIVE_S)
                except TimeoutError:
                    yield KEEPALIVE_COMMENT
        try:
            result = await run_in_threadpool(lambda: encode(future.result()))
            yield format_sse_event(event="completed", data_str=result.decode())
        except EngineError as error:
            problem = to_problem(error)
        except Exception:
            log.exception("the images could not be encoded")
            problem = errors.Problem("an unexpected error; the server's log has it by request id")
        else:
            return
        yield _event("error", ProblemBody(**problem.body(request.state.request_id)))

    return EventSourceResponse(events(), headers={**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"})


def _event(name: str, data: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=data.model_dump_json(exclude_none=True))


def _bytes(progress: Progress | None) -> int:
    """About what an event that waits holds."""
    return 1024 + sum(pixels.nbytes for _, pixels in progress.previews) if progress else 0


def _progress(progress: Progress, scale: int) -> ProgressEvent:
    previews = [
        Preview(index=index, b64_json=b64(images.encode_png(pixels, {}, scale=scale)))
        for index, pixels in progress.previews
    ]
    return ProgressEvent(
        step=progress.step,
        steps=progress.steps,
        queue_position=progress.queue_position,
        eta_s=round(progress.eta_s, 3),
        previews=previews,
    )
