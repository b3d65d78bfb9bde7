"""OpenAI's Images and Models, for clients that speak them: POST /v1/images/generations, GET /v1/models."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping
from typing import Any
from urllib.parse import urlencode

from fastapi import APIRouter, Request, Response
from starlette.concurrency import run_in_threadpool

from app import answers, errors, images
from app.access import flow_of
from app.answers import JSON, b64
from app.description import json_body, problems
from app.drawing import to_params
from app.engine.engines import Engines
from app.engine.request import GenerateParams, ModelInfo, Progress, Result
from app.http import base_url, read_json, unless_gone
from app.prompts import label_of
from app.routes.common import check_ready, served
from app.routes.drawing import draw, stream
from app.routes.events import EVENTS, event
from app.schemas import MOST_SCALE, GenerateRequest, ProblemBody, Sampling, parse, parse_fields
from app.schemas_openai import (
    CompletedImage,
    ImagesRequest,
    ImagesResponse,
    OpenAIImage,
    OpenAIModel,
    OpenAIModels,
    PartialImage,
)

router = APIRouter(prefix="/v1", tags=["openai"])


def _scale(size: str | None, info: ModelInfo) -> int:
    """How many times larger than its own a model's images are to be. Raises Invalid."""
    _, height, width = info.image_shape
    sizes = [f"{width * scale}x{height * scale}" for scale in range(1, MOST_SCALE + 1)]
    if size in (None, "auto"):
        return 1
    if size not in sizes:
        raise errors.Invalid.field("size", f"{size} must be auto or one of {', '.join(sizes)}")
    return sizes.index(size) + 1


def _size(info: ModelInfo, scale: int) -> str:
    return f"{info.image_shape[2] * scale}x{info.image_shape[1] * scale}"


def _url(base: str, params: GenerateParams, info: ModelInfo, index: int, scale: int) -> str:
    """Where one image is for good."""
    label = params.labels[index]
    query = {"scale": scale, "eta": params.eta, "guidance_scale": params.guidance_scale}
    defaults = {"scale": 1, "eta": 0.0, "guidance_scale": 1.0}
    given = urlencode({name: value for name, value in query.items() if value != defaults[name]})
    what = f"{params.sampler}-{params.steps}/{'none' if label is None else label}/{params.seeds[index]}.png"
    return f"{base}/images/{info.id}/{what}{f'?{given}' if given else ''}"


@dataclasses.dataclass(frozen=True)
class _Events:
    """`image_generation.partial_image` some times, then `image_generation.completed`."""

    params: GenerateParams
    info: ModelInfo
    scale: int
    partial_images: int

    def progress(self, progress: Progress) -> bytes:
        index = progress.step // self.params.previews - 1 if self.params.previews else 0
        if not progress.previews or index >= self.partial_images:
            return b""
        png = images.encode_png(progress.previews[0][1], {}, scale=self.scale)
        return _event(PartialImage(partial_image_index=index, **self._shared(png)))

    def completed(self, result: Result) -> bytes:
        png = answers.sheet(result, self.params, self.info, self.scale)
        return _event(CompletedImage(**self._shared(png)))

    def failed(self, problem: errors.Problem) -> bytes:
        return event("error", ProblemBody(**problem.body(self.params.request_id, "/v1")))

    def _shared(self, png: bytes) -> dict[str, Any]:
        return {"b64_json": b64(png), "created_at": int(time.time()), "size": _size(self.info, self.scale)}


def _event(data: PartialImage | CompletedImage) -> bytes:
    return event(data.type, data)


@router.post(
    "/images/generations",
    response_model=ImagesResponse,
    responses={
        200: {"content": {EVENTS: {}}},
        **problems(404, 408, 409, 410, 413, 415, 429, 503, 504),
    },
    openapi_extra=json_body(ImagesRequest, {"prompt": "a handwritten seven", "size": "224x224"}),
)
async def images_generations(request: Request) -> Response:
    """Draws what a prompt names, in the shape of OpenAI's Images."""
    check_ready(request)
    settings = request.app.state.settings
    body = parse(await read_json(request, settings.max_json_bytes), ImagesRequest)
    engine, info = served(request, body.model)
    n, scale, label = body.n or 1, _scale(body.size, info), label_of(body.prompt, info)
    partial_images = body.partial_images or 0
    if body.partial_images is not None and not body.stream:
        raise errors.Invalid.field("partial_images", "needs stream: true")
    if body.stream and n > 1:
        raise errors.Invalid.field("n", f"{n} must be 1 with stream: true")
    if body.stream and body.response_format == "url":
        raise errors.Invalid.field("response_format", "url must be b64_json with stream: true")
    given = {name: getattr(body, name) for name in (*Sampling.model_fields, "seed") if name in body.model_fields_set}
    fields = parse_fields({**given, "n": n, "scale": scale, "label": label}, GenerateRequest)
    params = to_params(fields, info, settings, request.state.request_id, flow_of(request.state))
    headers = {"X-Seed": str(params.seeds[0]), "X-Model": info.id}
    if body.stream:
        params = dataclasses.replace(params, previews=_every(params.steps, partial_images))
        return await stream(request, engine, params, _Events(params, info, scale, partial_images), headers)
    result = await unless_gone(request, draw(request, engine, params))
    base = base_url(request) if body.response_format == "url" else None
    content = await run_in_threadpool(_answer, result, params, info, scale, base)
    return Response(content, media_type=JSON, headers=headers)


def _every(steps: int, pictures: int) -> int:
    """Every how many steps one is shown, so that so many are before the last; 0: never."""
    return max(1, steps // (pictures + 1)) if pictures else 0


def _answer(result: Result, params: GenerateParams, info: ModelInfo, scale: int, base: str | None) -> bytes:
    if base is None:
        where: list[Mapping[str, str]] = [{"b64_json": b64(png)} for png in answers.each(result, params, info, scale)]
    else:
        where = [{"url": _url(base, params, info, i, scale)} for i in range(params.slots)]
    data = [
        OpenAIImage(**one, seed=seed, revised_prompt="any" if label is None else str(label))
        for one, seed, label in zip(where, params.seeds, params.labels, strict=True)
    ]
    answer = ImagesResponse(created=int(time.time()), data=data, size=_size(info, scale))
    return answer.model_dump_json(exclude_none=True).encode()


def _described(request: Request, info: ModelInfo) -> OpenAIModel:
    return OpenAIModel(id=info.name, created=request.app.state.started)


@router.head("/models", include_in_schema=False)
@router.get("/models", responses=problems(503))
async def openai_models(request: Request) -> OpenAIModels:
    """What `model` may be."""
    check_ready(request)
    engines: Engines = request.app.state.engines
    return OpenAIModels(data=[_described(request, info) for info in engines.infos])


@router.head("/models/{model}", include_in_schema=False)
@router.get("/models/{model}", responses=problems(404, 503))
async def openai_model(request: Request, model: str) -> OpenAIModel:
    """One of them."""
    _, info = served(request, model)
    return _described(request, info)
