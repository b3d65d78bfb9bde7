"""POST /denoise: an uploaded image noised to t, and the reverse chain from there."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from app import errors, images
from app.engine.request import Start
from app.forms import form_schema, read_upload
from app.routes.common import PROBLEM, loaded_model
from app.routes.drawing import OFFERED, media_type_of, respond, to_params
from app.schemas import DenoiseRequest, GenerateResponse

router = APIRouter(tags=["images"])


@router.post(
    "/denoise",
    response_model=GenerateResponse,
    responses={
        200: {"content": {media_type: {} for media_type in OFFERED}},
        **dict.fromkeys((406, 409, 410, 413, 415, 422, 429, 503, 504), PROBLEM),
    },
    openapi_extra={"requestBody": form_schema(DenoiseRequest)},
)
async def denoise(request: Request) -> Response:
    """Noises an image, fitted to the model's shape, to t, and draws it anew from there: SDEdit (Meng et al. 2021)."""
    info = loaded_model(request)
    settings = request.app.state.settings
    content, fields = await read_upload(request, DenoiseRequest)
    media_type = media_type_of(request, fields)
    if fields.t >= info.num_train_steps:
        raise errors.Invalid.field("t", f"{fields.t} must be 0 .. {info.num_train_steps - 1}")

    def fitted() -> Start:
        pixels = images.decode(content, max_pixels=settings.max_image_pixels, fit=info.image_shape)
        return Start(pixels, fields.t)

    try:
        start = await run_in_threadpool(fitted)
    except images.BadImage as error:
        raise errors.Invalid.field("image", str(error)) from None
    params = to_params(fields, info, settings, request.state.request_id, start)
    return await respond(request, info, params, media_type, fields.scale)
