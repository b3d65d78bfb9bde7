"""One client's connection: uvicorn's, bounded in number, in how long a head may take and an answer may lie unread."""

from __future__ import annotations

import asyncio
import contextlib
import http
import socket
import sys
import uuid
from typing import TYPE_CHECKING, Any

import h11
from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from app import errors
from app.metrics import Metrics
from app.routes.health import probes
from app.settings import Settings

HURRY_S = 5.0  # for all that a connection over the limit may take
SPARE = 256  # connections over the limit that may still ask for a probe
NOT_SENT_BYTES = 2**17  # that the kernel keeps of an answer: with megabytes, nobody sees that a slow client reads
PROBES = {route.path for route in probes.routes}  # type: ignore[attr-defined]


class Connection(H11Protocol):
    """`bounded(...)` makes the class that uvicorn.Config takes as `http`.

    The clock of a head starts with the connection or with the end of the answer before it, so bytes that trickle in do
    not stop it; that of an answer runs from where the client is behind to where it has caught up, at most a piece of
    http.py and what the kernel holds: some ten kilobytes a second are enough. What a client asked for that is found to
    have left in such a way is ended by its route, as of any that leaves.
    """

    settings: Settings
    metrics: Metrics
    max_connections: int

    if TYPE_CHECKING:
        transport: asyncio.Transport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_s = self.settings.request_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        over = len(self.connections) - self.max_connections
        if over > SPARE:
            self.metrics.refused.labels("connections").inc()
            transport.abort()
            return
        if over > 0:
            self.app, self._head_s = _Full(self.app, self.max_connections, self.metrics), HURRY_S
        with contextlib.suppress(AttributeError, OSError):  # where the system has it
            option: int = socket.TCP_NOTSENT_LOWAT
            transport.get_extra_info("socket").setsockopt(socket.IPPROTO_TCP, option, NOT_SENT_BYTES)
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()
        if self.conn.their_state is h11.DONE and len(self.conn.trailing_data[0]) <= self.settings.max_header_bytes:
            self.flow.resume_reading()  # the next request's bytes must not hide that the client leaves

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_head()

    def shutdown(self) -> None:
        """Called for every connection when the server ends: one that is being closed must not end that."""
        if not self.transport.is_closing():
            super().shutdown()

    def _time_head(self) -> None:
        """Runs the clock of a head exactly while one is awaited."""
        awaited = self.cycle is None or self.cycle.response_complete
        if awaited and self._head_timer is None:
            self._head_timer = self.loop.call_later(self._head_s, self.transport.abort)
        elif not awaited and self._head_timer is not None:
            self._head_timer.cancel()
            self._head_timer = None

    def pause_writing(self) -> None:
        super().pause_writing()
        if self._stall_timer is None:
            self._stall_timer = self.loop.call_later(self.settings.stall_s, self.transport.abort)

    def resume_writing(self) -> None:
        super().resume_writing()
        if self._stall_timer is not None:
            self._stall_timer.cancel()
            self._stall_timer = None

    def send_400_response(self, msg: str) -> None:
        """Answers what is not HTTP with a problem, and closes. Called in the handler of h11's error."""
        error = sys.exception()
        status = getattr(error, "error_status_hint", 400)
        if status == 431:
            slug, what = errors.HEAD_TOO_LARGE, "the head of the request is too large"
        else:
            slug, what = "bad-request", f"this is not HTTP/1.1: {error or msg}"
        response = errors.answer(uuid.uuid4().hex, status, slug, what, headers={"Connection": "close"})
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            reason = http.HTTPStatus(status).phrase.encode()
            body = b"" if self.cycle is not None and self.cycle.scope["method"] == "HEAD" else bytes(response.body)
            for event in (
                h11.Response(status_code=status, headers=response.raw_headers, reason=reason),
                h11.Data(data=body),
                h11.EndOfMessage(),
            ):
                self.transport.write(self.conn.send(event) or b"")
        if self.cycle is not None and not self.cycle.response_complete:  # its route must not answer as well
            self.cycle.disconnected = True
            self.cycle.message_event.set()
        self.transport.close()


class _Full:
    """What a connection over the limit gets: probes their answer, everybody else a 503; then it is closed."""

    def __init__(self, app: ASGIApp, limit: int, metrics: Metrics) -> None:
        self.app, self.limit, self.metrics = app, limit, metrics

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async def send_last(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["Connection"] = "close"
            await send(message)

        if scope["path"] in PROBES:
            await self.app(scope, receive, send_last)
            return
        self.metrics.refused.labels("connections").inc()
        response = errors.answer(
            uuid.uuid4().hex,
            503,
            errors.Unavailable.slug,
            f"all {self.limit} connections are in use: try again later",
            headers={"Retry-After": "1"},
        )
        await response(scope, receive, send_last)


def bounded(settings: Settings, metrics: Metrics, files: int) -> type[Connection]:
    """Connections within the bounds of these settings, and of the files that the process may have open for them."""
    most = max(1, min(settings.max_connections, files - SPARE))
    return type("BoundedConnection", (Connection,), {"settings": settings, "metrics": metrics, "max_connections": most})
