"""A service on the other side of a URL, by the standard library alone: asked directly, and watched beside that.

The answer is the service's own bytes in any form. GET /requests/{id} says meanwhile how far the request is: an event
stream would say it too, but has the images in JSON alone. Whoever leaves ends the request.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
import urllib.error
import urllib.parse
import urllib.request
import uuid
from collections.abc import Iterator, Mapping
from email.message import Message
from typing import Any

from app.cli.asking import Answer, Question
from app.cli.errors import CommandError
from app.cli.progress import Bar
from app.media_types import JSON, PROBLEM

CONNECT_S = 10.0  # until a service has taken the connection; an answer takes as long as it takes
SHORT_S = 5.0  # for what a service answers at once
POLL_S = 0.25
SILENT_S = 30  # until the system asks whether the other side is still there
FACTS = {"seed": "X-Seed", "model": "X-Model", "sampler": "X-Sampler", "steps": "X-Steps", "alpha_bar": "X-Alpha-Bar"}


def _be_patient(connection: http.client.HTTPConnection) -> None:
    """For an answer that takes minutes; a machine that has gone is noticed by the system."""
    connection.sock.settimeout(None)
    connection.sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    if hasattr(socket, "TCP_KEEPIDLE"):
        connection.sock.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, SILENT_S)


class _Plain(http.client.HTTPConnection):
    def connect(self) -> None:
        super().connect()
        _be_patient(self)


class _Secure(http.client.HTTPSConnection):
    def connect(self) -> None:
        super().connect()
        _be_patient(self)


class _PatientHTTP(urllib.request.HTTPHandler):
    def http_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Plain, request)


class _PatientHTTPS(urllib.request.HTTPSHandler):
    def https_open(self, request: urllib.request.Request) -> http.client.HTTPResponse:
        return self.do_open(_Secure, request)


class Service:
    """A client of one service. Its methods raise CommandError."""

    def __init__(self, url: str, key: str | None) -> None:
        try:
            parts = urllib.parse.urlsplit(url)
            usable = url.isascii() and parts.scheme in ("http", "https") and parts.hostname and parts.port != 0
        except ValueError:
            usable = False
        if not usable:
            raise CommandError(f"--url {url} must be like http://127.0.0.1:8000")
        if key is not None and not (key.isascii() and key.isprintable()):
            raise CommandError("the API key must be visible ASCII characters")
        self.url, self._key = url.rstrip("/"), key
        self._patient = urllib.request.build_opener(_PatientHTTP, _PatientHTTPS)
        self._prompt = urllib.request.build_opener()

    def ask(self, question: Question, bar: Bar) -> Answer:
        """Asks and waits. A KeyboardInterrupt ends the request at the service too."""
        request_id = uuid.uuid4().hex
        body, content_type = _encoded(question)
        request = self._request(
            question.path, data=body,
            headers={"Content-Type": content_type, "Accept": question.media_type, "X-Request-Id": request_id},
        )  # fmt: skip
        with self._watched(request_id, bar):
            try:
                content, headers = self._send(self._patient, request, CONNECT_S)
            except KeyboardInterrupt:
                with contextlib.suppress(CommandError):
                    self._send(self._prompt, self._request(f"/requests/{request_id}", method="DELETE"), SHORT_S)
                raise
        self._check_form(headers, question.media_type)
        return Answer(content, {name: headers[header] for name, header in FACTS.items() if header in headers})

    def get(self, path: str, *, also: int | None = None) -> Any:
        """The JSON of a path; `also` is a status that is an answer as good as 200."""
        content, headers = self._send(self._prompt, self._request(path), SHORT_S, also)
        self._check_form(headers, JSON)
        try:
            return json.loads(content)
        except ValueError:
            raise self._stranger("something that is no JSON") from None

    @contextlib.contextmanager
    def _watched(self, request_id: str, bar: Bar) -> Iterator[None]:
        """Shows how far a request is, until the end of the block."""
        over = threading.Event()

        def watch() -> None:
            while not over.wait(POLL_S):
                with contextlib.suppress(CommandError, KeyError, TypeError):  # it has not arrived yet, or has ended
                    state = self.get(f"/requests/{request_id}")
                    if not over.is_set():
                        bar.at(state["step"], state["steps"], state["queue_position"], state["eta_s"])

        watcher = threading.Thread(target=watch, daemon=True)
        if bar.shown:
            watcher.start()
        try:
            yield
        finally:
            over.set()
            if bar.shown:
                watcher.join()

    def _request(
        self, path: str, *, data: bytes | None = None, method: str | None = None, headers: Mapping[str, str] = {}
    ) -> urllib.request.Request:  # fmt: skip
        request = urllib.request.Request(self.url + path, data, dict(headers), method=method)
        if self._key is not None:
            request.add_unredirected_header("Authorization", f"Bearer {self._key}")
        return request

    def _send(
        self, opener: urllib.request.OpenerDirector, request: urllib.request.Request, timeout_s: float,
        also: int | None = None,
    ) -> tuple[bytes, Message]:  # fmt: skip
        try:
            try:
                with opener.open(request, timeout=timeout_s) as response:
                    return response.read(), response.headers
            except urllib.error.HTTPError as error:
                with error:
                    content = error.read()
                if error.code == also:
                    return content, error.headers
                raise CommandError(self._refusal(error, content)) from None
        except (urllib.error.URLError, UnicodeError) as error:  # the latter is of names that none can have
            raise CommandError(f"{self.url} cannot be reached: {_reason(getattr(error, 'reason', error))}") from None
        except (OSError, http.client.HTTPException) as error:
            raise CommandError(f"{self.url} broke the connection off: {_reason(error)}") from None

    def _refusal(self, error: urllib.error.HTTPError, content: bytes) -> str:
        """What a service says is wrong, and what helps."""
        detail = f"{self.url} answered {error.code} {error.reason}"
        if error.headers.get_content_type() == PROBLEM:
            with contextlib.suppress(ValueError, KeyError, TypeError):
                detail = str(json.loads(content)["detail"])
        if error.code == http.HTTPStatus.UNAUTHORIZED:
            detail += "; here: DDPM_API_KEY, or --api-key"
        if (seconds := error.headers.get("Retry-After", "")).isdecimal():
            detail += f"; come back in {seconds} s"
        return detail

    def _check_form(self, headers: Message, wanted: str) -> None:
        if (found := headers.get_content_type()) != wanted:
            raise self._stranger(found)

    def _stranger(self, found: str) -> CommandError:
        return CommandError(f"{self.url} answered with {found}, as no service of this project does: check --url")


def _reason(error: object) -> str:
    """Why a connection failed, in words."""
    if isinstance(error, TimeoutError):
        return "it does not answer"
    strerror = getattr(error, "strerror", None)
    return strerror or str(error) or type(error).__name__


def _encoded(question: Question) -> tuple[bytes, str]:
    """The body of a question, and its Content-Type: JSON, or a form where there is a picture."""
    if question.image is None:
        return json.dumps(question.fields).encode(), JSON
    boundary = uuid.uuid4().hex
    texts = [(f'name="{name}"', _text(value).encode()) for name, value in question.fields.items()]
    parts = [*texts, ('name="image"; filename="image"', question.image)]
    lines = [
        line
        for head, content in parts
        for line in (f"--{boundary}".encode(), f"Content-Disposition: form-data; {head}".encode(), b"", content)
    ]
    return b"\r\n".join([*lines, f"--{boundary}--".encode(), b""]), f"multipart/form-data; boundary={boundary}"


def _text(value: object) -> str:
    """A field of a form: 7, null, 4,null,2."""
    if isinstance(value, list):
        return ",".join(map(_text, value))
    return "null" if value is None else str(value)
