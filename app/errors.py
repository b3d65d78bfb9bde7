"""Errors are part of the interface: RFC 9457 problem+json, whatever Accept says, never a traceback.

Problem              status   when
  Invalid            422      a field or an image cannot be used; errors[] says which and why
  Unauthorized       401      no API key, or one that is not known
  NotAcceptable      406      no offered media type fits Accept
  TooSlow            408      the body took too long to arrive
  TooLarge           413      more bytes than the limit, counted on the wire
  ResultTooLarge     413      the result of an asynchronous request is more than may be kept
  UnsupportedMedia   415      a body of another media type
  QueueFull          429      more images asked for than the queue takes now; Retry-After
  UploadsFull        429      more uploads at once than are taken; Retry-After
  JobsFull           429      more asynchronous requests at once than are taken; Retry-After
  FramesFull         429      more frames of chains at once than are kept; Retry-After
  Unavailable        503      starting, draining or failed; Retry-After
  InFlight           409      this X-Request-Id is being served, or its result is kept
  NotDone            409      the result of a request that is still being served
  NotFound           404      no such request or path
  NoSuchModel        404      no such model; the detail lists those that there are
  Cancelled          410      the request was ended by DELETE /requests/{id}
  DeadlineTooSoon    429      deadline_ms cannot be met now; Retry-After
  DeadlinePassed     504      deadline_ms has passed before the images were done
"""

from __future__ import annotations

import http
import logging
from collections.abc import Mapping
from typing import Any

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.routing import Match

from app.media_types import PROBLEM

log = logging.getLogger("app")

SECURITY_HEADERS = {  # nothing that is sent here is a page, but for / and /docs, which say so themselves
    "X-Content-Type-Options": "nosniff",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Referrer-Policy": "no-referrer",
}
HEAD_TOO_LARGE = "head-too-large"  # 431
METHODS = ("DELETE", "GET", "HEAD", "PATCH", "POST", "PUT")
MAX_ERRORS = 16  # in one answer
MAX_NAME = 64  # characters of a client's own name for a field


class Problem(Exception):
    """An answer that is an error. `slug` names its type for programs, `detail` tells a person how to mend it."""

    status = 500
    slug = "internal-error"

    def __init__(
        self, detail: str, *, errors: list[dict[str, Any]] | None = None, headers: dict[str, str] | None = None
    ) -> None:
        super().__init__(detail)
        self.detail, self.errors, self.headers = detail, errors, headers

    def body(self, request_id: str, path: str = "") -> dict[str, Any]:
        """As JSON, under a path."""
        return body(request_id, self.status, self.slug, self.detail, self.errors, path)


class Invalid(Problem):
    status, slug = 422, "invalid"

    @classmethod
    def field(cls, name: str, detail: str) -> Invalid:
        """One wrong field."""
        return cls.fields([{"field": name, "detail": detail}])

    @classmethod
    def fields(cls, errors: list[dict[str, Any]]) -> Invalid:
        """Wrong fields, each {"field", "detail"}; the first MAX_ERRORS of them are named."""
        named = [
            {"field": _readable(e["field"], MAX_NAME), "detail": _readable(e["detail"])} for e in errors[:MAX_ERRORS]
        ]
        return cls("; ".join(f"{e['field']}: {e['detail']}" for e in named), errors=named)


class Unauthorized(Problem):
    status, slug = 401, "unauthorized"


class NotAcceptable(Problem):
    status, slug = 406, "not-acceptable"


class TooSlow(Problem):
    status, slug = 408, "too-slow"


class TooLarge(Problem):
    status, slug = 413, "too-large"


class ResultTooLarge(Problem):
    status, slug = 413, "result-too-large"


class UnsupportedMedia(Problem):
    status, slug = 415, "unsupported-media-type"


class InFlight(Problem):
    status, slug = 409, "request-id-in-flight"


class NotDone(Problem):
    status, slug = 409, "not-done"


class NotFound(Problem):
    status, slug = 404, "not-found"


class NoSuchModel(NotFound):
    slug = "model-not-found"


class Cancelled(Problem):
    status, slug = 410, "cancelled"


class QueueFull(Problem):
    status, slug = 429, "queue-full"


class Full(Problem):
    """A budget that requests share is used up; `reason` is what metrics call it."""

    status = 429
    reason = ""


