"""DELETE /requests/{id}: a client ends its own request."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app import errors
from app.access import flow_of
from app.routes.common import PROBLEM

router = APIRouter(tags=["requests"])


@router.delete(
    "/requests/{request_id}",
    status_code=204,
    response_class=Response,
    responses={404: PROBLEM},
)
async def cancel(request: Request, request_id: str) -> Response:
    """Ends one's own request in flight by its X-Request-Id: its slots are free at once, whoever waits gets 410."""
    if not request.app.state.engines.cancel(request_id, flow_of(request.state)):
        raise errors.NotFound(f"no request {request_id} is in flight")
    return Response(status_code=204)
