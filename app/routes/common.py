"""What several routes share: the model that a request means, and its engine."""

from __future__ import annotations

from fastapi import Request

from app import errors
from app.drawing import unavailable
from app.engine.engines import Engines, Served
from app.engine.request import ModelInfo

REQUEST_ID = {"X-Request-Id": {"schema": {"type": "string"}, "description": "The request's id, its client's or new."}}
"""Headers of a response, for OpenAPI."""


def check_ready(request: Request) -> None:
    """Raises the 503 of engines that take no work."""
    status = request.app.state.engines.status
    if status != "ok":
        request.app.state.metrics.refused.labels("not_ready").inc()
        raise unavailable(status)


def served(request: Request, model: str | None) -> tuple[Served, ModelInfo]:
    """A model by its name or id, None being the default, and its engine.

    Raises:
        Unavailable, NoSuchModel.
    """
    check_ready(request)
    engines: Engines = request.app.state.engines
    engine = engines.find(model)
    if engine is None:
        there = ", ".join(info.id for info in engines.infos)
        raise errors.NoSuchModel(f"model {model} is not served here; served: {there}")
    assert engine.info is not None
    return engine, engine.info