class UploadsFull(Full):
    slug, reason = "uploads-full", "uploads_full"


class JobsFull(Full):
    slug, reason = "jobs-full", "jobs_full"


class FramesFull(Full):
    slug, reason = "frames-full", "frames_full"


class DeadlineTooSoon(Problem):
    status, slug = 429, "deadline-too-soon"


class DeadlinePassed(Problem):
    status, slug = 504, "deadline-passed"


class Unavailable(Problem):
    status, slug = 503, "unavailable"


def _readable(text: str, most: int = 2000) -> str:
    """Text that an answer can hold: not endless, and no lone surrogates, which UTF-8 has no bytes for."""
    short = text if len(text) <= most else f"{text[:most]}..."
    return short.encode("utf-8", "replace").decode()


def body(
    request_id: str, status: int, slug: str, detail: str, errors: list[dict[str, Any]] | None, path: str = ""
) -> dict[str, Any]:
    """A problem as JSON; under the paths of protocols that others defined with what their clients read, `error`."""
    detail = _readable(detail)
    error: dict[str, Any] = {}
    if path.startswith("/v2"):
        error = {"error": detail}
    elif path.startswith("/v1"):
        kind = "invalid_request_error" if status < 500 else "server_error"
        param = errors[0]["field"] if errors else None
        error = {"error": {"message": detail, "type": kind, "code": slug.replace("-", "_"), "param": param}}
    return {
        "type": f"urn:ddpm:problem:{slug}",
        "title": http.HTTPStatus(status).phrase,
        "status": status,
        "detail": detail,
        "instance": f"/requests/{request_id}",
        **({} if errors is None else {"errors": errors}),
        **error,
    }


def answer(
    request_id: str,
    status: int,
    slug: str,
    detail: str,
    *,
    errors: list[dict[str, Any]] | None = None,
    headers: Mapping[str, str] | None = None,
    path: str = "",
) -> JSONResponse:
    """A problem as an answer, under a path."""
    return JSONResponse(
        body(request_id, status, slug, detail, errors, path),
        status,
        {**SECURITY_HEADERS, "X-Request-Id": request_id, **(headers or {})},
        media_type=PROBLEM,
    )


def _id(request: Request) -> str:
    request_id: str = request.scope.get("state", {}).get("request_id", "")
    return request_id


async def _on_problem(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, Problem)
    return answer(
        _id(request), error.status, error.slug, error.detail, errors=error.errors, headers=error.headers,
        path=request.scope["path"],
    )  # fmt: skip


def _hint(request: Request) -> str:
    return "; GET /docs lists what there is" if request.app.openapi_url else ""


async def _on_http(request: Request, error: Exception) -> JSONResponse:
    """What the framework itself refuses: an unknown path, a method that a path does not have."""
    assert isinstance(error, HTTPException)
    slug = http.HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
    headers = dict(error.headers or {})
    if error.status_code == http.HTTPStatus.METHOD_NOT_ALLOWED:  # the framework names those of one route of the path
        scopes = {method: {**request.scope, "method": method} for method in METHODS}
        headers["Allow"] = ", ".join(
            method
            for method, scope in scopes.items()
            if any(route.matches(scope)[0] is Match.FULL for route in request.app.routes)
        )
    detail = f"{request.method} {request.scope['path']}: {error.detail}{_hint(request)}"
    return answer(
        _id(request), error.status_code, slug, detail, headers=headers, path=request.scope["path"]
    )  # fmt: skip


async def _on_bug(request: Request, error: Exception) -> JSONResponse:
    request_id = _id(request)
    log.error(
        "request %s: unexpected error in %s %s", request_id, request.method, request.scope["path"], exc_info=error
    )
    detail = "an unexpected error; the server's log has it by request id"
    return answer(request_id, 500, "internal-error", detail, path=request.scope["path"])


async def _on_disconnect(request: Request, error: Exception) -> Response:
    """The client left while it sent its body: nobody reads this answer, and nothing is wrong with us."""
    return Response(status_code=400)


def install(app: FastAPI) -> None:
    """Makes every error of an app a problem."""
    app.add_exception_handler(Problem, _on_problem)
    app.add_exception_handler(HTTPException, _on_http)
    app.add_exception_handler(ClientDisconnect, _on_disconnect)
    app.add_exception_handler(Exception, _on_bug)
