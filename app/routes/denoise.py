"""POST /denoise: an uploaded image noised to t, and the reverse chain from there."""

from __future__ import annotations

from contextlib import ExitStack

from fastapi import APIRouter, Request, Response

from app import noising
from app.access import flow_of
from app.description import problems
from app.drawing import to_params
from app.engine.request import Start
from app.forms import form_schema, read_upload
from app.http import unless_gone
from app.routes.common import check_ready, served
from app.routes.drawing import ACCEPTED, DRAWN, PARAMETERS, media_type_of, respond
from app.schemas import DenoiseRequest, GenerateResponse

router = APIRouter(tags=["images"])


@router.post(
    "/denoise",
    response_model=GenerateResponse,
    responses={
        200: DRAWN,
        202: ACCEPTED,
        **problems(404, 406, 408, 409, 410, 413, 415, 429, 503, 504),
    },
    openapi_extra={"requestBody": form_schema(DenoiseRequest), "parameters": PARAMETERS},
)
async def denoise(request: Request) -> Response:
    """Noises an image, fitted to the model's shape, to t, and draws it anew from there: SDEdit (Meng et al. 2021)."""
    check_ready(request)
    with ExitStack() as held:  # the upload, not while it is drawn
        start, fields = await _start(request, held)
    engine, info = served(request, fields.model)
    params = to_params(
        fields, info, request.app.state.settings, request.state.request_id, flow_of(request.state), start
    )  # fmt: skip
    return await respond(request, engine, info, params, media_type_of(request, fields), fields.scale)


async def _start(request: Request, held: ExitStack) -> tuple[Start, DenoiseRequest]:
    """Where the chain starts, and the other fields."""
    uploads, settings, flow = request.app.state.uploads, request.app.state.settings, flow_of(request.state)
    content, fields = await read_upload(request, DenoiseRequest, held)
    media_type_of(request, fields)  # before the work
    _, info = served(request, fields.model)

    def work() -> Start:
        return noising.start(content, fields, info, settings.max_image_pixels, uploads.pixels.share(held, flow))

    return await unless_gone(request, uploads.work(held, flow, work)), fields
