"""/requests/{id}: the state of a client's own request, its result where that is kept, and its end."""

from __future__ import annotations

import math
from typing import Any

from fastapi import APIRouter, Request, Response

from app import errors
from app.access import flow_of
from app.description import problem, problems
from app.engine.engines import Engines
from app.engine.request import GenerateParams, Progress
from app.jobs import Jobs, Kept
from app.schemas import ProblemBody, RequestState

router = APIRouter(tags=["requests"])

LOCATION = "/requests/{request_id}"
NO_REQUEST: dict[int | str, dict[str, Any]] = {
    404: problem(errors.NotFound, "no request my-nine is in flight, and no result of it is kept")
}
CANCELLED_S = 1.0  # until its state says that it was cancelled: in fact at once


def state_of(kept: Kept, jobs: Jobs) -> RequestState:
    """Of an asynchronous request."""
    params, problem = kept.params, kept.problem
    location = LOCATION.format(request_id=params.request_id)
    if kept.ended is None:
        progress = kept.engine.progress(params.request_id, params.flow)
        now = progress or Progress(params.steps, params.steps, 0, 0.0)  # its images are being encoded
        return _running(params.request_id, kept.engine.name, now).model_copy(update={"created": int(kept.created)})
    return RequestState(
        id=params.request_id,
        state="completed" if problem is None else "cancelled" if isinstance(problem, errors.Cancelled) else "failed",
        model=kept.engine.name,
        step=params.steps if problem is None else None,
        steps=params.steps,
        queue_position=0,
        eta_s=0.0,
        created=int(kept.created),
        expires=math.ceil(kept.ended + jobs.seconds),
        result=f"{location}/result" if problem is None else None,
        problem=None if problem is None else ProblemBody(**problem.body(params.request_id)),
    )


def _running(request_id: str, model: str, progress: Progress) -> RequestState:
    return RequestState(
        id=request_id,
        state="running" if progress.begun else "queued",
        model=model,
        step=progress.step,
        steps=progress.steps,
        queue_position=progress.queue_position,
        eta_s=round(progress.eta_s, 3),
    )


def _kept(request: Request, request_id: str) -> Kept | None:
    jobs: Jobs = request.app.state.jobs
    return jobs.find(GenerateParams.key_of(flow_of(request.state), request_id))


def _none(request_id: str) -> errors.NotFound:
    return errors.NotFound(f"no request {request_id} is in flight, and no result of it is kept")


@router.head(LOCATION, include_in_schema=False)
@router.get(LOCATION, responses=NO_REQUEST)
async def request_state(request: Request, request_id: str) -> RequestState:
    """How far one's own request is, asynchronous or not."""
    kept = _kept(request, request_id)
    if kept is not None:
        return state_of(kept, request.app.state.jobs)
    engines: Engines = request.app.state.engines
    for engine in engines.by_name.values():
        progress = engine.progress(request_id, flow_of(request.state))
        if progress is not None:
            return _running(request_id, engine.name, progress)
    raise _none(request_id)


@router.head(LOCATION + "/result", include_in_schema=False)
@router.get(
    LOCATION + "/result",
    response_class=Response,
    responses={
        200: {"description": "What the request itself would have answered."},
        **NO_REQUEST,
        **problems(409, 410, 413, 503, 504),
    },
)
async def result(request: Request, request_id: str) -> Response:
    """The result of an asynchronous request, as often as one likes while it is kept; or its error."""
    kept = _kept(request, request_id)
    if kept is None:
        raise _none(request_id)
    if kept.ended is None:
        eta_s = state_of(kept, request.app.state.jobs).eta_s
        raise errors.NotDone(
            f"request {request_id} is still being served: GET /requests/{request_id} says how far it is",
            headers={"Retry-After": str(max(1, math.ceil(eta_s)))},
        )
    kept.fetched |= request.method == "GET"
    return kept.response()


@router.delete(LOCATION, status_code=204, response_class=Response, responses=NO_REQUEST)
async def cancel(request: Request, request_id: str) -> Response:
    """Ends one's own request by its X-Request-Id: its slots are free at once, whoever waits gets 410.

    Of an asynchronous request that has ended, the result is forgotten.
    """
    kept, jobs = _kept(request, request_id), request.app.state.jobs
    cancelled = request.app.state.engines.cancel(request_id, flow_of(request.state))
    if kept is not None and cancelled:
        await jobs.ended(kept, CANCELLED_S)
    elif kept is not None:
        jobs.remove(kept)
    elif not cancelled:
        raise _none(request_id)
    return Response(status_code=204)
