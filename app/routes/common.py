"""What several routes share: the loaded model, seeds, image responses."""

from __future__ import annotations

import base64
import secrets

from fastapi import Request

from app import errors
from app.engine.engine import Engine
from app.engine.engines import Engines
from app.engine.request import ModelInfo
from app.schemas import ProblemBody
from ddpm_core.noise import MAX_SEED

JSON, PNG = "application/json", "image/png"
FORMATS = {"png": PNG, "b64_json": JSON}  # response_format -> media type

PROBLEM = {"content": {"application/problem+json": {"schema": ProblemBody.model_json_schema()}}}

REQUEST_ID = {"X-Request-Id": {"schema": {"type": "string"}, "description": "The request's id, its client's or new."}}
"""Headers of a response, for OpenAPI."""

RETRY_S = {"starting": 5, "draining": 30, "failed": 60}


def unavailable(status: str) -> errors.Unavailable:
    """The 503 of an engine that takes no work."""
    detail = {
        "starting": "the model is still loading; GET /readyz says when it is ready",
        "draining": "the service is shutting down; another replica will take the request",
        "failed": "the engine has failed; the service must be restarted",
    }[status]
    return errors.Unavailable(detail, headers={"Retry-After": str(RETRY_S[status])})


def check_ready(request: Request) -> None:
    """Raises the 503 of engines that take no work."""
    status = request.app.state.engines.status
    if status != "ok":
        request.app.state.metrics.refused.labels("not_ready").inc()
        raise unavailable(status)


def served(request: Request, model: str | None) -> tuple[Engine, ModelInfo]:
    """A model by its name or id, None being the default, and its engine.

    Raises:
        Unavailable, NotFound.
    """
    check_ready(request)
    engines: Engines = request.app.state.engines
    engine = engines.find(model)
    if engine is None:
        there = ", ".join(info.id for info in engines.infos)
        raise errors.NotFound(f"model {model} is not served here; served: {there}")
    assert engine.info is not None
    return engine, engine.info


def random_seed(n: int = 1) -> int:
    """A base seed for n images."""
    return secrets.randbelow(MAX_SEED - n + 2)


def b64(png: bytes) -> str:
    return base64.b64encode(png).decode()
