"""What the engine is asked for and what it answers: plain values, no torch, no HTTP."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

Status = Literal["starting", "ok", "draining", "failed"]
"""Of an engine."""


class EngineError(Exception):
    """The engine refuses or fails a request."""

    reason = "failed"  # by which refusals are counted
    wait_s = math.inf  # until it might be accepted, as far as that is known


class EngineBusy(EngineError):
    """There is no room for the request's images now. `reason` is one of queue_full, queue_long, key_full."""

    def __init__(self, reason: str, message: str, wait_s: float) -> None:
        super().__init__(reason, message, wait_s)  # all of them: it can be pickled
        self.reason, self.message, self.wait_s = reason, message, wait_s

    def __str__(self) -> str:
        return self.message

    @property
    def retry_after_s(self) -> int:
        return max(1, math.ceil(self.wait_s))


class EngineNotReady(EngineError):
    """The engine is starting, draining, or has failed."""

    reason = "not_ready"


class DuplicateRequest(EngineError):
    """A request of this id is in flight."""

    reason = "duplicate_id"


class DeadlineTooSoon(EngineError):
    """The deadline cannot be met, by what steps take and what is before it."""

    reason = "deadline"

    def __init__(self, needed_s: float, alone_s: float) -> None:
        super().__init__(needed_s, alone_s)
        self.needed_s, self.alone_s, self.wait_s = needed_s, alone_s, needed_s

    def __str__(self) -> str:
        return (
            f"about {self.needed_s * 1000:.0f} ms are needed now, {self.alone_s * 1000:.0f} ms with nothing before it"
        )


class DeadlinePassed(EngineError):
    """It was accepted, and its time ran out."""


class Cancelled(EngineError):
    """Its client left or ended it."""


@dataclasses.dataclass(frozen=True)
class Start:
    """Where a chain starts that does not start from pure noise: an image, noised to t."""

    pixels: NDArray[np.uint8]  # (C, H, W)
    t: int


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
    start: Start | None = None
    previews: int = 0  # every how many steps of an image its x_0_hat is wanted; 0: never
    frames: tuple[int, ...] = ()  # after which steps x and x_0_hat are kept for the answer; 0: where the chain starts
    deadline_s: float | None = None  # from now
    flow: str = ""  # whose share of the machine it uses; no "/"

    @staticmethod
    def key_of(flow: str, request_id: str) -> str:
        """A request's name in the engine: clients of one key cannot meet the requests of another."""
        return f"{flow}/{request_id}"

    @property
    def key(self) -> str:
        return self.key_of(self.flow, self.request_id)

    @property
    def slots(self) -> int:
        return len(self.seeds)

    def guided(self, index: int) -> bool:
        """Whether an image has guidance: then its step costs two network rows."""
        return self.guidance_scale != 1 and self.labels[index] is not None

    @property
    def images(self) -> list[tuple[int, int]]:
        """(network rows of a step, steps) of every image, as the scheduler wants them."""
        return [(2 if self.guided(i) else 1, self.steps) for i in range(self.slots)]


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a request is, after a step that some of its images made."""

    step: int  # 0 .. steps; of several images the mean, rounded down
    steps: int
    queue_position: int  # requests that go before it; 0 once it has begun
    eta_s: float
    begun: bool = True
    previews: tuple[tuple[int, NDArray[np.uint8]], ...] = ()  # (index, x_0_hat as pixels (C, H, W))


@dataclasses.dataclass(frozen=True)
class Frames:
    """What was kept of the chains: F moments of n images."""

    steps: tuple[int, ...]  # made until then
    alpha_bars: NDArray[np.float64]  # (F,), of x
    x: NDArray[np.float32]  # (F, n, C, H, W)
    x_0_hat: NDArray[np.float32]  # (F, n, C, H, W), which x came from; NaN before the first step


@dataclasses.dataclass(frozen=True)
class Result:
    """The images, and where the time went."""

    x: NDArray[np.float32]  # (n, C, H, W), the chain's last x
    images: NDArray[np.uint8]  # (n, C, H, W), the same as pixels
    queue_s: float  # until the first image's first step
    denoise_s: float
    frames: Frames | None = None  # where any were asked for


@dataclasses.dataclass(frozen=True)
class ModelInfo:
    """What the outside needs to know of the loaded model to check requests and to label answers."""

    name: str
    sha256: str
    device: str
    image_shape: tuple[int, int, int]  # (C, H, W)
    num_train_steps: int  # T
    num_classes: int  # 0: it takes no labels
    alphas_cumprod: NDArray[np.float64]  # (T,)
    runtime: str  # what runs the network: torch or onnxruntime
    learned: Mapping[int, str] = dataclasses.field(default_factory=dict)  # sha256 of each learned plan, by its steps
    distilled_steps: int | None = None  # of ddim, for which alone the network is trained
    unlabelled: bool = True  # whether it draws without a label
    class_names: tuple[str, ...] = ()  # of the labels, where they have other names than their numbers

    @property
    def version(self) -> str:
        """First 12 of the weights' sha256."""
        return self.sha256[:12]

    @property
    def id(self) -> str:
        """name@version."""
        return f"{self.name}@{self.version}"

    @property
    def labels(self) -> str:
        """What labels there are, for people."""
        allowed = f"0 .. {self.num_classes - 1}" if self.num_classes else "none: this model is unconditional"
        return f"{self.name}; allowed: {allowed}{', or null' if self.unlabelled else ''}"

    @property
    def plain_label(self) -> int | None:
        """What the plainest image is drawn with."""
        return None if self.unlabelled else 0

    @property
    def guidance(self) -> bool:
        """Whether it can be guided: it draws with a label and without."""
        return self.unlabelled and self.num_classes > 0


