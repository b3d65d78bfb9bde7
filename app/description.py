"""What /openapi.json says beyond the routes' signatures: problems with examples, bodies read by hand, limits."""

from __future__ import annotations

import http
from typing import Any

from pydantic import BaseModel
from pydantic.json_schema import models_json_schema

from app import errors
from app.media_types import PROBLEM
from app.schemas import GenerateRequest, ProblemBody, ProgressEvent
from app.schemas_oip import InferenceRequest
from app.schemas_openai import CompletedImage, ImagesRequest, PartialImage
from app.settings import Settings
from ddpm_core import __version__

REF = "#/components/schemas/{model}"
BY_HAND: tuple[type[BaseModel], ...] = (
    GenerateRequest, ProblemBody, ProgressEvent, InferenceRequest, ImagesRequest, PartialImage, CompletedImage,
)  # fmt: skip
"""Schemas that no signature has."""

TAGS = {
    "images": "Drawing, noising, denoising, and telling whether a picture was drawn here.",
    "requests": "Requests in flight, and the results of those that nobody waits for.",
    "models": "What may be asked for.",
    "openai": "OpenAI's shapes, for clients that speak them.",
    "open inference protocol": "KServe's, Triton's and others' protocol, version 2.",
    "health": "For people, probes and Prometheus.",
}

PROBLEMS: dict[int, tuple[type[errors.Problem], str]] = {
    401: (errors.Unauthorized, "this API key is not known here"),
    404: (errors.NoSuchModel, "model cats is not served here; served: mnist@38931c40fe98"),
    406: (errors.NotAcceptable, "Accept asks for what /generate does not send; it sends image/png, application/json"),
    408: (errors.TooSlow, "the body did not arrive within 60 seconds: send a smaller one"),
    409: (errors.InFlight, "a request with X-Request-Id my-nine is in flight; use another id"),
    410: (errors.Cancelled, "the request was ended by DELETE /requests/{id}"),
    413: (errors.TooLarge, "the body is over the limit of 16,384 bytes"),
    415: (errors.UnsupportedMedia, "the body must be application/json, not text/plain: set Content-Type"),
    422: (errors.Invalid, "label: 12 is not a label of mnist; allowed: 0 .. 9, or null"),
    429: (errors.QueueFull, "1024 of 1024 image slots are taken, and this request asks for 1: try again later"),
    500: (errors.Problem, "an unexpected error; the server's log has it by request id"),
    503: (errors.Unavailable, "the model is still loading; GET /readyz says when it is ready"),
    504: (errors.DeadlinePassed, "deadline_ms passed before the images were done: allow more, or ask for less"),
}
"""An example of each status."""

RETRY_AFTER = {"Retry-After": {"schema": {"type": "integer", "minimum": 1}, "description": "Seconds to wait for."}}
MAY_RETRY = (429, 503)


def ref(schema: type[BaseModel]) -> dict[str, str]:
    """A schema by its name."""
    return {"$ref": REF.format(model=schema.__name__)}


def problems(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """Responses that are problems, for a route's `responses`."""
    return {status: problem(*PROBLEMS[status]) for status in statuses}


def problem(kind: type[errors.Problem], detail: str) -> dict[str, Any]:
    """One of them, by an example."""
    status = kind.status
    field, _, rest = detail.partition(": ")
    named = [{"field": field, "detail": rest}] if status == errors.Invalid.status else None
    example = errors.body("0b26f0c5d3c14f3e8a5a", status, kind.slug, detail, named)
    return {
        "description": http.HTTPStatus(status).phrase,
        "content": {PROBLEM: {"schema": ref(ProblemBody), "example": example}},
        **({"headers": RETRY_AFTER} if status in MAY_RETRY else {}),
    }


def json_body(schema: type[BaseModel], example: dict[str, Any], *, required: bool = True) -> dict[str, Any]:
    """A body that a route reads by itself, for its `openapi_extra`."""
    assert schema in BY_HAND
    content = {"application/json": {"schema": ref(schema), "example": example}}
    return {"requestBody": {"required": required, "content": content}}


def header(name: str, description: str, **schema: Any) -> dict[str, Any]:
    """A header of a request, for a route's `openapi_extra`."""
    return {"name": name, "in": "header", "description": description, "schema": {"type": "string", **schema}}


def complete(description: dict[str, Any], settings: Settings) -> None:
    """Adds to what the framework made of the routes."""
    schemas = description["components"]["schemas"]
    _, made = models_json_schema([(schema, "validation") for schema in BY_HAND], ref_template=REF)
    for name, schema in made["$defs"].items():
        schemas.setdefault(name, schema)
    for request in (GenerateRequest, ImagesRequest):
        n = schemas[request.__name__]["properties"]["n"]
        (n["anyOf"][0] if "anyOf" in n else n)["maximum"] = settings.max_images
    for path in description["paths"].values():
        for operation in path.values():
            form = operation.get("requestBody", {}).get("content", {}).get("multipart/form-data")
            if form and "n" in form["schema"]["properties"]:
                form["schema"]["properties"]["n"]["maximum"] = settings.max_images
    description["tags"] = [{"name": name, "description": text} for name, text in TAGS.items()]
    description["info"]["license"] = {"name": "MIT", "identifier": "MIT"}
    description["info"]["version"] = __version__
