"""What was drawn, as bytes in the form that was asked for. The same images give the same bytes, here and offline."""

from __future__ import annotations

import base64
import hashlib
import io
import math
import time
import zipfile

import numpy as np
from numpy.typing import NDArray

from app import images
from app.engine.request import Frames, GenerateParams, ModelInfo, Result
from app.engine.runner import to_pixels
from app.media_types import APNG as APNG
from app.media_types import JSON as JSON
from app.media_types import NPZ as NPZ
from app.media_types import PNG as PNG
from app.media_types import WEBP as WEBP
from app.media_types import ZIP as ZIP
from app.schemas import GeneratedImage, GenerateResponse
from ddpm_core import __version__, samplers
from ddpm_core.image_files import Pixels

FORMATS = {"png": PNG, "b64_json": JSON, "apng": APNG, "webp": WEBP, "npz": NPZ}
"""response_format -> media type"""


def b64(png: bytes) -> str:
    return base64.b64encode(png).decode()


def facts(params: GenerateParams, info: ModelInfo) -> list[dict[str, object]]:
    """What determines the pixels of each image, and nothing else."""
    shared: dict[str, object] = {
        "version": __version__, "model": info.name, "sha256": info.sha256, "sampler": params.sampler,
        "steps": params.steps, "eta": params.eta,
    }  # fmt: skip
    if params.sampler == samplers.LEARNED:
        shared["plan_sha256"] = info.learned[params.steps]
    if params.start is not None:
        shared |= {"t": params.start.t, "pixels_sha256": hashlib.sha256(params.start.pixels.tobytes()).hexdigest()}
    return [
        {**shared, "seed": seed, "label": label, "guidance_scale": params.guidance_scale if params.guided(i) else 1.0}
        for i, (seed, label) in enumerate(zip(params.seeds, params.labels, strict=True))
    ]


def each(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> list[bytes]:
    """One PNG an image; its text chunk holds the image's facts."""
    return [
        images.encode_png(image, of_image, scale=scale)
        for image, of_image in zip(result.images, facts(params, info), strict=True)
    ]


def _columns(params: GenerateParams) -> int:
    """Of a grid."""
    return math.ceil(math.sqrt(params.slots))


def sheet_shape(params: GenerateParams, info: ModelInfo) -> tuple[int, int]:
    """(H, W) of a picture of all images."""
    _, height, width = info.image_shape
    return images.grid_shape(params.slots, _columns(params), height, width)


def sheet(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> bytes:
    """One PNG of all images; of several a grid, whose text chunk lists the facts of each."""
    if params.slots == 1:
        return each(result, params, info, scale)[0]
    grid = images.grid(list(result.images), _columns(params))
    return images.encode_png(grid, {"images": facts(params, info)}, scale=scale)


def archive(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> bytes:
    """One PNG an image, named by its place and seed, in a ZIP."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as file:
        for i, png in enumerate(each(result, params, info, scale)):
            file.writestr(zipfile.ZipInfo(f"{i:04}-seed-{params.seeds[i]}.png"), png)
    return buffer.getvalue()


def listed(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> bytes:
    """The images in JSON, each with its seed and label."""
    answer = GenerateResponse(
        created=int(time.time()),
        model=info.id,
        sampler=params.sampler,
        steps=params.steps,
        images=[
            GeneratedImage(b64_json=b64(png), seed=seed, label=label)
            for png, seed, label in zip(each(result, params, info, scale), params.seeds, params.labels, strict=True)
        ],
    )
    return answer.model_dump_json().encode()


# Of a chain, where frames were asked for


def _frames(result: Result) -> Frames:
    assert result.frames is not None
    return result.frames


def pictures(result: Result, params: GenerateParams) -> list[Pixels]:
    """What is shown: x of every frame as pixels, clamped, or the images alone; of several a grid."""
    shown = [to_pixels(x) for x in _frames(result).x] if params.frames else [result.images]
    return [x[0] if params.slots == 1 else images.grid(list(x), _columns(params)) for x in shown]


def apng(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> bytes:
    """An animated PNG, without loss; its text chunk holds what a still one's does, and the steps of the frames."""
    of_images = facts(params, info)
    told = {**of_images[0]} if params.slots == 1 else {"images": of_images}
    return images.encode_apng(pictures(result, params), {**told, "frames": _frames(result).steps}, scale=scale)


def webp(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> bytes:
    """An animated WebP, without loss."""
    return images.encode_webp(pictures(result, params), scale=scale)


def npz(result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> bytes:
    """Raw numbers: x and x_0_hat, (F, n, C, H, W) float32, and of each frame its step and alpha_bar."""
    kept = _frames(result)
    labels: NDArray[np.int64] = np.array([-1 if label is None else label for label in params.labels])
    buffer = io.BytesIO()
    np.savez(
        buffer, x=kept.x, x_0_hat=kept.x_0_hat, step=np.array(kept.steps), alpha_bar=kept.alpha_bars,
        seed=np.array(params.seeds), label=labels,
    )  # fmt: skip
    return buffer.getvalue()


STILL = {ZIP: archive, JSON: listed, PNG: sheet}
"""Encoders by media type: (result, params, info, scale) -> bytes; of what a client likes as much the last is meant."""

MOVING = {NPZ: npz, WEBP: webp, PNG: apng, APNG: apng}
"""Those of a request that asks for frames."""
