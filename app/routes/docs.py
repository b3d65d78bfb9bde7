"""GET /docs: the API described, as a page that can be tried out."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from fastapi.openapi.docs import get_swagger_ui_html

router = APIRouter(include_in_schema=False)

# The one page that wants scripts: Swagger UI, from where FastAPI takes it.
POLICY = (
    "default-src 'none'; script-src 'unsafe-inline' https://cdn.jsdelivr.net; style-src 'unsafe-inline' "
    "https://cdn.jsdelivr.net; img-src data: blob: https://fastapi.tiangolo.com; connect-src 'self'; "
    "frame-ancestors 'none'"
)


@router.get("/docs")
async def docs(request: Request) -> Response:
    """Swagger UI of /openapi.json."""
    page = get_swagger_ui_html(openapi_url="openapi.json", title=request.app.title)
    page.headers["Content-Security-Policy"] = POLICY
    return page
