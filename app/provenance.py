"""What a picture says of how it was made, and whether that is so: the text chunk of answers.py, read back.

Whoever has a picture can write such a chunk, so it is checked like a request, and believed only where drawing it anew
gives the same pixels.
"""

from __future__ import annotations

import dataclasses
import itertools
import json

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from app import answers, images
from app.drawing import kept_bytes, to_params
from app.engine.request import GenerateParams, ModelInfo, Result
from app.errors import Invalid
from app.schemas import MOST_SCALE, GenerateRequest, parse_fields
from app.settings import Settings
from ddpm_core import samplers
from ddpm_core.image_files import Pixels
from ddpm_core.noise import MAX_SEED


class CannotTell(Exception):
    """The picture cannot be drawn anew here; the message tells a person why."""


class ImageFacts(BaseModel):
    """Of one image, as answers.facts() writes them."""

    model_config = ConfigDict(extra="ignore", strict=True, frozen=True, protected_namespaces=())

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
    frames: tuple[int, ...]

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
            frames = tuple(told.get("frames", ()))
            if not found or ("frames" in told and not frames) or any(type(step) is not int for step in frames):
                raise ValueError("not ours")
        except (ValueError, TypeError, AttributeError, RecursionError, ValidationError):
            raise Invalid.field("image", "its text chunk `ddpm` is not one that this service writes") from None
        return cls(found, frames)

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
        if self.frames != tuple(sorted({*self.frames} & {*range(params.steps + 1)})):
            raise Invalid.field("image", "its frames are not moments of its chain")
        if kept_bytes(params.slots * len(self.frames), info) > settings.frame_bytes_of_key:
            raise Invalid.field("image", "it has more frames than a request may ask for here")
        return dataclasses.replace(params, seeds=tuple(one.seed for one in self.images), frames=self.frames)


@dataclasses.dataclass(frozen=True)
class Difference:
    """Between a picture and what was drawn anew."""

    pixels: int  # that differ
    largest: int  # of any colour, 0 .. 255


def scale_of(upload: images.Upload, params: GenerateParams, info: ModelInfo) -> int:
    """How many times a picture is enlarged, by its header.

    Raises:
        CannotTell: it is no multiple of what its images take, or has more frames than it says.
    """
    height, width = answers.sheet_shape(params, info)
    found_width, found_height = upload.size
    scale = found_height // height
    if not 1 <= scale <= MOST_SCALE or (found_height, found_width) != (height * scale, width * scale):
        raise CannotTell(
            f"it is {found_width} x {found_height} pixels, no multiple of {width} x {height} up to {MOST_SCALE} times: "
            "it was changed"
        )
    if upload.n_frames > max(1, len(params.frames)):
        raise CannotTell(f"it has {upload.n_frames} frames, more than it says: it was changed")
    return scale


def compare(upload: images.Upload, result: Result, params: GenerateParams, scale: int) -> Difference:
    """A picture's frames and those that were drawn anew, one at a time.

    Raises:
        CannotTell: they are not alike in number or colours. BadImage: it is damaged.
    """
    drawn = [next(same) for _, same in itertools.groupby(answers.pictures(result, params), lambda one: one.tobytes())]
    if len(drawn) != upload.n_frames:  # equal ones that follow each other are one in a file
        raise CannotTell(f"it has {upload.n_frames} frames, not {len(drawn)}: it was changed")
    pixels = largest = 0
    for index, picture in enumerate(drawn):
        apart = _apart(upload.frame(index), picture, scale)
        pixels, largest = pixels + int((apart > 0).sum()), max(largest, int(apart.max()))
    return Difference(pixels, largest)


def _apart(shown: Pixels, drawn: Pixels, scale: int) -> Pixels:
    """How far each pixel is, by the colour that is farthest; (H, W)."""
    if len(shown) != len(drawn):
        raise CannotTell("it has other colours than what it says: it was changed")
    enlarged = drawn.repeat(scale, axis=1).repeat(scale, axis=2)
    apart: Pixels = np.maximum(shown, enlarged) - np.minimum(shown, enlarged)
    out: Pixels = apart.max(axis=0)
    return out
