"""POST /verify: whether this server draws the pixels of a PNG that says how it was made."""

from __future__ import annotations

from fastapi import APIRouter, Request

from app import errors, images, provenance
from app.access import flow_of
from app.description import problems
from app.drawing import kept_bytes
from app.engine.engine import Engine
from app.engine.engines import Engines
from app.engine.request import ModelInfo
from app.forms import form_schema, read_upload
from app.http import unless_gone
from app.provenance import CannotTell, Claim
from app.routes.common import check_ready
from app.routes.drawing import draw
from app.schemas import VerifyRequest, VerifyResponse
from ddpm_core import __version__
from ddpm_core.image_files import Pixels

router = APIRouter(tags=["images"])


@router.post(
    "/verify",
    responses=problems(408, 409, 410, 413, 415, 429, 503),
    openapi_extra={"requestBody": form_schema(VerifyRequest)},
)
async def verify(request: Request) -> VerifyResponse:
    """Draws a picture anew by what its text chunk says, and compares the pixels."""
    check_ready(request)
    state, held, flow = request.app.state, request.state.held, flow_of(request.state)
    content, _ = await read_upload(request, VerifyRequest, held)

    def read() -> tuple[str | None, list[Pixels]]:
        upload = images.Upload(content, state.settings.max_image_pixels)
        state.uploads.pixels.share(held, flow)(upload.pixels)
        return upload.facts(), upload.frames()

    try:
        text, shown = await unless_gone(request, state.uploads.work(held, flow, read))
    except images.BadImage as error:
        raise errors.Invalid.field("image", str(error)) from None
    try:
        claim = Claim.of(text)
        engine, info = _served(state.engines, claim)
        params = claim.params(info, state.settings, request.state.request_id, flow)
        scale = provenance.scale_of(shown, params, info)
        state.frames.share(held, flow)(kept_bytes(params.slots * len(params.frames), info))
        result = await unless_gone(request, draw(request, engine, params))
        found = await unless_gone(
            request, state.uploads.work(held, flow, lambda: provenance.compare(shown, result, params, info, scale))
        )
    except CannotTell as reason:
        return VerifyResponse(verdict="cannot_tell", detail=str(reason), version=__version__)
    same = not found.pixels
    return VerifyResponse(
        verdict="reproduced" if same else "different",
        detail=f"this server draws {'these' if same else 'other'} pixels from what the picture says",
        version=__version__,
        facts=provenance.told(claim),
        different_pixels=found.pixels,
        largest_difference=found.largest,
    )


def _served(engines: Engines, claim: Claim) -> tuple[Engine, ModelInfo]:
    """The engine of the weights that a picture names. Raises CannotTell."""
    sha256 = claim.images[0].sha256
    for engine in engines.by_name.values():
        if engine.info is not None and engine.info.sha256 == sha256:
            return engine, engine.info
    there = ", ".join(info.id for info in engines.infos)
    raise CannotTell(
        f"it was drawn by {claim.images[0].model}@{sha256[:12]}, which is not served here; served: {there}"
    )
