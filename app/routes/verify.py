"""POST /verify: whether this server draws the pixels of a PNG that says how it was made."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeVar

from fastapi import APIRouter, Request

from app import answers, errors, images, provenance
from app.access import flow_of
from app.description import problems
from app.drawing import kept_bytes
from app.engine.engines import Engines, Served
from app.engine.request import ModelInfo
from app.forms import form_schema, read_upload
from app.http import unless_gone
from app.provenance import CannotTell, Claim, Difference
from app.routes.common import check_ready
from app.routes.drawing import draw
from app.schemas import VerifyRequest, VerifyResponse
from ddpm_core import __version__

T = TypeVar("T")

router = APIRouter(tags=["images"])


@router.post(
    "/verify",
    responses=problems(408, 409, 410, 413, 415, 429, 503),
    openapi_extra={"requestBody": form_schema(VerifyRequest, "PNG")},
)
async def verify(request: Request) -> VerifyResponse:
    """Draws a picture anew by what its text chunk says, and compares the pixels."""
    check_ready(request)
    state, held, flow = request.app.state, request.state.held, flow_of(request.state)
    content, _ = await read_upload(request, VerifyRequest, held)
    try:
        upload = await _work(request, lambda: _opened(content, state.settings.max_image_pixels))
        claim = Claim.of(upload.facts())
        engine, info = _served(state.engines, claim)
        params = claim.params(info, state.settings, request.state.request_id, flow)
        scale = provenance.scale_of(upload, params, info)
        state.frames.share(held, flow)(kept_bytes(params.slots * len(params.frames), info))
        result = await unless_gone(request, draw(request, engine, params))

        def compared() -> Difference:
            state.uploads.pixels.share(held, flow)(upload.pixels)
            return provenance.compare(upload, result, params, scale)

        found = await _work(request, compared)
    except images.BadImage as error:
        raise errors.Invalid.field("image", str(error)) from None
    except CannotTell as reason:
        return VerifyResponse(verdict="cannot_tell", detail=str(reason), version=__version__)
    same = not found.pixels
    return VerifyResponse(
        verdict="reproduced" if same else "different",
        detail=f"this server draws {'these' if same else 'other'} pixels from what the picture says",
        version=__version__,
        facts=answers.facts(params, info),
        different_pixels=found.pixels,
        largest_difference=found.largest,
    )


def _opened(content: bytes, max_pixels: int) -> images.Upload:
    return images.Upload(content, max_pixels, ("PNG",), all_frames=True)


async def _work(request: Request, work: Callable[[], T]) -> T:
    """In a thread, as long as the client waits. Each has its own place among the uploads."""
    with ExitStack() as place:
        return await unless_gone(
            request, request.app.state.uploads.work(place, flow_of(request.state), work)
        )  # fmt: skip


def _served(engines: Engines, claim: Claim) -> tuple[Served, ModelInfo]:
    """The engine of the weights that a picture names. Raises CannotTell."""
    sha256 = claim.images[0].sha256
    for engine in engines.by_name.values():
        if engine.info is not None and engine.info.sha256 == sha256:
            return engine, engine.info
    there = ", ".join(info.id for info in engines.infos)
    raise CannotTell(f"it was drawn by the weights {sha256[:12]}, which are not served here; served: {there}")
