"""GET /health and the probes."""

from __future__ import annotations

from fastapi import APIRouter, Request, Response

from app.engine.engines import Engines, Served
from app.schemas_service import EngineHealth, Health, ModelHealth, ReplicaHealth
from ddpm_core import __version__

router = APIRouter(tags=["health"])


def _of_model(served: Served) -> ModelHealth:
    info, exactness, states = served.info, served.exactness, served.states
    return ModelHealth(
        status=served.status,
        device=info.device if info else None,
        model=served.name,
        sha256=info.sha256 if info else None,
        engine=EngineHealth(
            slots_running=sum(state.slots_running for state in states),
            slots_waiting=sum(state.slots_waiting for state in states),
            slots_limit=sum(state.slots_limit for state in states),
            batch_rows_limit=max((state.rows_limit for state in states), default=0) or None,
            runtime=info.runtime if info else None,
            exact=exactness.exact if exactness else None,
            exactness=exactness.how if exactness else None,
            fingerprint=exactness.fingerprint if exactness else None,
        ),
        replicas=[
            ReplicaHealth(
                name=state.name,
                status=state.status,
                slots_running=state.slots_running,
                slots_waiting=state.slots_waiting,
                slots_limit=state.slots_limit,
                batch_rows_limit=state.rows_limit or None,
            )
            for state in states
        ],
    )


@router.head("/health", include_in_schema=False)
@router.get("/health", responses={503: {"model": Health, "description": "starting, draining or failed"}})
async def health(request: Request, response: Response) -> Health:
    """What is served, on what, and whether it is ready."""
    engines: Engines = request.app.state.engines
    response.status_code = 200 if engines.status == "ok" else 503
    models = [_of_model(served) for served in engines.by_name.values()]
    return Health(**{**dict(models[0]), "status": engines.status}, models=models, version=__version__)


probes = APIRouter(tags=["health"])
"""Never behind a key."""


@probes.head("/livez", include_in_schema=False)
@probes.head("/v2/health/live", include_in_schema=False)
@probes.get(
    "/livez",
    response_class=Response,
    responses={503: {"description": "the worker thread has died: restart the process"}},
)
@probes.get("/v2/health/live", include_in_schema=False)
async def live(request: Request) -> Response:
    """Whether the process is worth keeping."""
    return Response(status_code=503 if request.app.state.engines.status == "failed" else 200)


@probes.head("/readyz", include_in_schema=False)
@probes.head("/v2/health/ready", include_in_schema=False)
@probes.get(
    "/readyz", response_class=Response, responses={503: {"description": "starting, draining or failed: send no work"}}
)
@probes.get("/v2/health/ready", include_in_schema=False)
async def ready(request: Request) -> Response:
    """Whether new work is welcome."""
    return Response(status_code=200 if request.app.state.engines.status == "ok" else 503)
