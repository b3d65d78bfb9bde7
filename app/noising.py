"""A picture noised, whoever asks: what /noise answers, and where a chain of /denoise starts. No HTTP."""

from __future__ import annotations

import dataclasses
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Literal

import numpy as np

from app import errors, forward, images
from app.answers import JSON, NPZ, PNG, b64
from app.drawing import random_seed
from app.engine.request import ModelInfo, Start
from app.forward import Noised
from app.images import Upload
from app.schemas import DenoiseRequest, NoisedImage, NoiseRequest, NoiseResponse
from ddpm_core import __version__

MAX_T = 32

OnPixels = Callable[[int], None]
"""Told how many pixels will be worked on before any is decoded; what it raises ends the work."""


@dataclasses.dataclass(frozen=True)
class NoiseParams:
    """What is made of a picture: x_t for every t, of one eps."""

    t: tuple[int, ...]
    seed: int
    fit: Literal["none", "model"]


def to_noise_params(fields: NoiseRequest, info: ModelInfo) -> NoiseParams:
    """Checks fields against the model and fills in what they left open. Raises Invalid."""
    t = tuple(int(part) for part in fields.t.split(","))
    if len(t) > MAX_T:
        raise errors.Invalid.field("t", f"{len(t)} timesteps are over the limit of {MAX_T}")
    for value in t:
        _check_t(value, info)
    return NoiseParams(t, random_seed() if fields.seed is None else fields.seed, fields.fit)


def _check_t(t: int, info: ModelInfo) -> None:
    if t >= info.num_train_steps:
        raise errors.Invalid.field("t", f"{t} must be 0 .. {info.num_train_steps - 1}")


def alpha_bars(params: NoiseParams, info: ModelInfo) -> list[float]:
    """Of every t."""
    return [float(abar) for abar in info.alphas_cumprod[list(params.t)]]


def noised(
    content: bytes, params: NoiseParams, info: ModelInfo, media_type: str, max_pixels: int, on_pixels: OnPixels
) -> bytes:
    """A picture noised, in a form of FORMS.

    Args:
        content: an image file.
        params: what is made of it.
        info: of the model whose schedule noises.
        media_type: of the answer.
        max_pixels: of the picture, times the number of t if it keeps its size.
        on_pixels: told of them.

    Raises:
        Invalid: the picture cannot be used.
    """
    fit = info.image_shape if params.fit == "model" else None
    copies = len(params.t) if fit is None else 1  # one of the image's own size for each t
    hint = f", ask for fewer than {copies} t, or fit=model" if copies > 1 else ""
    with _told(hint):
        upload = Upload(content, max_pixels // copies)
        on_pixels(copies * upload.pixels)
        pixels = upload.decode(fit)
    x = forward.noise_image(pixels, info.alphas_cumprod[list(params.t)], params.seed)
    return FORMS[media_type](x, params, info)


def start(content: bytes, fields: DenoiseRequest, info: ModelInfo, max_pixels: int, on_pixels: OnPixels) -> Start:
    """Where the chain of a picture starts: fitted to the model, to be noised to t.

    Raises:
        Invalid: t is out of range, or the picture cannot be used.
    """
    _check_t(fields.t, info)
    with _told():
        upload = Upload(content, max_pixels)
        on_pixels(upload.pixels)
        return Start(upload.decode(info.image_shape), fields.t)


@contextmanager
def _told(too_many: str = "") -> Iterator[None]:
    """What is wrong with a picture as a problem; `too_many` is how else to mend one of too many pixels."""
    try:
        yield
    except images.BadImage as error:
        hint = too_many if isinstance(error, images.TooManyPixels) else ""
        raise errors.Invalid.field("image", f"{error}{hint}") from None


# The forms


def _facts(params: NoiseParams, info: ModelInfo) -> dict[str, object]:
    return {"version": __version__, "model": info.name, "sha256": info.sha256, "seed": params.seed}


def strip(x: Noised, params: NoiseParams, info: ModelInfo) -> bytes:
    """One PNG of x_t, side by side, clamped to [-1, 1]."""
    side_by_side = images.grid(list(x.images), columns=len(params.t))
    return images.encode_png(side_by_side, {**_facts(params, info), "t": list(params.t)})


def listed(x: Noised, params: NoiseParams, info: ModelInfo) -> bytes:
    """JSON: a PNG for every t."""
    answer = NoiseResponse(
        created=int(time.time()),
        model=info.id,
        images=[
            NoisedImage(
                b64_json=b64(images.encode_png(image, {**_facts(params, info), "t": t})),
                seed=params.seed, t=t, alpha_bar=abar, snr=abar / (1 - abar),
            )
            for image, t, abar in zip(x.images, params.t, alpha_bars(params, info), strict=True)
        ],
    )  # fmt: skip
    return answer.model_dump_json().encode()


def npz(x: Noised, params: NoiseParams, info: ModelInfo) -> bytes:
    """Raw numbers: x_t (n, C, H, W) and eps (C, H, W) float32, and of each x_t its t and alpha_bar."""
    buffer = io.BytesIO()
    abars = np.array(alpha_bars(params, info))
    np.savez(buffer, x_t=x.x_t, eps=x.eps, t=np.array(params.t), alpha_bar=abars)
    return buffer.getvalue()


FORMS = {JSON: listed, NPZ: npz, PNG: strip}
"""Encoders by media type; of what a client likes as much the last is meant."""
