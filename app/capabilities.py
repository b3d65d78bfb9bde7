"""What may be asked for: models, their samplers, the limits of a deployment. No HTTP."""

from __future__ import annotations

from app.engine.request import ModelInfo
from app.schemas import MOST_SCALE
from app.schemas_service import Limits, ModelCapabilities, SamplerCapabilities
from app.settings import Settings
from ddpm_core import samplers


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


def of_model(info: ModelInfo) -> ModelCapabilities:
    """What may be asked of a model."""
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


def limits(settings: Settings) -> Limits:
    """Of every request."""
    return Limits(
        n=settings.max_images,
        image_pixels=settings.max_image_pixels,
        json_bytes=settings.max_json_bytes,
        body_bytes=settings.max_body_bytes,
        queue_slots=settings.queue_slots,
        scale=MOST_SCALE,
    )
