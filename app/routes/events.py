"""Progress as an event stream: `progress` a step, then `completed` or `error`; comments keep idle connections open."""

from __future__ import annotations

import asyncio
import collections
from collections.abc import AsyncIterator, Callable, Mapping
from concurrent.futures import Future

from fastapi.sse import KEEPALIVE_COMMENT, EventSourceResponse, format_sse_event
from pydantic import BaseModel
from starlette.concurrency import run_in_threadpool
from starlette.types import Receive, Scope, Send

from app import errors, images
from app.engine.job import OnProgress
from app.engine.request import EngineError, Progress, Result
from app.routes.common import b64
from app.schemas import Preview, ProblemBody, ProgressEvent

EVENTS = "text/event-stream"
KEEP_ALIVE_S = 15.0
BACKLOG = 64  # events that a slow reader may be behind; older ones are dropped


class _Stream(EventSourceResponse):
    """An event stream that says when it is over, even where nobody ever read from it."""

    def __init__(self, content: AsyncIterator[bytes], headers: Mapping[str, str], on_end: Callable[[], object]) -> None:
        super().__init__(content, headers=dict(headers))
        self.on_end = on_end

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self.on_end()


def event_stream(
    submit: Callable[[OnProgress], Future[Result]],
    cancel: Callable[[], object],
    encode: Callable[[Result], bytes],
    to_problem: Callable[[BaseException], errors.Problem],
    request_id: str,
    scale: int,
    headers: Mapping[str, str],
) -> EventSourceResponse:
    """Submits a request and tells its client of every step. A client that leaves ends it.

    Args:
        submit: hands the request to the engine; what it raises is an answer like any other.
        cancel: ends the request.
        encode: the data of the `completed` event, made in a thread.
        to_problem: what an error of the engine is over HTTP.
        request_id: for the problem in an `error` event.
        scale: of the previews.
        headers: of the response.
    """
    loop = asyncio.get_running_loop()
    news: collections.deque[Progress] = collections.deque(maxlen=BACKLOG)
    changed = asyncio.Event()

    def tell(progress: Progress) -> None:
        def note() -> None:
            news.append(progress)
            changed.set()

        loop.call_soon_threadsafe(note)

    future = submit(tell)
    future.add_done_callback(lambda _: loop.call_soon_threadsafe(changed.set))

    async def events() -> AsyncIterator[bytes]:
        while True:
            over = future.done()
            changed.clear()
            while news:
                progress = news.popleft()
                yield _event("progress", await run_in_threadpool(_progress, progress, scale))
            if over:
                break
            try:
                await asyncio.wait_for(changed.wait(), KEEP_ALIVE_S)
            except TimeoutError:
                yield KEEPALIVE_COMMENT
        try:
            yield format_sse_event(
                event="completed", data_str=(await run_in_threadpool(lambda: encode(future.result()))).decode()
            )
        except EngineError as error:
            problem = to_problem(error)
            content = errors.body(request_id, problem.status, problem.slug, problem.detail, problem.errors)
            yield _event("error", ProblemBody.model_validate(content))

    def end() -> None:
        if not future.done():
            cancel()

    return _Stream(events(), {**headers, "Cache-Control": "no-cache", "X-Accel-Buffering": "no"}, end)


def _event(name: str, data: BaseModel) -> bytes:
    return format_sse_event(event=name, data_str=data.model_dump_json(exclude_none=True))


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
