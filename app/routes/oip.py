"""The Open Inference Protocol (V2, REST) of KServe, Triton and others: metadata, readiness and inference."""

from __future__ import annotations

import dataclasses
from typing import Annotated

from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from app import errors
from app.access import flow_of
from app.answers import JSON
from app.description import json_body, problems
from app.drawing import to_params
from app.engine.engines import Served
from app.engine.request import ModelInfo, Result
from app.http import read_json, unless_gone
from app.routes.common import served
from app.routes.drawing import draw
from app.schemas import GenerateRequest, parse, parse_fields
from app.schemas_oip import (
    InferenceRequest,
    InferenceResponse,
    ModelMetadata,
    OutputTensor,
    ServerMetadata,
    TensorMetadata,
)
from ddpm_core import __version__

router = APIRouter(prefix="/v2", tags=["open inference protocol"])

Model = Annotated[str, Path(description="Its name.")]
MODEL, VERSION = "/models/{model}", "/models/{model}/versions/{version}"
EXAMPLE = {"inputs": [{"name": "seed", "shape": [2], "datatype": "INT64", "data": [1, 9]}]}


def _served(request: Request, model: str) -> tuple[Served, ModelInfo]:
    version = request.path_params.get("version")  # no parameter of the operations, whose paths without one have none
    return served(request, model if version is None else f"{model}@{version}")


@router.get("")
async def server_metadata() -> ServerMetadata:
    """What server this is."""
    return ServerMetadata(name="ddpm-service", version=__version__, extensions=[])


@router.get(MODEL, responses=problems(404, 503))
@router.get(VERSION, include_in_schema=False)
async def model_metadata(request: Request, model: Model) -> ModelMetadata:
    """What a model takes and gives. Its one version is the first 12 digits of its weights' sha256."""
    _, info = _served(request, model)
    names = ["seed", "label"] if info.num_classes else ["seed"]
    return ModelMetadata(
        name=info.name,
        versions=[info.version],
        platform=f"ddpm_{info.runtime}",
        inputs=[TensorMetadata(name=name, datatype="INT64", shape=[-1]) for name in names],
        outputs=[TensorMetadata(name="images", datatype="UINT8", shape=[-1, *info.image_shape])],
    )


@router.get(MODEL + "/ready", response_class=Response, responses=problems(404, 503))
@router.get(VERSION + "/ready", include_in_schema=False)
async def model_ready(request: Request, model: Model) -> Response:
    """Whether new work for a model is welcome."""
    _served(request, model)
    return Response()


@router.post(
    MODEL + "/infer",
    response_model=InferenceResponse,
    responses=problems(404, 408, 409, 410, 413, 415, 429, 503, 504),
    openapi_extra=json_body(InferenceRequest, EXAMPLE),
)
@router.post(VERSION + "/infer", include_in_schema=False)
async def infer(request: Request, model: Model) -> Response:
    """Draws an image for each seed, as /generate does, and answers with their pixels."""
    engine, info = _served(request, model)
    settings = request.app.state.settings
    body = parse(await read_json(request, settings.max_json_bytes), InferenceRequest)
    seeds, labels = _tensors(body)
    given = body.parameters.model_dump(exclude_unset=True) if body.parameters else {}
    fields = parse_fields({**given, "n": len(seeds), "label": labels}, GenerateRequest)
    params = to_params(fields, info, settings, request.state.request_id, flow_of(request.state))
    params = dataclasses.replace(params, seeds=tuple(seeds))
    result = await unless_gone(request, draw(request, engine, params))

    def encoded(result: Result) -> bytes:
        images = OutputTensor(
            name="images", shape=list(result.images.shape), datatype="UINT8", data=result.images.ravel().tolist()
        )
        answer = InferenceResponse(
            model_name=info.name, model_version=info.version, id=body.id or params.request_id, outputs=[images]
        )
        return answer.model_dump_json().encode()

    return Response(await run_in_threadpool(encoded, result), media_type=JSON, headers={"X-Model": info.id})


def _tensors(body: InferenceRequest) -> tuple[list[int], list[int | None]]:
    """Seeds and labels. Raises Invalid."""
    found = {tensor.name: tensor for tensor in body.inputs}
    if len(found) < len(body.inputs) or "seed" not in found:
        raise errors.Invalid.field("inputs", "must be a tensor seed, and may be another, label")
    for name, tensor in found.items():
        if tensor.shape != [len(tensor.data)]:
            raise errors.Invalid.field("inputs", f"{name}: the shape is {tensor.shape}, of {len(tensor.data)} numbers")
    seeds = found["seed"].data
    labels = found["label"].data if "label" in found else [-1] * len(seeds)
    if len(labels) != len(seeds):
        raise errors.Invalid.field("inputs", f"label has {len(labels)} numbers, seed {len(seeds)}: they must agree")
    if min(seeds) < 0:
        raise errors.Invalid.field("inputs", f"seed: must be 0 .. {2**53 - 1}")
    return seeds, [None if label < 0 else label for label in labels]
