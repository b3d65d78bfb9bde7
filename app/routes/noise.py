"""POST /noise: the forward process on an uploaded image."""

from __future__ import annotations

import io
import time
from typing import Annotated, Literal

import numpy as np
from fastapi import APIRouter, Request, Response
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import FormData, UploadFile

from app import errors, forward, images
from app.engine.request import ModelInfo
from app.http import negotiate, read_form
from app.routes.common import FORMATS, JSON, PNG, PROBLEM, b64, loaded_model, random_seed
from app.schemas import NoisedImage, NoiseResponse
from ddpm_core import __version__
from ddpm_core.noise import MAX_SEED

router = APIRouter(tags=["images"])

NPZ = "application/x-npz"
MAX_T = 32


class NoiseFields(BaseModel):
    """The form's text fields."""

    model_config = ConfigDict(extra="forbid")

    t: Annotated[str, Field(pattern=r"^\s*\d{1,9}\s*(,\s*\d{1,9}\s*)*$", description="0 .. T-1, or several: 0,250,999")]
    seed: Annotated[int | None, Field(ge=0, le=MAX_SEED)] = None
    fit: Literal["none", "model"] = "none"
    response_format: Literal["png", "b64_json"] | None = None


FORM_SCHEMA = NoiseFields.model_json_schema()
FORM_SCHEMA["properties"] = {
    "image": {"type": "string", "format": "binary", "description": "PNG, JPEG, WebP, GIF or BMP."},
    **FORM_SCHEMA["properties"],
}
FORM_SCHEMA["required"] = ["image", "t"]


def _fields(form: FormData) -> tuple[UploadFile, NoiseFields]:
    """The form's parts, each allowed once. Raises Invalid."""
    for name in form:
        if len(form.getlist(name)) > 1:
            raise errors.Invalid.field(name, "given more than once")
    upload = form.get("image")
    if not isinstance(upload, UploadFile):
        raise errors.Invalid.field("image", "a file is required: -F image=@digit.png")
    text = {name: value for name, value in form.items() if name != "image"}
    for name, value in text.items():
        if isinstance(value, UploadFile):
            raise errors.Invalid.field(name, "must be a text field, not a file")
    try:
        return upload, NoiseFields.model_validate(text)
    except ValidationError as error:
        known = ", ".join(["image", *NoiseFields.model_fields])
        found = [
            {
                "field": ".".join(map(str, e["loc"])),
                "detail": {
                    "extra_forbidden": f"unknown field; known: {known}",
                    "string_pattern_mismatch": "must be one timestep or several, comma-separated: 0,250,999",
                }.get(e["type"], e["msg"]),
            }
            for e in error.errors(include_url=False, include_context=False)
        ]
        raise errors.Invalid.fields(found) from None


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
        200: {"content": {PNG: {}, NPZ: {}}},
        **dict.fromkeys((406, 413, 415, 422, 503), PROBLEM),
    },
    openapi_extra={"requestBody": {"required": True, "content": {"multipart/form-data": {"schema": FORM_SCHEMA}}}},
)
async def noise(request: Request) -> Response:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, for one t or several (PNG: a strip)."""
    info = loaded_model(request)
    settings = request.app.state.settings
    form = await read_form(request, settings.max_body_bytes)
    try:
        upload, fields = _fields(form)
        content = await upload.read()
    finally:
        await form.close()
    media_type = FORMATS[fields.response_format] if fields.response_format else negotiate(request, (JSON, NPZ, PNG))
    t = _timesteps(fields.t, info)
    seed = random_seed() if fields.seed is None else fields.seed
    alpha_bars = info.alphas_cumprod[t]

    def work() -> bytes:
        fit = info.image_shape if fields.fit == "model" else None
        copies = len(t) if fit is None else 1  # one of the image's own size for each t
        pixels = images.decode(content, max_pixels=settings.max_image_pixels // copies, fit=fit)
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
        body = await run_in_threadpool(work)
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
