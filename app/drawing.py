"""A request for images, whoever asks: its fields checked against the model, an engine's refusals as problems."""

from __future__ import annotations

import math
import secrets
from collections.abc import Iterator
from contextlib import contextmanager

from app import errors
from app.engine import request as engine_request
from app.engine.request import GenerateParams, ModelInfo, Start
from app.schemas import GenerateRequest
from app.settings import Settings
from ddpm_core import samplers
from ddpm_core.noise import MAX_SEED

RETRY_S = {"starting": 5, "draining": 30, "failed": 60}


def unavailable(status: str) -> errors.Unavailable:
    """The 503 of an engine that takes no work."""
    detail = {
        "starting": "the model is still loading; GET /readyz says when it is ready",
        "draining": "the service is shutting down; another replica will take the request",
        "failed": "the engine has failed; the service must be restarted",
    }[status]
    return errors.Unavailable(detail, headers={"Retry-After": str(RETRY_S[status])})


def random_seed(n: int = 1) -> int:
    """A base seed for n images."""
    return secrets.randbelow(MAX_SEED - n + 2)


def to_params(
    body: GenerateRequest,
    info: ModelInfo,
    settings: Settings,
    request_id: str,
    flow: str = "",
    start: Start | None = None,
) -> GenerateParams:
    """Checks fields against the loaded model and fills in what they left open. Raises Invalid.

    Args:
        body: the fields.
        info: of the loaded model.
        settings: its limits.
        request_id: what to know the request by.
        flow: whose share of the engine it uses.
        start: where the chain starts; None: pure noise.
    """
    if body.n > settings.max_images:
        raise errors.Invalid.field("n", f"{body.n} is over the limit of {settings.max_images} images a request")
    _, height, width = info.image_shape
    if (pixels := body.n * (body.frames or 1) * height * width * body.scale**2) > settings.max_image_pixels:
        raise errors.Invalid.field(
            "frames" if body.frames else "scale",
            f"{pixels:,} pixels of all images are over the limit of {settings.max_image_pixels:,}",
        )
    labels = tuple(body.label) if isinstance(body.label, list) else (body.label,) * body.n
    for label in labels:
        if (not info.unlabelled) if label is None else label >= info.num_classes:
            raise errors.Invalid.field("label", f"{'null' if label is None else label} is not a label of {info.labels}")
    if body.guidance_scale != 1 and not info.guidance:
        raise errors.Invalid.field(
            "guidance_scale", f"must be 1: {info.name} does not draw both with a label and without, as guidance does"
        )
    if start is not None and info.distilled_steps is not None:
        raise errors.Invalid.field(
            "model", f"{info.name} is distilled: it draws from pure noise alone, and cannot start at an image's t"
        )
    try:
        most = info.num_train_steps if start is None else start.t + 1
        sampler, steps = samplers.resolve(
            body.sampler, body.steps, most, info.learned,
            eta=body.eta, distilled_steps=info.distilled_steps, from_noise=start is None,
        )  # fmt: skip
    except ValueError as error:
        raise _of_plan(error) from None
    frames = _moments(body.frames, steps)
    if (kept := kept_bytes(body.n * len(frames), info)) > settings.frame_bytes_of_key:
        raise errors.Invalid.field(
            "frames", f"{kept:,} bytes of x and x_0_hat are over the limit of {settings.frame_bytes_of_key:,}"
        )
    seed = random_seed(body.n) if body.seed is None else body.seed
    return GenerateParams(
        request_id, tuple(range(seed, seed + body.n)), labels, sampler, steps, body.eta + 0.0,
        body.guidance_scale, start=start, previews=body.previews or 0, frames=frames,
        deadline_s=None if body.deadline_ms is None else body.deadline_ms / 1000, flow=flow,
    )  # fmt: skip


def _moments(frames: int | None, steps: int) -> tuple[int, ...]:
    """After which of its steps a chain is shown, evenly from its start to its end. Raises Invalid."""
    if frames is None:
        return ()
    if frames > steps + 1:
        raise errors.Invalid.field("frames", f"{frames} must be 2 .. {steps + 1}: {steps} steps have so many moments")
    return tuple(int(i * steps / (frames - 1) + 0.5) for i in range(frames))


def kept_bytes(moments: int, info: ModelInfo) -> int:
    """Of x and x_0_hat of so many moments of an image."""
    return moments * 2 * 4 * math.prod(info.image_shape)


@contextmanager
def refusals_told(params: GenerateParams) -> Iterator[None]:
    """Refusals of an engine as problems."""
    try:
        yield
    except engine_request.EngineError as error:
        raise to_problem(error, params) from None
    except ValueError as error:  # of the plan: this model's timesteps do not allow what the sampler does elsewhere
        raise _of_plan(error) from None


def _of_plan(error: ValueError) -> errors.Invalid:
    """What is wrong with a plan, at its field: the message begins with it, or it is about the steps."""
    field, _, rest = str(error).partition("=")
    return (
        errors.Invalid.field(field, rest)
        if field in ("sampler", "steps", "eta")
        else errors.Invalid.field("steps", str(error))
    )


def to_problem(error: BaseException, params: GenerateParams) -> errors.Problem:
    """What the engine's errors are over HTTP."""
    match error:
        case engine_request.EngineBusy():
            return errors.QueueFull(
                f"{error}: try again later or ask for fewer images", headers={"Retry-After": str(error.retry_after_s)}
            )
        case engine_request.DeadlineTooSoon():
            deadline_s = params.deadline_s or 0.0
            if error.alone_s > deadline_s:
                return errors.Invalid.field("deadline_ms", f"{error}; allow more, or ask for fewer images or steps")
            return errors.DeadlineTooSoon(
                f"deadline_ms cannot be met: {error}; try again later, or allow more",
                headers={"Retry-After": str(max(1, math.ceil(error.needed_s - deadline_s)))},
            )
        case engine_request.DeadlinePassed():
            return errors.DeadlinePassed("deadline_ms passed before the images were done: allow more, or ask for less")
        case engine_request.DuplicateRequest():
            return errors.InFlight(f"a request with X-Request-Id {params.request_id} is in flight; use another id")
        case engine_request.Cancelled():
            return errors.Cancelled("the request was ended by DELETE /requests/{id}")
        case engine_request.EngineNotReady():
            return unavailable(str(error))
        case engine_request.EngineError():
            return errors.Problem(f"{error}; the server's log has more by request id")
    raise error
