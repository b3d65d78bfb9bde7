"""Which images are drawn to measure a model, and which are bounded: by whom, from which seeds, with which labels."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_core import data
from ddpm_core.checkpoint import Model
from ddpm_core.likelihood import Bound, bits_per_dimension
from ddpm_core.noise import MAX_SEED
from ddpm_core.parallel import ONE, Ranks
from ddpm_core.sampling import OnBatch, generate


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is drawn and how.

    The samples are drawn `repeats` times, each time from seeds of their own; after each come a fifth as many with
    "no label". Image i of repeat r has the seed `seed + r * (samples + unlabelled) + i` and the label of a training
    image, so that the classes have the data's own shares: equal shares would cost a perfect model as much FID as the
    floor has. The floor is the mean over up to evaluation.FLOOR_SETS disjoint sets of `samples` training images; where
    there are fewer images, over all of them. Which ones is fixed by `seed`.

    Raises:
        ValueError: a number outside its range.
    """

    samples: int = 10_000
    sampler: str = "balanced"
    steps: int | None = None
    guidance_scale: float = 1.0
    seed: int = 0
    repeats: int = 3

    def __post_init__(self) -> None:
        if self.repeats < 1:
            raise ValueError(f"repeats={self.repeats} must be 1 or more")
        if not math.isfinite(self.guidance_scale):
            raise ValueError(f"guidance_scale={self.guidance_scale} must be a finite number")
        last = self.seed + self.repeats * (self.samples + self.unlabelled) - 1
        if not 0 <= self.seed <= last <= MAX_SEED:
            raise ValueError(f"seed={self.seed} must be 0 or more, and the last image's, {last}, at most {MAX_SEED}")

    @property
    def how(self) -> dict[str, Any]:
        """What sampling.generate needs to know besides seeds and labels."""
        return {"sampler": self.sampler, "steps": self.steps, "guidance_scale": self.guidance_scale}

    @property
    def unlabelled(self) -> int:
        """How many images a repeat draws without a label."""
        return self.samples // 5

    @property
    def bound_images(self) -> int:
        """Of how many test images, and of how many training images, the likelihood is bounded."""
        return self.samples // 5


def shuffled(images: data.ImageSet, seed: int) -> Tensor:
    """(N,) an order of the images that is fixed by the seed."""
    return torch.randperm(len(images.images), generator=torch.Generator().manual_seed(seed))


def asked_labels(model: Model, train: data.ImageSet, samples: int, seed: int, repeat: int = 0) -> list[int | None]:
    """Labels of so many training images, others for each repeat as far as there are enough; None: takes no labels."""
    if not model.takes_labels:
        return [None] * samples
    places = torch.arange(repeat * samples, (repeat + 1) * samples) % len(train.images)
    labels: list[int | None] = train.labels[shuffled(train, seed)[places]].tolist()
    return labels


def draw(
    model: Model,
    train: data.ImageSet,
    protocol: Protocol,
    device: torch.device,
    on_batch: OnBatch | None = None,
    ranks: Ranks = ONE,
) -> Iterator[tuple[list[int | None], Tensor, Tensor]]:
    """Repeat by repeat: the labels asked for, the images drawn with them, and those drawn with "no label"."""
    n, more = protocol.samples, protocol.unlabelled
    for repeat in range(protocol.repeats):
        first = protocol.seed + repeat * (n + more)
        asked = asked_labels(model, train, n, protocol.seed, repeat)
        seeds = range(first, first + n)
        images = generate(model, device, seeds, asked, **protocol.how, on_batch=on_batch, ranks=ranks)
        seeds = range(first + n, first + n + more)
        # where every image needs a label, those of training images give the same marginal distribution
        no_labels = asked_labels(model, train, more, protocol.seed, repeat) if model.needs_label else [None] * more
        unlabelled = generate(model, device, seeds, no_labels, **protocol.how, on_batch=on_batch, ranks=ranks)
        yield asked, images, unlabelled


def bounds(
    model: Model,
    parts: Sequence[data.ImageSet],
    protocol: Protocol,
    device: torch.device,
    on_batch: OnBatch | None = None,
    ranks: Ranks = ONE,
) -> list[Bound | None]:
    """The likelihood of each part's images; None: a distilled model has none."""

    def bound(images: data.ImageSet) -> Bound | None:
        if model.distilled_steps is not None:
            return None
        chosen = shuffled(images, protocol.seed)[: protocol.bound_images]
        labels = images.labels[chosen] if model.takes_labels else None
        return bits_per_dimension(
            model, device, images.images[chosen], labels, seed=protocol.seed, on_batch=on_batch, ranks=ranks
        )

    return [bound(part) for part in parts]


def assist(
    model: Model, train: data.ImageSet, test: data.ImageSet, protocol: Protocol, device: torch.device, ranks: Ranks
) -> None:
    """What every rank but 0 does of evaluate(): it draws and bounds its share of the batches."""
    for _ in draw(model, train, protocol, device, ranks=ranks):
        pass
    bounds(model, (test, train), protocol, device, ranks=ranks)
