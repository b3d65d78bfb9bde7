"""GET /capabilities: what may be asked for here."""

from __future__ import annotations

from fastapi import APIRouter, Request

from app.description import problems
from app.engine.engines import Engines
from app.engine.request import ModelInfo
from app.routes.common import check_ready
from app.schemas import Capabilities, GenerateRequest, Limits, ModelCapabilities, SamplerCapabilities
from app.settings import Settings
from ddpm_core import __version__, samplers

router = APIRouter(tags=["models"])


def _samplers(info: ModelInfo) -> list[SamplerCapabilities]:
    """Every name that `sampler` may have for this model, and what stands behind it where nothing else is asked."""
    found = []
    for name in (*samplers.SAMPLERS, samplers.LEARNED, *samplers.PRESETS):
        try:
            sampler, steps = samplers.resolve(
                name, None, info.num_train_steps, info.learned, distilled_steps=info.distilled_steps
            )
        except ValueError:  # there is no such one
            continue
        only = [steps] if info.distilled_steps else sorted(info.learned) if name == samplers.LEARNED else None
        found.append(
            SamplerCapabilities(
                name=name, preset=name in samplers.PRESETS, sampler=sampler, steps=steps, steps_allowed=only
            )
        )
    return found


def _model(info: ModelInfo) -> ModelCapabilities:
    return ModelCapabilities(
        name=info.name,
        id=info.id,
        sha256=info.sha256,
        image_shape=list(info.image_shape),
        num_train_steps=info.num_train_steps,
        num_classes=info.num_classes,
        class_names=list(info.class_names),
        unlabelled=info.unlabelled,
        guidance=info.guidance,
        denoise=info.distilled_steps is None,
        samplers=_samplers(info),
    )


def _limits(settings: Settings) -> Limits:
    return Limits(
        n=settings.max_images,
        image_pixels=settings.max_image_pixels,
        json_bytes=settings.max_json_bytes,
        body_bytes=settings.max_body_bytes,
        queue_slots=settings.queue_slots,
        scale=next(m.le for m in GenerateRequest.model_fields["scale"].metadata if hasattr(m, "le")),
    )


@router.get("/capabilities", responses=problems(503))
async def capabilities(request: Request) -> Capabilities:
    """The models, the samplers of each, and the limits of this deployment."""
    check_ready(request)
    engines: Engines = request.app.state.engines
    return Capabilities(
        version=__version__,
        models=[_model(info) for info in engines.infos],
        limits=_limits(request.app.state.settings),
    )
