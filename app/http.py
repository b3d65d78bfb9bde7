"""What every route needs of HTTP: request ids and headers, bodies counted on the wire, the choice of a media type."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import re
import sys
import uuid
from collections.abc import AsyncGenerator, Awaitable, Callable, Sequence
from typing import TypeVar

import mimeparse
from fastapi import Request
from python_multipart.multipart import parse_options_header
from starlette.datastructures import FormData, Headers, MutableHeaders
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from app import errors
from app.logs import request_id_of_log

REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")
CHARSETS = (b"utf-8", b"utf8", b"us-ascii")
MOST_WAIT_S = 60.0
PIECE_BYTES = 2**18  # of an answer, handed over when the client has read those before it


class Outermost:
    """ASGI middleware around everything: a request's id, the headers of every response, and the end of what it held.

    X-Request-Id is the client's or a new one; it stands in every response, in the log and in request.state.
    `request.state.held` is an ExitStack, closed when the answer has been sent or nobody waits for it any more.
    """

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id")
        valid = given is not None and REQUEST_ID.fullmatch(given) is not None
        request_id = given if given is not None and valid else uuid.uuid4().hex
        state = scope.setdefault("state", {})
        state["request_id"] = request_id
        request_id_of_log.set(request_id)

        async def send_on(message: Message) -> None:
            if message["type"] == "http.response.start":
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = request_id
                for name, value in errors.SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            elif message["type"] == "http.response.body" and len(message.get("body", b"")) > PIECE_BYTES:
                body = memoryview(message["body"])
                while len(body) > PIECE_BYTES:
                    await send({"type": "http.response.body", "body": bytes(body[:PIECE_BYTES]), "more_body": True})
                    body = body[PIECE_BYTES:]
                message = {**message, "body": bytes(body)}
            await send(message)

        with contextlib.ExitStack() as held:
            state["held"] = held
            app: ASGIApp = self.app
            most: int = scope["app"].state.settings.max_header_bytes
            if given is not None and not valid:
                detail = "X-Request-Id must be 1 to 64 characters of A-Z a-z 0-9 . _ -"
                app = errors.answer(request_id, 422, "invalid", detail, path=scope["path"])
            elif _head_bytes(scope) > most:  # h11 counts a head only as long as it is not whole
                detail = f"the head of the request is over the limit of {most:,} bytes"
                app = errors.answer(request_id, 431, errors.HEAD_TOO_LARGE, detail, path=scope["path"])
            await app(scope, receive, send_on)


def _head_bytes(scope: Scope) -> int:
    return len(scope["raw_path"]) + len(scope["query_string"]) + sum(len(n) + len(v) for n, v in scope["headers"])


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
        await asyncio.wait((task,))  # a thread that it waits for cannot be cancelled, nor what that holds be given back
        if not task.cancelled():
            task.exception()  # somebody has looked


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
            f"Accept asks for what {request.scope['path']} does not send; it sends {', '.join(offered)}"
        )
    return best


def unchanged(request: Request, etag: str) -> bool:
    """If-None-Match (RFC 9110, section 13.1.2): `*`, or a list in which weak and strong are alike."""
    given = ", ".join(request.headers.getlist("if-none-match"))
    return given.strip() == "*" or etag in re.findall(r'"[^"]*"', given)


@dataclasses.dataclass(frozen=True)
class Preference:
    """What Prefer says (RFC 7240)."""

    respond_async: bool
    wait_s: float  # that an asynchronous answer may be put off for, in case the request ends meanwhile

    @classmethod
    def of(cls, request: Request) -> Preference:
        """Preferences that are not understood are left alone, as the RFC has it."""
        given = ",".join(request.headers.getlist("prefer")).lower()
        names = [part.partition(";")[0].strip() for part in given.split(",")]
        wait = re.search(r'(?:^|,)\s*wait\s*=\s*"?(\d{1,9})"?\s*(?:[,;]|$)', given, re.ASCII)
        return cls("respond-async" in names, min(float(wait[1]), MOST_WAIT_S) if wait else 0.0)


async def _body(request: Request, limit: int) -> AsyncGenerator[bytes, None]:
    """The body as it comes; too many bytes end it on the wire, whatever Content-Length said.

    Raises:
        TooLarge, TooSlow.
    """
    too_large = errors.TooLarge(f"the body is over the limit of {limit:,} bytes")
    declared = request.headers.get("content-length", "")
    if declared.isdecimal() and (len(declared) > 18 or int(declared) > limit):
        raise too_large
    seconds: float = request.app.state.settings.request_s
    until, count = asyncio.get_running_loop().time() + seconds, 0
    chunks = request.stream()
    while True:
        try:
            async with asyncio.timeout_at(until):
                chunk = await anext(chunks, None)
        except TimeoutError:
            raise errors.TooSlow(
                f"the body did not arrive within {seconds:g} seconds: send a smaller one",
                headers={"Connection": "close"},
            ) from None
        if chunk is None:
            return
        count += len(chunk)
        if count > limit:
            raise too_large
        yield chunk


def base_url(request: Request) -> str:
    """Scheme and host that a client knows us by: not request.url, which a strange Host header breaks."""
    return f"{request.scope.get('scheme', 'http')}://{request.headers.get('host', 'localhost')}"


def _url(request: Request) -> str:
    """For a hint."""
    return f"{base_url(request)}{request.scope['path']}"


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
            f"curl -H 'Content-Type: application/json' -d '{{\"label\": 7}}' -o seven.png {_url(request)}"
            if media_type == "application/x-www-form-urlencoded"
            else "set Content-Type: application/json"
        )
        raise errors.UnsupportedMedia(f"the body must be application/json, not {media_type}: {hint}")
    return b"".join([chunk async for chunk in _body(request, limit)])


class _InMemoryParser(MultiPartParser):
    spool_max_size = sys.maxsize  # the body is bounded already, and the disk may be read-only
    ended = False

    def on_end(self) -> None:
        self.ended = True


async def read_form(request: Request, limit: int, hold: Callable[[int], None]) -> FormData:
    """A multipart form, held in memory; the caller closes it.

    Args:
        request: whose body is read.
        limit: of its bytes.
        hold: told of all bytes before they are kept; what it raises ends the reading.

    Raises:
        UnsupportedMedia, TooLarge, TooSlow, Invalid.
    """
    if _media_type(request) != "multipart/form-data":
        raise errors.UnsupportedMedia(
            "the body must be multipart/form-data, a file `image` and text fields: "
            f"curl -F image=@digit.png {_url(request)}"
        )

    _, options = parse_options_header(request.headers["content-type"])
    if options.get(b"charset", b"utf-8").lower() not in CHARSETS:  # Python has some that raise, and some that expand
        raise errors.Invalid.field("body", "the form must be UTF-8, without another charset in its Content-Type")

    async def stream() -> AsyncGenerator[bytes, None]:
        async for chunk in _body(request, limit):
            hold(len(chunk))
            yield chunk
        if not parser.ended:
            raise MultiPartException("it ends before its last boundary.")

    parser = _InMemoryParser(request.headers, stream(), max_files=4, max_fields=16)
    try:
        return await parser.parse()
    except MultiPartException as error:
        raise errors.Invalid.field("body", f"the form cannot be read: {error.message}") from None
