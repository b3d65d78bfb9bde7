"""POST /generate: the reverse chain from pure noise."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.access import flow_of
from app.description import json_body, problems
from app.drawing import to_params
from app.http import read_json
from app.routes.common import check_ready, served
from app.routes.drawing import ACCEPTED, DRAWN, PARAMETERS, media_type_of, respond
from app.schemas import GenerateRequest, GenerateResponse, parse

router = APIRouter(tags=["images"])


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={
        200: DRAWN,
        202: ACCEPTED,
        **problems(404, 406, 408, 409, 410, 413, 415, 429, 503, 504),
    },
    openapi_extra={
        **json_body(GenerateRequest, {"label": 7, "seed": 1, "scale": 8}, required=False),
        "parameters": PARAMETERS,
    },
)
async def generate(request: Request) -> Response:
    """Draws images. PNG (n > 1: one grid), JSON, ZIP or an event stream, as Accept or response_format says."""
    check_ready(request)
    settings = request.app.state.settings
    body = parse(await read_json(request, settings.max_json_bytes), GenerateRequest)
    media_type = media_type_of(request, body)
    engine, info = served(request, body.model)
    params = to_params(body, info, settings, request.state.request_id, flow_of(request.state))
    return await respond(request, engine, info, params, media_type, body.scale)
