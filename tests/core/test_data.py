"""Data sets and pixel ranges."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torchvision.datasets import MNIST

from ddpm_core import data
from ddpm_core.data import ImageSet


def test_pixels_map_to_minus_1_and_1_and_back_without_loss() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = data.to_unit(pixels)
    assert unit.dtype == torch.float32
    assert (float(unit[0]), float(unit[255])) == (-1, 1)
    assert torch.allclose(unit.diff(), torch.tensor(2 / 255))
    assert torch.equal(data.to_uint8(unit), pixels)


def test_what_lies_outside_is_clamped() -> None:
    x = torch.tensor([-7.0, -1.001, 0.0, 1.001, 7.0])
    assert data.to_uint8(x).tolist() == [0, 0, 128, 255, 255]


def test_the_digits_parts_are_disjoint_and_whole() -> None:
    train, test = (data.load("digits", Path(), train=part) for part in (True, False))
    assert len(train.images) + len(test.images) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    assert train.labels.unique().tolist() == list(range(10))


def test_an_unknown_data_set_names_the_known_ones() -> None:
    with pytest.raises(ValueError, match="no data set 'imagenet'; known: mnist, digits"):
        data.load("imagenet", Path(), train=True)


def test_a_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: MNIST) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz: no route to host")

    monkeypatch.setattr(MNIST, "download", fail)
    with pytest.raises(FileNotFoundError, match="no route to host"):
        data.load("mnist", tmp_path, train=True, download=True)
    with pytest.raises(FileNotFoundError, match="--download"):
        data.load("mnist", tmp_path, train=True)


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"images": torch.zeros(2, 8, 8, dtype=torch.uint8)}, "must be"),
        ({"images": torch.zeros(2, 1, 8, 8)}, "uint8"),
        ({"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}, "N > 0"),
        ({"labels": torch.zeros(3)}, "2 images but 3 labels"),
    ],
)
def test_images_of_another_form_are_refused(fields: dict[str, Any], reason: str) -> None:
    good = {"name": "x", "images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "labels": torch.zeros(2)}
    with pytest.raises(ValueError, match=reason):
        ImageSet(**{**good, **fields}, num_classes=1)
