"""What the engine is asked for and what it answers: plain values, no torch, no HTTP."""

from __future__ import annotations

import dataclasses

import numpy as np
from numpy.typing import NDArray


class EngineError(Exception):
    """The engine refuses or fails a request."""


class EngineBusy(EngineError):
    """The queue has no room for the request's images now."""

    def __init__(self, slots: int, limit: int, retry_after_s: int) -> None:
        super().__init__(f"{slots} of {limit} image slots are taken")
        self.retry_after_s = retry_after_s


class EngineNotReady(EngineError):
    """The engine is starting, draining, or has failed."""


class DuplicateRequest(EngineError):
    """A request of this id is in flight."""


@dataclasses.dataclass(frozen=True)
class GenerateParams:
    """One request: len(seeds) images, each a function of its own seed and label and of what they share."""

    request_id: str
    seeds: tuple[int, ...]
    labels: tuple[int | None, ...]
    sampler: str
    steps: int
    eta: float
    guidance_scale: float

    @property
    def slots(self) -> int:
        return len(self.seeds)


@dataclasses.dataclass(frozen=True)
class Result:
    """The images, uint8 (n, C, H, W), and where the time went."""

    images: NDArray[np.uint8]
    queue_s: float
    denoise_s: float


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What the outside needs to know of the loaded model to check requests and to label answers."""

    name: str
    sha256: str
    device: str
    image_shape: tuple[int, int, int]  # (C, H, W)
    num_train_steps: int  # T
    num_classes: int  # 0: unconditional
    alphas_cumprod: NDArray[np.float64]  # (T,)

    @property
    def id(self) -> str:
        """name@first 12 of the weights' sha256."""
        return f"{self.name}@{self.sha256[:12]}"
