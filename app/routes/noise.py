"""POST /noise: the forward process on an uploaded image."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app import noising
from app.access import flow_of
from app.answers import FORMATS, NPZ, PNG
from app.description import problems
from app.forms import form_schema, read_upload
from app.http import negotiate, unless_gone
from app.routes.common import check_ready, served
from app.schemas import NoiseRequest, NoiseResponse

router = APIRouter(tags=["images"])


@router.post(
    "/noise",
    response_model=NoiseResponse,
    responses={
        200: {
            "content": {media_type: {"schema": {"type": "string", "format": "binary"}} for media_type in (PNG, NPZ)},
            "headers": {
                "X-Alpha-Bar": {"schema": {"type": "string"}, "description": "alpha_bar of each t."},
                "X-Seed": {"schema": {"type": "string"}},
            },
        },
        **problems(404, 406, 408, 413, 415, 429, 503),
    },
    openapi_extra={"requestBody": form_schema(NoiseRequest)},
)
async def noise(request: Request) -> Response:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, for one t or several (PNG: a strip)."""
    check_ready(request)
    uploads, held, flow = request.app.state.uploads, request.state.held, flow_of(request.state)
    content, fields = await read_upload(request, NoiseRequest, held)
    media_type = FORMATS[fields.response_format] if fields.response_format else negotiate(request, (*noising.FORMS,))
    _, info = served(request, fields.model)
    params = noising.to_noise_params(fields, info)

    def work() -> bytes:
        take = uploads.pixels.share(held, flow)
        return noising.noised(content, params, info, media_type, request.app.state.settings.max_image_pixels, take)

    body = await unless_gone(request, uploads.work(held, flow, work))
    headers = {
        "X-Alpha-Bar": ", ".join(map(repr, noising.alpha_bars(params, info))),
        "X-Seed": str(params.seed),
        "X-Model": info.id,
        "Vary": "Accept",
    }
    return Response(body, media_type=media_type, headers=headers)
