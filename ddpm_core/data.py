"""Data sets, and the only place that knows pixel ranges: uint8 0..255 outside, float32 [-1, 1] inside.

The torchvision of the library is here, imported when a data set is asked for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from torch import Tensor


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255, clamped, rounded half to even; the inverse of to_unit."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A whole data set in memory: images (N, C, H, W) uint8, labels (N,) long, and how many classes it has."""

    name: str
    images: Tensor
    labels: Tensor
    num_classes: int

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or not len(self.images):
            raise ValueError(f"{self.name}: images must be (N, C, H, W) uint8 with N > 0")
        if len(self.labels) != len(self.images):
            raise ValueError(f"{self.name}: {len(self.images)} images but {len(self.labels)} labels")


def _mnist(root: Path, train: bool, download: bool) -> ImageSet:
    from torchvision.datasets import MNIST

    try:
        data = MNIST(str(root), train=train, download=download)
    except RuntimeError as error:
        if download:
            raise FileNotFoundError(f"MNIST could not be fetched into {root}: {error}") from error
        raise FileNotFoundError(
            f"MNIST is not under {root} (its files belong into {root / 'MNIST' / 'raw'}): "
            "name another folder with --data-root, or fetch it with --download"
        ) from error
    return ImageSet("mnist", data.data[:, None].clone(), data.targets.clone(), 10)


def _digits(root: Path, train: bool, download: bool) -> ImageSet:
    """scikit-learn's bundled 8x8 digits: real images for tests and first tries, no download, four in five to train."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images = torch.from_numpy(np.round(data.images * 255 / 16).astype(np.uint8))[:, None]
    chosen = (torch.arange(len(images)) % 5 != 0) == train
    return ImageSet("digits", images[chosen], torch.from_numpy(data.target).long()[chosen], 10)


DATASETS: dict[str, Callable[[Path, bool, bool], ImageSet]] = {"mnist": _mnist, "digits": _digits}


def load(name: str, root: Path, *, train: bool, download: bool = False) -> ImageSet:
    """A data set by its name.

    Args:
        name: a key of DATASETS.
        root: the folder that holds data sets, in torchvision's layout.
        train: the training part, else the test part.
        download: fetch it into root where it is missing.

    Raises:
        ValueError: no such data set. FileNotFoundError: its files are not there.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set {name!r}; known: {', '.join(DATASETS)}")
    return DATASETS[name](root, train, download)
