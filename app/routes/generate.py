"""POST /generate: the reverse chain."""

from __future__ import annotations

import asyncio
import math
import time

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from app import errors, images
from app.engine import request as engine_request
from app.engine.engine import Engine
from app.engine.request import GenerateParams, ModelInfo, Result
from app.http import negotiate, read_json
from app.routes.common import FORMATS, JSON, PNG, PROBLEM, b64, loaded_model, random_seed, unavailable
from app.schemas import GeneratedImage, GenerateRequest, GenerateResponse, parse
from ddpm_core import __version__, plans

router = APIRouter(tags=["images"])


def to_params(body: GenerateRequest, info: ModelInfo, request_id: str) -> GenerateParams:
    """Checks a body against the loaded model and fills in what it left open. Raises Invalid."""
    labels = tuple(body.label) if isinstance(body.label, list) else (body.label,) * body.n
    for label in labels:
        if label is not None and label >= info.num_classes:
            allowed = f"0 .. {info.num_classes - 1}" if info.num_classes else "none: this model is unconditional"
            raise errors.Invalid.field("label", f"{label} is not a label of {info.name}; allowed: {allowed}, or null")
    try:
        sampler, steps = plans.resolve(body.sampler, body.steps, info.num_train_steps)
    except ValueError as error:
        raise errors.Invalid.field("steps", str(error).removeprefix("steps=")) from None
    seed = random_seed(body.n) if body.seed is None else body.seed
    return GenerateParams(
        request_id, tuple(range(seed, seed + body.n)), labels, sampler, steps, body.eta, body.guidance_scale
    )  # fmt: skip


async def submit(engine: Engine, params: GenerateParams) -> Result:
    """Runs a request on the engine; its refusals become problems."""
    try:
        return await asyncio.wrap_future(engine.submit(params))
    except engine_request.EngineBusy as error:
        raise errors.QueueFull(
            f"{error}, and this request asks for {params.slots}: try again later or ask for fewer images",
            headers={"Retry-After": str(error.retry_after_s)},
        ) from None
    except engine_request.DuplicateRequest:
        raise errors.InFlight(f"a request with X-Request-Id {params.request_id} is in flight; use another id") from None
    except engine_request.EngineNotReady as error:
        raise unavailable(str(error)) from None
    except engine_request.EngineError as error:
        raise errors.Problem(f"{error}; the server's log has more by request id") from None


def encode(result: Result, params: GenerateParams, info: ModelInfo, scale: int, *, as_grid: bool) -> list[bytes]:
    """One PNG for all, or one for each image; each holds in its text chunk what determines its pixels."""
    shared = {
        "version": __version__, "model": info.name, "sha256": info.sha256, "sampler": params.sampler,
        "steps": params.steps, "eta": params.eta, "guidance_scale": params.guidance_scale,
    }  # fmt: skip
    unguided = {**shared, "guidance_scale": 1.0}  # as an image without a label is, whatever its neighbours are
    if as_grid and params.slots > 1:
        sheet = images.grid(list(result.images), columns=math.ceil(math.sqrt(params.slots)))
        return [images.encode_png(sheet, {**shared, "seeds": params.seeds, "labels": params.labels}, scale=scale)]
    return [
        images.encode_png(image, {**(unguided if label is None else shared), "seed": seed, "label": label}, scale=scale)
        for image, seed, label in zip(result.images, params.seeds, params.labels, strict=True)
    ]


@router.post(
    "/generate",
    response_model=GenerateResponse,
    responses={200: {"content": {PNG: {}}}, **dict.fromkeys((406, 409, 413, 415, 422, 429, 503), PROBLEM)},
    openapi_extra={
        "requestBody": {
            "content": {JSON: {"schema": GenerateRequest.model_json_schema(), "example": {"label": 7, "seed": 1}}}
        }
    },
)
async def generate(request: Request) -> Response:
    """Draws images. PNG (n > 1: one grid) or JSON, as Accept or response_format says."""
    info = loaded_model(request)
    settings = request.app.state.settings
    body = parse(await read_json(request, settings.max_json_bytes), GenerateRequest)
    if body.n > settings.max_images:
        raise errors.Invalid.field("n", f"{body.n} is over the limit of {settings.max_images} images a request")
    media_type = FORMATS[body.response_format] if body.response_format else negotiate(request, (JSON, PNG))
    params = to_params(body, info, request.state.request_id)
    result = await submit(request.app.state.engine, params)

    start = time.monotonic()
    pngs = await run_in_threadpool(encode, result, params, info, body.scale, as_grid=media_type == PNG)
    encode_s = time.monotonic() - start
    timing = {"queue": result.queue_s, "denoise": result.denoise_s, "encode": encode_s}
    headers = {
        "X-Seed": str(params.seeds[0]),
        "X-Model": info.id,
        "Vary": "Accept",
        "Server-Timing": ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in timing.items()),
    }
    if media_type == PNG:
        return Response(pngs[0], media_type=PNG, headers=headers)
    answer = GenerateResponse(
        created=int(time.time()),
        model=info.id,
        sampler=params.sampler,
        steps=params.steps,
        images=[
            GeneratedImage(b64_json=b64(png), seed=seed, label=label)
            for png, seed, label in zip(pngs, params.seeds, params.labels, strict=True)
        ],
    )
    return Response(answer.model_dump_json(), media_type=JSON, headers=headers)
