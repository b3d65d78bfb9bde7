"""What a picture says of how it was made, and whether that is so: the text chunk of answers.py, read back.

Whoever has a picture can write such a chunk, so it is checked like a request, and believed only where drawing it anew
gives the same pixels.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app import answers, images
from app.drawing import to_params
from app.engine.request import GenerateParams, ModelInfo, Result
from app.errors import Invalid
from app.schemas import GenerateRequest, parse_fields
from app.settings import Settings
from ddpm_core import samplers
from ddpm_core.image_files import Pixels
from ddpm_core.noise import MAX_SEED


class CannotTell(Exception):
    """The picture cannot be drawn anew here; the message tells a person why."""


class ImageFacts(BaseModel):
    """Of one image, as answers.facts() writes them."""

    model_config = ConfigDict(extra="allow", strict=True, frozen=True, protected_namespaces=())

    model: str
    sha256: str = Field(pattern="^[0-9a-f]{64}$")
    sampler: str
    steps: int
    eta: float
    seed: int = Field(ge=0, le=MAX_SEED)
    label: int | None
    guidance_scale: float
    plan_sha256: str | None = None
    pixels_sha256: str | None = None


@dataclasses.dataclass(frozen=True)
class Claim:
    """What a picture claims: its images, and the moments of their chains where it is an animation."""

    images: tuple[ImageFacts, ...]
    frames: tuple[int, ...] | None

    @classmethod
    def of(cls, text: str | None) -> Claim:
        """From a PNG's text chunk "ddpm".

        Raises:
            Invalid: there is none, or it is not ours. CannotTell: it is not of a chain from noise.
        """
        if text is None:
            raise Invalid.field("image", "says nothing of how it was made: it has no text chunk `ddpm`")
        try:
            told = json.loads(text)
            listed = told.get("images", [told])
            if listed and all("seed" in one and "sampler" not in one for one in listed):
                raise CannotTell("it is an image of somebody's, noised: without that image nobody can tell")
            found = tuple(ImageFacts.model_validate(one) for one in listed)
            frames = told.get("frames")
            if not found or not (frames is None or (frames and all(type(step) is int for step in frames))):
                raise ValueError("no images")
        except (ValueError, TypeError, AttributeError, ValidationError):
            raise Invalid.field("image", "its text chunk `ddpm` is not one that this service writes") from None
        return cls(found, None if frames is None else tuple(frames))

    def params(self, info: ModelInfo, settings: Settings, request_id: str, flow: str) -> GenerateParams:
        """The request that would draw it.

        Raises:
            Invalid: a fact is out of range, or more is asked for than a request may. CannotTell.
        """
        first = self.images[0]
        shared = ("sha256", "sampler", "steps", "eta", "plan_sha256", "pixels_sha256")
        if any(getattr(one, name) != getattr(first, name) for one in self.images for name in shared):
            raise CannotTell("its images are not of one request")
        if first.pixels_sha256 is not None:
            raise CannotTell("it was drawn from somebody's image: without that image nobody can tell")
        if first.sampler == samplers.LEARNED and first.plan_sha256 != info.learned.get(first.steps):
            raise CannotTell("it was drawn by a learned plan that is not here any more")
        scales = {one.guidance_scale for one in self.images if one.label is not None} or {1.0}
        if len(scales) > 1:
            raise CannotTell("its images are not of one request")
        asked = {
            "n": len(self.images), "label": [one.label for one in self.images], "sampler": first.sampler,
            "steps": first.steps, "eta": first.eta, "guidance_scale": scales.pop(),
        }  # fmt: skip
        params = to_params(parse_fields(asked, GenerateRequest), info, settings, request_id, flow)
        if self.frames is not None and self.frames != tuple(sorted({*self.frames} & {*range(params.steps + 1)})):
            raise Invalid.field("image", "its frames are not moments of its chain")
        return dataclasses.replace(params, seeds=tuple(one.seed for one in self.images), frames=self.frames or ())


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between a picture and what was drawn anew."""

    pixels: int  # that differ
    largest: int  # of any colour, 0 .. 255


def scale_of(shown: Sequence[Pixels], params: GenerateParams, info: ModelInfo) -> int:
    """How many times a picture is enlarged. Raises CannotTell where it is no multiple of what its images take."""
    _, height, width = info.image_shape
    columns = math.ceil(math.sqrt(params.slots))
    rows = -(-params.slots // columns)
    gap = images.GRID_PAD
    own = (rows * (height + gap) - gap, columns * (width + gap) - gap)
    found = shown[0].shape[1:]
    scale = int(found[0]) // own[0]
    if not scale or found != (own[0] * scale, own[1] * scale):
        raise CannotTell(f"it is {found[1]} x {found[0]} pixels, no multiple of {own[1]} x {own[0]}: it was changed")
    return scale


def compare(shown: Sequence[Pixels], result: Result, params: GenerateParams, info: ModelInfo, scale: int) -> Difference:
    """A picture's frames, (C, H, W) each, and those of what was drawn anew."""
    encode = answers.apng if params.frames else answers.sheet
    drawn = images.Upload(encode(result, params, info, scale), 2**31).frames()
    if len(drawn) != len(shown) or drawn[0].shape != shown[0].shape:
        raise CannotTell("it has other frames or colours than what it says: it was changed")
    apart = [np.abs(a.astype(np.int16) - b).max(axis=0) for a, b in zip(shown, drawn, strict=True)]
    return Difference(int(sum((one > 0).sum() for one in apart)), int(max(one.max() for one in apart)))


def told(facts: Claim) -> list[dict[str, Any]]:
    """The facts, as JSON."""
    return [one.model_dump(exclude_none=False) for one in facts.images]