@dataclasses.dataclass(frozen=True)
class Exactness:
    """Whether an image's bytes are its own, whatever shares its batches: what was found on this machine."""

    exact: bool
    rows_multiple: int  # network calls are padded to a multiple of so many rows
    checked_rows: tuple[int, ...]  # the batch sizes that were compared, bit by bit
    fingerprint: str | None = None  # of the bits themselves: machines that have the same one draw the same bytes
    alike: bool = True  # whether every replica has the same one

    @classmethod
    def of_all(cls, found: Sequence[Exactness]) -> Exactness:
        """What holds of a model that several replicas serve, one at least: exact where all are, and draw the same."""
        first = next((one for one in found if not one.exact), found[0])
        if len({one.fingerprint for one in found}) > 1:
            return dataclasses.replace(first, exact=False, fingerprint=None, alike=False)
        return first

    @property
    def how(self) -> str:
        """The same for people."""
        if not self.checked_rows:
            return "not exact: not asked for (DDPM_EXACT=false)"
        if not self.alike:
            return "not exact: the replicas draw different bits; give them the same hardware and software"
        if not self.exact:
            return "not exact: on this device the bits of a row depend on the rows beside it"
        if self.checked_rows == (1,):
            return "exact: every call has one row"
        if self.rows_multiple == 1:
            return f"exact at all {len(self.checked_rows)} batch sizes tried, 1 to {self.most_rows} rows"
        if self.rows_multiple == max(self.checked_rows):
            return f"exact with every call padded to {self.rows_multiple} rows"
        return f"exact with calls padded to a multiple of {self.rows_multiple} rows"

    @property
    def most_rows(self) -> int:
        """The most network rows that a call may have for this to hold."""
        return max(self.checked_rows, default=2**31)


@dataclasses.dataclass(frozen=True)
class ReplicaState:
    """How one of the engines that serve a model is."""

    name: str  # its device, or what its cluster calls it
    status: Status
    slots_running: int  # images that have begun
    slots_waiting: int  # images that have not
    slots_limit: int
    rows_limit: int  # network rows of a full step; 0: not known yet
    exactness: Exactness | None  # None: not known yet
