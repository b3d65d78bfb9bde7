"""POST /noise: the forward process on an uploaded image."""

from __future__ import annotations

import io
import time

import numpy as np
from fastapi import APIRouter, Request, Response

from app import errors, forward, images
from app.access import flow_of
from app.answers import FORMATS, JSON, NPZ, PNG, b64
from app.description import problems
from app.drawing import random_seed
from app.engine.request import ModelInfo
from app.forms import form_schema, read_upload
from app.http import negotiate, unless_gone
from app.routes.common import check_ready, served
from app.schemas import NoisedImage, NoiseRequest, NoiseResponse
from ddpm_core import __version__

router = APIRouter(tags=["images"])

MAX_T = 32


def _timesteps(text: str, info: ModelInfo) -> list[int]:
    t = [int(part) for part in text.split(",")]
    if len(t) > MAX_T:
        raise errors.Invalid.field("t", f"{len(t)} timesteps are over the limit of {MAX_T}")
    for value in t:
        if value >= info.num_train_steps:
            raise errors.Invalid.field("t", f"{value} must be 0 .. {info.num_train_steps - 1}")
    return t


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
    settings = request.app.state.settings
    uploads, held, flow = request.app.state.uploads, request.state.held, flow_of(request.state)
    content, fields = await read_upload(request, NoiseRequest, held)
    media_type = FORMATS[fields.response_format] if fields.response_format else negotiate(request, (JSON, NPZ, PNG))
    _, info = served(request, fields.model)
    t = _timesteps(fields.t, info)
    seed = random_seed() if fields.seed is None else fields.seed
    alpha_bars = info.alphas_cumprod[t]

    def work() -> bytes:
        fit = info.image_shape if fields.fit == "model" else None
        copies = len(t) if fit is None else 1  # one of the image's own size for each t
        upload = images.Upload(content, settings.max_image_pixels // copies)
        uploads.pixels.share(held, flow)(copies * upload.pixels)
        pixels = upload.decode(fit)
        noised = forward.noise_image(pixels, alpha_bars, seed)
        if media_type == NPZ:
            buffer = io.BytesIO()
            np.savez(buffer, x_t=noised.x_t, eps=noised.eps, t=np.array(t), alpha_bar=alpha_bars)
            return buffer.getvalue()
        facts = {"version": __version__, "model": info.name, "sha256": info.sha256, "seed": seed}
        if media_type == PNG:
            strip = images.grid(list(noised.images), columns=len(t))
            return images.encode_png(strip, {**facts, "t": t})
        answer = NoiseResponse(
            created=int(time.time()),
            model=info.id,
            images=[
                NoisedImage(
                    b64_json=b64(images.encode_png(image, {**facts, "t": step})),
                    seed=seed, t=step, alpha_bar=float(abar), snr=float(abar / (1 - abar)),
                )
                for image, step, abar in zip(noised.images, t, alpha_bars, strict=True)
            ],
        )  # fmt: skip
        return answer.model_dump_json().encode()

    try:
        body = await unless_gone(request, uploads.work(held, flow, work))
    except images.BadImage as error:
        shared = isinstance(error, images.TooManyPixels) and fields.fit == "none" and len(t) > 1
        hint = f", ask for fewer than {len(t)} t, or fit=model" if shared else ""
        raise errors.Invalid.field("image", f"{error}{hint}") from None
    headers = {
        "X-Alpha-Bar": ", ".join(repr(float(abar)) for abar in alpha_bars),
        "X-Seed": str(seed),
        "X-Model": info.id,
        "Vary": "Accept",
    }
    return Response(body, media_type=media_type, headers=headers)
