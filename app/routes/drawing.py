"""What every route that draws shares: the engine's answer awaited, encoded and sent in the form that was asked for."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Mapping
from concurrent.futures import Future
from contextlib import ExitStack
from typing import Any

import anyio
import anyio.to_thread
from fastapi import Request, Response
from fastapi.responses import JSONResponse

from app import answers, errors
from app.access import flow_of
from app.answers import FORMATS
from app.description import header
from app.drawing import kept_bytes, refusals_told, to_problem
from app.engine.engines import Served
from app.engine.job import OnProgress
from app.engine.request import DuplicateRequest, EngineError, GenerateParams, ModelInfo, Result
from app.http import Preference, negotiate, unless_gone
from app.jobs import Answer, Jobs
from app.routes.common import REQUEST_ID
from app.routes.events import EVENTS, Events, OurEvents, event_stream
from app.routes.requests import LOCATION, state_of
from app.schemas import GenerateRequest, RequestState

OFFERED = (EVENTS, *answers.STILL)

BINARY = {"schema": {"type": "string", "format": "binary"}}
EVENT = 'event: progress\ndata: {"step":1,"steps":5,"queue_position":0,"eta_s":0.02,"previews":[]}\n\n'
DRAWN = {
    "description": "The images, as Accept or response_format says.",
    "content": {
        **{media_type: BINARY for media_type in (*answers.STILL, *answers.MOVING) if media_type != answers.JSON},
        EVENTS: {"example": EVENT},
    },
    "headers": {
        **REQUEST_ID,
        "X-Seed": {"schema": {"type": "string"}, "description": "Of the first image."},
        "X-Model": {"schema": {"type": "string"}, "description": "name@first 12 of the weights' sha256."},
        "X-Sampler": {"schema": {"type": "string"}, "description": "What a preset stood for."},
        "X-Steps": {"schema": {"type": "string"}, "description": "Network calls per image."},
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


PARAMETERS = [
    header("Prefer", "`respond-async`: a 202 at once; `, wait=20`: unless it is done within 20 seconds."),
    header("X-Request-Id", "What to know the request by; absent: a new id.", pattern="^[A-Za-z0-9._-]{1,64}$"),
]
"""Of a request, for OpenAPI."""

ACCEPTED: dict[str, Any] = {
    "model": RequestState,
    "description": "With `Prefer: respond-async`: the request is served, and its result kept for a while.",
    "headers": {**REQUEST_ID, "Location": {"schema": {"type": "string"}, "description": "Where its state is."}},
}
"""A 202, for OpenAPI."""


async def submit(
    request: Request, engine: Served, params: GenerateParams, on_progress: OnProgress | None = None
) -> Future[Result]:
    """Hands a request to the engine; its refusals become problems."""
    check_id(request, params)
    with refusals_told(params):
        return await engine.submit(params, on_progress)


def check_id(request: Request, params: GenerateParams) -> None:
    """Raises InFlight where a request of this id is served, of any model, or its result is kept."""
    state = request.app.state
    kept = state.jobs.find(params.key)
    if state.engines.holds(params.key) or kept is not None:
        state.metrics.refused.labels(DuplicateRequest.reason).inc()
        if kept is None:
            raise to_problem(DuplicateRequest(), params)
        location = LOCATION.format(request_id=params.request_id)
        raise errors.InFlight(f"there is a request with this X-Request-Id: GET {location}, or use another id")


async def finished(engine: Served, params: GenerateParams, future: Future[Result]) -> Result:
    """The answer to a request that an engine has accepted. Whoever stops waiting ends it."""
    try:
        return await asyncio.wrap_future(future)
    except EngineError as error:
        raise to_problem(error, params) from None
    finally:
        if not future.done():
            engine.cancel(params.request_id, params.flow)


async def draw(request: Request, engine: Served, params: GenerateParams) -> Result:
    """The engine's answer. Whoever stops waiting ends the request."""
    return await finished(engine, params, await submit(request, engine, params))


def media_type_of(request: Request, body: GenerateRequest) -> str:
    """What the client wants. Raises NotAcceptable, or Invalid where its fields do not go with that."""
    offered = OFFERED if body.frames is None else tuple(answers.MOVING)
    if body.response_format is None:
        media_type = negotiate(request, offered)
    elif (media_type := FORMATS[body.response_format]) not in offered:
        kinds = ", ".join(name for name, kind in FORMATS.items() if kind in offered)
        how = "with" if body.frames else "without"
        raise errors.Invalid.field("response_format", f"{body.response_format} must be one of {kinds} {how} frames")
    if body.previews and media_type != EVENTS:
        raise errors.Invalid.field("previews", f"needs Accept: {EVENTS}, and no response_format")
    return media_type


async def stream(
    request: Request, engine: Served, params: GenerateParams, events_of: Events, headers: Mapping[str, str]
) -> Response:
    """A request as an event stream, once the engine has accepted it."""
    return await event_stream(
        request,
        lambda tell: submit(request, engine, params, tell),
        lambda: engine.cancel(params.request_id, params.flow),
        lambda error: to_problem(error, params),
        events_of,
        headers,
    )


async def respond(
    request: Request, engine: Served, info: ModelInfo, params: GenerateParams, media_type: str, scale: int
) -> Response:
    """Draws and answers in the media type, or with a 202 where the client prefers that."""
    headers = {
        "X-Seed": str(params.seeds[0]), "X-Model": info.id, "X-Sampler": params.sampler, "X-Steps": str(params.steps),
        "Vary": "Accept, Prefer",
    }  # fmt: skip
    if media_type == EVENTS:

        def encode(result: Result) -> bytes:
            return answers.listed(result, params, info, scale)

        return await stream(request, engine, params, OurEvents(params.request_id, scale, encode), headers)

    async def work(held: ExitStack, threads: anyio.CapacityLimiter | None = None) -> Answer:
        """Its answer, once the engine has accepted it; what it holds is given back with `held`."""
        with held:
            result = await finished(engine, params, future)
            start = time.monotonic()
            encode = (answers.MOVING if params.frames else answers.STILL)[media_type]
            content = await anyio.to_thread.run_sync(encode, result, params, info, scale, limiter=threads)
        timing = {"queue": result.queue_s, "denoise": result.denoise_s, "encode": time.monotonic() - start}
        told = ", ".join(f"{name};dur={seconds * 1000:.1f}" for name, seconds in timing.items())
        return Answer(content, media_type, {**headers, "Server-Timing": told})

    preference = Preference.of(request)
    jobs: Jobs = request.app.state.jobs
    with ExitStack() as held, ExitStack() as place:
        if params.frames:
            share = request.app.state.frames.share(held, flow_of(request.state))
            share(kept_bytes(params.slots * len(params.frames), info))
        if preference.respond_async:
            check_id(request, params)  # an id twice is worse than too many of them
            place.enter_context(jobs.room(params.flow))
        future = await submit(request, engine, params)
        mine = held.pop_all()
    if not preference.respond_async:
        request.state.held.callback(mine.close)  # frames count until they have been read
        return (await unless_gone(request, work(ExitStack()))).response()
    kept = jobs.add(engine, params, work(mine, jobs.encoders))
    if preference.wait_s and await unless_gone(request, jobs.ended(kept, preference.wait_s)):
        jobs.remove(kept)
        return kept.response()
    state = state_of(kept, jobs)
    accepted = {
        **headers,
        "Location": LOCATION.format(request_id=params.request_id),
        "Preference-Applied": "respond-async",
        "Retry-After": str(max(1, math.ceil(state.eta_s))),
    }
    return JSONResponse(state.model_dump(mode="json"), 202, accepted)
