"""What every route needs of HTTP: request ids, bodies counted on the wire, the choice of a media type."""

from __future__ import annotations

import asyncio
import re
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Sequence
from typing import TypeVar

import mimeparse
from fastapi import Request
from starlette.datastructures import FormData, Headers, MutableHeaders
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors
from app.logs import request_id_of_log

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")


class RequestId:
    """ASGI middleware: X-Request-Id is the client's or a new one; it stands in every response and in request.state."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        valid = given is not None and REQUEST_ID.fullmatch(given) is not None
        request_id = given if given is not None and valid else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        request_id_of_log.set(request_id)

        async def send_with_id(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Request-Id"] = request_id
            await send(message)

        if given is not None and not valid:
            response = errors.to_response(
                Request(scope), 422, "invalid", "X-Request-Id must be 1 to 64 characters of A-Z a-z 0-9 . _ -"
            )
            await response(scope, receive, send_with_id)
        else:
            await self.app(scope, receive, send_with_id)


T = TypeVar("T")


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """Awaits work as long as the client waits for it; its body must have been read.

    Raises:
        ClientDisconnect: the client left first; the work is cancelled.
    """

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    task, leaving = asyncio.ensure_future(work), asyncio.create_task(gone())
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not task.done():
            raise ClientDisconnect
        return task.result()
    finally:
        leaving.cancel()
        task.cancel()


def negotiate(request: Request, offered: Sequence[str]) -> str:
    """The best of the offered media types for Accept, q-values counted; the last one where all are equal.

    Raises:
        NotAcceptable: none fits.
    """
    accept = ", ".join(request.headers.getlist("accept")).lower()
    ranges = [part for part in accept.split(",") if "/" in part or part.strip().startswith("*")]  # the rest is noise
    try:
        best: str = mimeparse.best_match(list(offered), ",".join(ranges) if accept.strip() else "*/*")
    except mimeparse.MimeTypeParseException:
        best = ""
    if not best:
        raise errors.NotAcceptable(
            f"Accept asks for what {request.url.path} does not send; it sends {', '.join(offered)}"
        )
    return best


async def _read(request: Request, limit: int) -> bytes:
    """The body; too many bytes end it on the wire, whatever Content-Length said."""
    too_large = errors.TooLarge(f"the body is over the limit of {limit:,} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and int(declared) > limit:
        raise too_large
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > limit:
            raise too_large
    return bytes(body)


def _media_type(request: Request) -> str:
    return request.headers.get("content-type", "").partition(";")[0].strip().lower()


async def read_json(request: Request, limit: int) -> bytes:
    """The bytes of a JSON body; no Content-Type at all is taken for JSON.

    Raises:
        UnsupportedMedia, TooLarge.
    """
    media_type = _media_type(request)
    if media_type not in ("", "application/json"):
        hint = (
            f"curl -H 'Content-Type: application/json' -d '{{\"label\": 7}}' -o seven.png {request.url}"
            if media_type == "application/x-www-form-urlencoded"
            else "set Content-Type: application/json"
        )
        raise errors.UnsupportedMedia(f"the body must be application/json, not {media_type}: {hint}")
    return await _read(request, limit)


class _InMemoryParser(MultiPartParser):
    spool_max_size = sys.maxsize  # the body is bounded already, and the disk may be read-only


async def read_form(request: Request, limit: int) -> FormData:
    """A multipart form, held in memory; the caller closes it.

    Raises:
        UnsupportedMedia, TooLarge, Invalid.
    """
    if _media_type(request) != "multipart/form-data":
        raise errors.UnsupportedMedia(
            f"the body must be multipart/form-data: curl -F image=@digit.png -F t=200 -o noisy.png {request.url}"
        )
    body = await _read(request, limit)

    async def stream() -> AsyncGenerator[bytes, None]:
        yield body

    parser = _InMemoryParser(request.headers, stream(), max_files=4, max_fields=16)
    try:
        return await parser.parse()
    except (MultiPartException, UnicodeError, LookupError) as error:  # the latter two: of a strange charset
        reason = error.message if isinstance(error, MultiPartException) else "send it as UTF-8"
        raise errors.Invalid.field("body", f"the form cannot be read: {reason}") from None
