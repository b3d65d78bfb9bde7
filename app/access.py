"""Who may call: with which API key, and from which pages."""

from __future__ import annotations

import hashlib
import hmac
from collections.abc import Sequence
from typing import Annotated

from fastapi import Request, Response, Security
from fastapi.security import APIKeyHeader, HTTPAuthorizationCredentials, HTTPBearer
from starlette.datastructures import Headers, State
from starlette.middleware.cors import CORSMiddleware

from app import errors
from app.logs import request_id_of_log

_bearer = HTTPBearer(auto_error=False, description="An API key.")
_header = APIKeyHeader(name="X-API-Key", auto_error=False, description="The same, for clients that send no Bearer.")


class Access:
    """A dependency that lets those with a key in, and notes whose share of the engine they use.

    Only digests are kept, and each is compared in constant time, so that neither a dump nor a clock tells a key.
    """

    def __init__(self, keys: Sequence[str]) -> None:
        self._digests = [_digest(key) for key in keys]

    async def __call__(
        self,
        request: Request,
        bearer: Annotated[HTTPAuthorizationCredentials | None, Security(_bearer)],
        header: Annotated[str | None, Security(_header)],
    ) -> None:
        """Raises Unauthorized."""
        given = bearer.credentials if bearer is not None else header
        if given is None:
            raise self._unauthorized(
                request, "an API key is needed: send `Authorization: Bearer KEY`, or `X-API-Key: KEY`"
            )
        digest = _digest(given)
        known = [hmac.compare_digest(digest, one) for one in self._digests]  # all of them, whichever fits
        if not any(known):
            raise self._unauthorized(request, "this API key is not known here")
        request.state.flow = digest[:12]

    @staticmethod
    def _unauthorized(request: Request, detail: str) -> errors.Unauthorized:
        request.app.state.metrics.refused.labels("unauthorized").inc()
        return errors.Unauthorized(detail, headers={"WWW-Authenticate": "Bearer"})


def flow_of(state: State) -> str:
    """Whose share a request uses: its API key's, where there are any."""
    flow: str = getattr(state, "flow", "")
    return flow


def _digest(key: str) -> str:
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()


class Cors(CORSMiddleware):
    """Tells browsers which pages of other origins may call; a preflight that is refused is a problem too."""

    def preflight_response(self, request_headers: Headers) -> Response:
        response = super().preflight_response(request_headers)
        if response.status_code == 200:
            return response
        headers = {name: value for name, value in response.headers.items() if not name.startswith("content-")}
        detail = f"{bytes(response.body).decode()}; DDPM_CORS_ORIGINS names the origins whose pages may call"
        return errors.answer(
            request_id_of_log.get() or "", response.status_code, "disallowed-cors", detail, headers=headers
        )
