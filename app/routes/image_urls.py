"""GET /images/...: one image as a pure function of its URL, for browsers and caches."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import logging
import uuid
from collections.abc import Callable, Coroutine
from typing import Annotated, get_args

from fastapi import APIRouter, Path, Request, Response
from starlette.concurrency import run_in_threadpool

from app import errors
from app.access import flow_of
from app.answers import PNG, sheet
from app.description import problems
from app.drawing import to_params
from app.engine.request import GenerateParams, ModelInfo
from app.http import unchanged, unless_gone
from app.routes.common import served
from app.routes.drawing import draw
from app.schemas import GenerateRequest, parse_fields
from ddpm_core import samplers

log = logging.getLogger("app")

router = APIRouter(tags=["images"])

FOREVER = "public, max-age=31536000, immutable"
SAMPLERS = [
    name for name in get_args(GenerateRequest.model_fields["sampler"].annotation) if name not in samplers.PRESETS
]
QUERY = ("eta", "guidance_scale", "scale")


@dataclasses.dataclass
class _Shared:
    task: asyncio.Task[bytes]
    waiters: int = 0


class Sharing:
    """Identical images in flight are one computation, which ends when the last that waits for it leaves."""

    def __init__(self) -> None:
        self._in_flight: dict[object, _Shared] = {}

    async def get(self, key: object, make: Callable[[], Coroutine[None, None, bytes]]) -> bytes:
        shared = self._in_flight.get(key)
        if shared is None:
            shared = self._in_flight[key] = _Shared(asyncio.create_task(make()))
        shared.waiters += 1
        try:
            return await asyncio.shield(shared.task)
        finally:
            shared.waiters -= 1
            if not shared.waiters:
                if self._in_flight.get(key) is shared:
                    del self._in_flight[key]
                shared.task.cancel()


def _params(
    request: Request, info: ModelInfo, sampler: str, steps: str, label: str, seed: str
) -> tuple[GenerateParams, int]:
    """What a URL asks for, and its scale. Raises Invalid."""
    for name, _ in request.query_params.multi_items():
        if name not in QUERY or len(request.query_params.getlist(name)) > 1:
            raise errors.Invalid.field(name, f"each of {', '.join(QUERY)} may be given, once")
    for name, value in (("steps", steps), ("seed", seed)):
        if not (value.isascii() and value.isdigit()):
            raise errors.Invalid.field(name, f"{value} is not a number of digits alone")
    if sampler in samplers.PRESETS:
        raise errors.Invalid.field("sampler", f"{sampler} is a preset, and may mean another sampler tomorrow: name one")
    given = {"sampler": sampler, "steps": steps, "seed": seed, **dict(request.query_params)}
    fields = parse_fields(given if label == "none" else {**given, "label": label}, GenerateRequest)
    params = to_params(fields, info, request.app.state.settings, request.state.request_id, flow_of(request.state))
    return dataclasses.replace(params, request_id=uuid.uuid4().hex), fields.scale  # several requests may share it


@router.head("/images/{model}/{sampler}-{steps}/{label}/{seed}.png", include_in_schema=False)
@router.get(
    "/images/{model}/{sampler}-{steps}/{label}/{seed}.png",
    response_class=Response,
    responses={
        200: {"content": {PNG: {"schema": {"type": "string", "format": "binary"}}}},
        304: {},
        **problems(404, 429, 503),
    },
    openapi_extra={
        "parameters": [
            {"name": name, "in": "query", "schema": GenerateRequest.model_json_schema()["properties"][name]}
            for name in QUERY
        ]
    },
)
async def image(
    request: Request,
    model: str,
    sampler: Annotated[str, Path(json_schema_extra={"enum": SAMPLERS})],
    steps: Annotated[str, Path(json_schema_extra={"pattern": "^[1-9][0-9]{0,3}$"})],
    label: Annotated[str, Path(json_schema_extra={"pattern": "^(none|[0-9]{1,4})$"})],
    seed: Annotated[str, Path(json_schema_extra={"pattern": "^[0-9]{1,16}$"})],
) -> Response:
    """One image. `model` is name@first 12 of the weights' sha256, and the answer never changes; or the name alone."""
    engine, info = served(request, model)
    params, scale = _params(request, info, sampler, steps, label, seed)

    async def make() -> bytes:
        try:
            result = await draw(request, engine, params)
        except errors.Problem:
            log.warning("the image was not drawn; the engine knew it as request %s", params.request_id)
            raise
        return await run_in_threadpool(sheet, result, params, info, scale)

    key = (info.id, dataclasses.replace(params, request_id=""), scale)
    png = await unless_gone(request, request.app.state.sharing.get(key, make))
    etag = f'"{hashlib.sha256(png).hexdigest()[:32]}"'
    fixed = model == info.id and params.sampler != samplers.LEARNED  # its plans may be fitted anew
    pinned = fixed and engine.exactness is not None and engine.exactness.exact
    headers = {"ETag": etag, "Cache-Control": FOREVER if pinned else "no-cache", "X-Model": info.id}
    if unchanged(request, etag):
        return Response(status_code=304, headers=headers)
    return Response(png, media_type=PNG, headers=headers)
