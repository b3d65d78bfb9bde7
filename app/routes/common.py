"""What several routes share: the loaded model, seeds, image responses."""

from __future__ import annotations

import base64
import secrets

from fastapi import Request

from app import errors
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


def loaded_model(request: Request) -> ModelInfo:
    """The model, or the 503 of an engine that has none."""
    engine = request.app.state.engine
    info: ModelInfo | None = engine.info
    if info is None or engine.status != "ok":
        engine.metrics.refused.labels("not_ready").inc()
        raise unavailable(engine.status)
    return info


def random_seed(n: int = 1) -> int:
    """A base seed for n images."""
    return secrets.randbelow(MAX_SEED - n + 2)


def b64(png: bytes) -> str:
    return base64.b64encode(png).decode()
