"""What every route that draws shares: the engine's answer awaited, encoded and sent in the form that was asked for."""

from __future__ import annotations

import asyncio
import hashlib
import io
import math
import time
import zipfile
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import contextmanager

from fastapi import Request, Response
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import State

from app import errors, images
from app.access import flow_of
from app.engine import request as engine_request
from app.engine.engine import Engine
from app.engine.job import OnProgress
from app.engine.request import GenerateParams, ModelInfo, Result, Start
from app.http import negotiate, unless_gone
from app.routes.common import FORMATS, JSON, PNG, REQUEST_ID, b64, random_seed, unavailable
from app.routes.events import EVENTS, event_stream
from app.schemas import GeneratedImage, GenerateRequest, GenerateResponse
from app.settings import Settings
from ddpm_core import __version__, samplers

ZIP = "application/zip"
SHORT_PLAN = 100  # steps of which any sampler's plan is computed in some milliseconds
OFFERED = (EVENTS, ZIP, JSON, PNG)  # of equals the last is sent

DRAWN = {
    "content": {media_type: {} for media_type in OFFERED},
    "headers": {
        **REQUEST_ID,
        "X-Seed": {"schema": {"type": "string"}, "description": "Of the first image."},
        "X-Model": {"schema": {"type": "string"}, "description": "name@first 12 of the weights' sha256."},
    },
    "links": {
        "cancel": {
            "operationId": "cancel",
            "parameters": {"request_id": "$response.header.X-Request-Id"},
            "description": "Ends the request while it is in flight.",
        },
        "image": {
            "operationId": "image",
            "parameters": {
                "model": "$response.body#/model",
                "sampler": "$response.body#/sampler",
                "steps": "$response.body#/steps",
                "label": "$response.body#/images/0/label",
                "seed": "$response.body#/images/0/seed",
            },
            "description": "The same pixels for good, where guidance_scale and eta are given again.",
        },
    },
}
"""A 200, for OpenAPI."""


def to_params(
    body: GenerateRequest, info: ModelInfo, settings: Settings, state: State, start: Start | None = None
) -> GenerateParams:
    """Checks fields against the loaded model and fills in what they left open. Raises Invalid.

    Args:
        body: the fields.
        info: of the loaded model.
        settings: its limits.
        state: of the HTTP request: its id, and whose share of the engine it uses.
        start: where the chain starts; None: pure noise.
    """
    if body.n > settings.max_images:
        raise errors.Invalid.field("n", f"{body.n} is over the limit of {settings.max_images} images a request")
    _, height, width = info.image_shape
    if (pixels := body.n * height * width * body.scale**2) > settings.max_image_pixels:
        raise errors.Invalid.field(
            "scale", f"{pixels:,} pixels of all images are over the limit of {settings.max_image_pixels:,}"
        )
    labels = tuple(body.label) if isinstance(body.label, list) else (body.label,) * body.n
    for label in labels:
        if (not info.unlabelled) if label is None else label >= info.num_classes:
            raise errors.Invalid.field("label", f"{'null' if label is None else label} is not a label of {info.labels}")
    if body.guidance_scale != 1 and not info.guidance:
        raise errors.Invalid.field(
            "guidance_scale", f"must be 1: {info.name} does not draw both with a label and without, as guidance does"
        )
    try:
        most = info.num_train_steps if start is None else start.t + 1
        sampler, steps = samplers.resolve(
            body.sampler, body.steps, most, info.learned,
            eta=body.eta, distilled_steps=info.distilled_steps, from_noise=start is None,
        )  # fmt: skip
    except ValueError as error:
        raise _of_plan(error) from None
    seed = random_seed(body.n) if body.seed is None else body.seed
    return GenerateParams(
        state.request_id, tuple(range(seed, seed + body.n)), labels, sampler, steps, body.eta + 0.0,
        body.guidance_scale, start=start, previews=body.previews or 0,
        deadline_s=None if body.deadline_ms is None else body.deadline_ms / 1000, flow=flow_of(state),
    )  # fmt: skip


def submit(engine: Engine, params: GenerateParams, on_progress: OnProgress | None = None) -> Future[Result]:
    """Hands a request to the engine; its refusals become problems."""
    with _refusals_told(params):
        return engine.submit(params, on_progress)


@contextmanager
def _refusals_told(params: GenerateParams) -> Iterator[None]:
    try:
        yield
    except engine_request.EngineError as error:
        raise to_problem(error, params) from None
    except ValueError as error:  # of the plan: this model's timesteps do not allow what the sampler does elsewhere
        raise _of_plan(error) from None


def _of_plan(error: ValueError) -> errors.Invalid:
    """What is wrong with a plan, at its field: the message begins with it, or it is about the steps."""
    field, _, rest = str(error).partition("=")
    return (
        errors.Invalid.field(field, rest)
        if field in ("sampler", "steps", "eta")
        else errors.Invalid.field("steps", str(error))
    )


