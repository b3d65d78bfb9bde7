"""GET /: the page, for people. Nothing is built: its files are sent as they lie in app/web."""

from __future__ import annotations

import hashlib
import re
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request, Response

from app import errors
from app.http import unchanged

router = APIRouter(include_in_schema=False)

WEB = Path(__file__).parent.parent / "web"
MEDIA_TYPES = {  # mimetypes asks the machine, and some machines are wrong
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (  # nothing inline, nothing from another host, and nobody's frame
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
DOCS_LINK = re.compile(rb"\s*<a [^>]*href=\"docs\".*?</a>")


class _File(NamedTuple):
    content: bytes
    media_type: str
    etag: str


def _file(content: bytes, media_type: str) -> _File:
    return _File(content, media_type, f'"{hashlib.sha256(content).hexdigest()[:32]}"')


FILES = {path.name: _file(path.read_bytes(), MEDIA_TYPES[path.suffix]) for path in sorted(WEB.iterdir())}
INDEX = FILES.pop("index.html")
INDEX_WITHOUT_DOCS = _file(DOCS_LINK.sub(b"", INDEX.content), INDEX.media_type)


def _respond(request: Request, file: _File) -> Response:
    """A file, or 304. Always asked for anew: a page must not meet the API of another version."""
    headers = {"ETag": file.etag, "Cache-Control": "no-cache", "Content-Security-Policy": POLICY}
    if unchanged(request, file.etag):
        return Response(status_code=304, headers=headers)
    return Response(file.content, media_type=file.media_type, headers=headers)


@router.head("/")
@router.get("/")
async def index(request: Request) -> Response:
    """The page."""
    return _respond(request, INDEX if request.app.openapi_url else INDEX_WITHOUT_DOCS)


@router.head("/web/{name}")
@router.get("/web/{name}")
async def file(request: Request, name: str) -> Response:
    """What the page is made of."""
    if name not in FILES:
        raise errors.NotFound(f"the page has no file {name}")
    return _respond(request, FILES[name])
