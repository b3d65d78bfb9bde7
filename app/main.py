"""The application: settings, engine and routes put together. `create_app()` is what servers and tests call."""

from __future__ import annotations

import multiprocessing
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI
from starlette.concurrency import run_in_threadpool

from app import errors
from app.engine.engine import Engine
from app.engine.runner import Runner
from app.http import RequestId
from app.routes import denoise, generate, health, image_urls, metrics, noise, requests
from app.settings import Settings
from ddpm_core import __version__

LAST_WORDS_S = 2  # for answers on their way, and for the worker thread, when everything else has ended
ONE_PROCESS = "one process serves one device, and shares its batches among all requests; for more, start more replicas"


def create_app(settings: Settings | None = None) -> FastAPI:
    """The service as an ASGI application; its lifespan starts the engine and drains it at the end."""
    settings = settings or Settings()
    engine = Engine(
        lambda: Runner.load(settings.model, settings.device),
        queue_slots=settings.queue_slots, exact=settings.exact, batch_rows=settings.batch_rows,
    )  # fmt: skip

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        if multiprocessing.parent_process() is not None:
            raise RuntimeError(f"--workers: {ONE_PROCESS}")
        engine.start()
        yield
        # One that serves is drained here (under another server than ours); one that drained, failed or loads is not.
        await run_in_threadpool(engine.stop, settings.drain_s if engine.status == "ok" else LAST_WORDS_S)

    app = FastAPI(
        title="DDPM image service",
        version=__version__,
        description="Draws images with a denoising diffusion probabilistic model, and noises yours.",
        lifespan=lifespan,
    )
    app.state.settings, app.state.engine, app.state.sharing = settings, engine, image_urls.Sharing()
    app.add_middleware(RequestId)
    errors.install(app)
    for module in (generate, denoise, image_urls, noise, requests, health, metrics):
        app.include_router(module.router)
    schema = app.openapi()["paths"]["/generate"]["post"]["requestBody"]["content"]["application/json"]["schema"]
    schema["properties"]["n"]["maximum"] = settings.max_images
    return app
