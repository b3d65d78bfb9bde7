"""The application: settings, engine and routes put together. `create_app()` is what servers and tests call."""

from __future__ import annotations

import functools
import itertools
import multiprocessing
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

from fastapi import Depends, FastAPI
from starlette.concurrency import run_in_threadpool

from app import errors
from app.access import Access, Cors
from app.description import complete, problems
from app.engine.admission import Bounds
from app.engine.engine import Engine
from app.engine.engines import Engines
from app.engine.replicas import Replicas
from app.engine.runner import Runner
from app.engine.turns import Turns
from app.http import Outermost
from app.jobs import Jobs
from app.metrics import EngineMetrics, Metrics
from app.routes import (
    capabilities,
    denoise,
    docs,
    generate,
    health,
    image_urls,
    metrics,
    noise,
    oip,
    openai,
    page,
    requests,
    verify,
)
from app.settings import Settings
from app.uploads import Uploads, frames
from ddpm_core import __version__
from ddpm_core.hub import name_of
from ddpm_core.network import devices_of

LAST_WORDS_S = 2  # for answers on their way, and for the worker thread, when everything else has ended
ONE_PROCESS = (
    "one process serves all of its devices (DDPM_DEVICE=all), and shares its batches among all requests; for more, "
    "start more replicas"
)


def create_app(
    settings: Settings | None = None, make_engines: Callable[[Settings, Metrics], Engines] | None = None
) -> FastAPI:
    """The service as an ASGI application; its lifespan starts the engines and drains them at the end.

    Args:
        settings: None: those of the environment.
        make_engines: makes what draws; None: this process does.
    """
    settings = settings or Settings()
    counted = Metrics()
    engines = (make_engines or local)(settings, counted)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if multiprocessing.parent_process() is not None:
            raise RuntimeError(f"--workers: {ONE_PROCESS}")
        engines.start()
        yield
        # One that serves is drained here (under another server than ours); one that drained, failed or loads is not.
        await run_in_threadpool(engines.stop, settings.drain_s if engines.status == "ok" else LAST_WORDS_S)
        await app.state.jobs.close()

    app = FastAPI(
        title="DDPM image service",
        version=__version__,
        summary="Draws images with a denoising diffusion probabilistic model, and noises yours.",
        description=(
            "The same model, seed, label, sampler and steps give the same bytes, alone or in any company. Every error "
            "is problem+json (RFC 9457), which names the field, what is allowed and how to mend it."
        ),
        lifespan=lifespan,
        redirect_slashes=False,
        docs_url=None,
        redoc_url=None,
        generate_unique_id_function=lambda route: route.name,
        responses=problems(422, 500),
        openapi_url="/openapi.json" if settings.docs else None,
    )
    app.state.settings, app.state.engines, app.state.metrics = settings, engines, counted
    app.state.sharing, app.state.uploads = image_urls.Sharing(), Uploads(settings, counted)
    app.state.started = int(time.time())
    app.state.frames, app.state.jobs = frames(settings, counted), Jobs(settings, counted)
    if settings.cors_origins:
        app.add_middleware(
            Cors, allow_origins=settings.cors_origins, allow_methods=["*"], allow_headers=["*"],
            expose_headers=["*"],
        )  # fmt: skip
    app.add_middleware(Outermost)
    errors.install(app)
    with_key: dict[str, Any] = (
        {"dependencies": [Depends(Access(settings.keys))], "responses": problems(401)} if settings.keys else {}
    )
    for module in (generate, denoise, image_urls, noise, requests, capabilities, oip, openai, verify):
        app.include_router(module.router, **with_key)
    for router in (health.router, metrics.router):
        app.include_router(router, **(with_key if settings.metrics_key else {}))
    app.include_router(health.probes)
    if settings.page:
        app.include_router(page.router)
    if settings.docs:
        app.include_router(docs.router)
        complete(app.openapi(), settings)
    return app


def local(settings: Settings, metrics: Metrics) -> Engines:
    """Engines of this process, one for each model on each device; those of a device load, and make steps, in turns."""
    devices = [(name, Turns()) for name in devices_of(settings.device)]

    def replicas(model: str, sha256: str | None) -> Replicas:
        name, counted = name_of(model), EngineMetrics(metrics, name_of(model))
        bounds = Bounds(settings.queue_slots, settings.slots_of_key, settings.queue_s)
        return Replicas(
            [
                Engine(
                    functools.partial(Runner.load, model, device, sha256), bounds=bounds, exact=settings.exact,
                    batch_rows=settings.batch_rows, name=name, metrics=counted, device=turns,
                )
                for device, turns in devices
            ],
            counted,
        )  # fmt: skip

    return Engines([replicas(*pair) for pair in itertools.zip_longest(settings.served, settings.model_sha256)])