def to_problem(error: BaseException, params: GenerateParams) -> errors.Problem:
    """What the engine's errors are over HTTP."""
    match error:
        case engine_request.EngineBusy():
            return errors.QueueFull(
                f"{error}: try again later or ask for fewer images", headers={"Retry-After": str(error.retry_after_s)}
            )
        case engine_request.DeadlineTooSoon():
            deadline_s = params.deadline_s or 0.0
            if error.alone_s > deadline_s:
                return errors.Invalid.field("deadline_ms", f"{error}; allow more, or ask for fewer images or steps")
            return errors.DeadlineTooSoon(
                f"deadline_ms cannot be met: {error}; try again later, or allow more",
                headers={"Retry-After": str(max(1, math.ceil(error.needed_s - deadline_s)))},
            )
        case engine_request.DeadlinePassed():
            return errors.DeadlinePassed("deadline_ms passed before the images were done: allow more, or ask for less")
        case engine_request.DuplicateRequest():
            return errors.InFlight(f"a request with X-Request-Id {params.request_id} is in flight; use another id")
        case engine_request.Cancelled():
            return errors.Cancelled("the request was ended by DELETE /requests/{id}")
        case engine_request.EngineNotReady():
            return unavailable(str(error))
        case engine_request.EngineError():
            return errors.Problem(f"{error}; the server's log has more by request id")
    raise error


async def prepare(request: Request, engine: Engine, params: GenerateParams) -> None:
    """Computes a long plan where nobody waits for it: neither the event loop nor the engine's steps."""
    if request.app.state.engines.holds(params.key):  # another model's engine might
        engine.metrics.refused.labels("duplicate_id").inc()
        raise to_problem(engine_request.DuplicateRequest(), params)
    if params.steps > SHORT_PLAN:
        with _refusals_told(params):
            await run_in_threadpool(engine.prepare_plan, params)


async def draw(request: Request, engine: Engine, params: GenerateParams) -> Result:
    """The engine's answer. Whoever stops waiting ends the request."""
    await prepare(request, engine, params)
    future = submit(engine, params)
    try:
        return await asyncio.wrap_future(future)
    except engine_request.EngineError as error:
        raise to_problem(error, params) from None
    finally:
        if not future.done():
            engine.cancel(params.request_id, params.flow)


def facts(params: GenerateParams, info: ModelInfo) -> list[dict[str, object]]:
    """What determines the pixels of each image, and nothing else."""
    shared: dict[str, object] = {
        "version": __version__, "model": info.name, "sha256": info.sha256, "sampler": params.sampler,
        "steps": params.steps, "eta": params.eta,
    }  # fmt: skip
    if params.sampler == samplers.LEARNED:
        shared["plan_sha256"] = info.learned[params.steps]
    if params.start is not None:
        shared |= {"t": params.start.t, "pixels_sha256": hashlib.sha256(params.start.pixels.tobytes()).hexdigest()}
    return [
        {**shared, "seed": seed, "label": label, "guidance_scale": params.guidance_scale if params.guided(i) else 1.0}
        for i, (seed, label) in enumerate(zip(params.seeds, params.labels, strict=True))
    ]


def encode_each(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> list[bytes]:
    """One PNG an image; its text chunk holds the image's facts."""
    return [
        images.encode_png(image, of_image, scale=scale)
        for image, of_image in zip(result.images, facts(params, info), strict=True)
    ]


def encode_sheet(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> bytes:
    """One PNG of all images; of several a grid, whose text chunk lists the facts of each."""
    if params.slots == 1:
        return encode_each(result, params, info, scale)[0]
    sheet = images.grid(list(result.images), columns=math.ceil(math.sqrt(params.slots)))
    return images.encode_png(sheet, {"images": facts(params, info)}, scale=scale)


def encode_zip(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> bytes:
    """One PNG an image, named by its place and seed; the same images give the same bytes."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for i, png in enumerate(encode_each(result, params, info, scale)):
            archive.writestr(zipfile.ZipInfo(f"{i:04}-seed-{params.seeds[i]}.png"), png)
    return buffer.getvalue()


def encode_json(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> bytes:
    """The images in JSON, each with its seed and label."""
    answer = GenerateResponse(
        created=int(time.time()),
        model=info.id,
        sampler=params.sampler,
        steps=params.steps,
        images=[
            GeneratedImage(b64_json=b64(png), seed=seed, label=label)
            for png, seed, label in zip(
                encode_each(result, params, info, scale), params.seeds, params.labels, strict=True
            )
        ],
    )
    return answer.model_dump_json().encode()


ENCODERS = {PNG: encode_sheet, ZIP: encode_zip, JSON: encode_json}


def media_type_of(request: Request, body: GenerateRequest) -> str:
    """What the client wants. Raises NotAcceptable, or Invalid where its fields do not go with that."""
    media_type = FORMATS[body.response_format] if body.response_format else negotiate(request, OFFERED)
    if body.previews and media_type != EVENTS:
        raise errors.Invalid.field("previews", f"needs Accept: {EVENTS}, and no response_format")
    return media_type


async def respond(
    request: Request, engine: Engine, info: ModelInfo, params: GenerateParams, media_type: str, scale: int
) -> Response:
    """Draws and answers in one of OFFERED."""
    headers = {"X-Seed": str(params.seeds[0]), "X-Model": info.id, "Vary": "Accept"}
    if media_type == EVENTS:
        await prepare(request, engine, params)

        def completed(result: Result) -> bytes:
            return encode_json(result, params, info, scale)

        return event_stream(
            request,
            lambda tell: submit(engine, params, tell),
            lambda: engine.cancel(params.request_id, params.flow),
            completed,
            lambda error: to_problem(error, params),
            scale,
            headers,
        )
    result = await unless_gone(request, draw(request, engine, params))
    start = time.monotonic()
    content = await run_in_threadpool(ENCODERS[media_type], result, params, info, scale)
    timing = {"queue": result.queue_s, "denoise": result.denoise_s, "encode": time.monotonic() - start}
    headers["Server-Timing"] = ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in timing.items())
    return Response(content, media_type=media_type, headers=headers)
