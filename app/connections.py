"""One client's connection: uvicorn's, bounded in number, in how long a head may take and an answer may lie unread."""

from __future__ import annotations

import asyncio
import http
import json
import sys
import uuid
from typing import TYPE_CHECKING, Any

import h11
from starlette.responses import JSONResponse
from starlette.types import ASGIApp, Receive, Scope, Send
from uvicorn.protocols.http.h11_impl import H11Protocol

from app import errors
from app.metrics import Metrics
from app.settings import Settings

HURRY_S = 5.0  # for all that a connection over the limit may take
PROBES = ("/livez", "/readyz", "/v2/health/live", "/v2/health/ready")


class Connection(H11Protocol):
    """`bounded(...)` makes the class that uvicorn.Config takes as `http`.

    The clock of a head starts with the connection or with the end of the answer before it, so bytes that trickle in do
    not stop it; that of an answer runs while the client reads nothing of what was sent. What a client asked for that is
    found to have left in such a way is ended by its route, as of any that leaves.
    """

    settings: Settings
    metrics: Metrics

    if TYPE_CHECKING:
        transport: asyncio.Transport

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._head_s = self.settings.request_s
        self._head_timer: asyncio.TimerHandle | None = None
        self._stall_timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > self.settings.max_connections:
            self.app, self._head_s = _Full(self.app, self.settings.max_connections, self.metrics), HURRY_S
        self._time_head()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        for timer in (self._head_timer, self._stall_timer):
            if timer is not None:
                timer.cancel()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._time_head()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._time_head()

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
        request_id, phrase = uuid.uuid4().hex, http.HTTPStatus(status).phrase
        content = json.dumps(errors.body(request_id, status, slug, what, None)).encode()
        headers = [
            (b"content-type", errors.MEDIA_TYPE.encode()),
            (b"content-length", str(len(content)).encode()),
            (b"connection", b"close"),
            (b"x-request-id", request_id.encode()),
        ]
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            for event in (h11.Response(status_code=status, headers=headers, reason=phrase.encode()), h11.Data(content)):
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
        if scope["path"] in PROBES:
            await self.app(scope, receive, send)
            return
        self.metrics.refused.labels("connections").inc()
        request_id = uuid.uuid4().hex
        detail = f"all {self.limit} connections are in use: try again later"
        response = JSONResponse(
            errors.body(request_id, 503, errors.Unavailable.slug, detail, None),
            503,
            {"X-Request-Id": request_id, "Retry-After": "1", "Connection": "close"},
            media_type=errors.MEDIA_TYPE,
        )
        await response(scope, receive, send)


def bounded(settings: Settings, metrics: Metrics) -> type[Connection]:
    """Connections within the bounds of these settings."""
    return type("BoundedConnection", (Connection,), {"settings": settings, "metrics": metrics})
