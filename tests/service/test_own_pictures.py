"""From a folder of one's own colour pictures to pictures served: the training command line, then the real service."""

from __future__ import annotations

import base64
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ddpm_core import train
from tests.pictures import write_folder
from tests.service.conftest import Service, assert_problem, encode, pixels

DISCS, SQUARES = 0, 1  # the labels: red discs, blue squares


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The model directory of a short run on 16 x 16 pictures, red discs and blue squares on white."""
    folder = tmp_path_factory.mktemp("own")
    pictures = write_folder(folder / "pictures")
    arguments = ["--data", "folder", "--data-root", str(pictures), "--out", str(folder / "run"), "--recipe", "fast"]
    size = ["--channels", "8", "16", "--batch-size", "32", "--steps", "100", "--lr", "5e-3", "--warmup-steps", "10"]
    assert train.main([*arguments, *size, "--device", "cpu", "--no-compile", "--no-bf16"]) == 0
    return folder / "run" / "model"


@pytest.fixture
def service(trained: Path, make_service: Callable[..., Service]) -> Service:
    return make_service(model=trained)


def test_a_model_of_ones_own_pictures_draws_them_in_colour(service: Service) -> None:
    response = service.generate({"label": DISCS, "seed": 1})
    assert (response.status_code, response.headers["content-type"]) == (200, "image/png")
    assert pixels(response.content).shape == (16, 16, 3)
    assert_problem(service.generate({"label": 2}), 422, "label")

    redness = {}
    for label in (DISCS, SQUARES):
        grid = pixels(service.generate({"n": 9, "label": label, "seed": 1}).content).astype(float)
        assert grid.shape == (3 * 18 - 2, 3 * 18 - 2, 3)
        redness[label] = (grid[..., 0] - grid[..., 2]).mean()
    assert redness[DISCS] > 0 > redness[SQUARES]

    (capable,) = service.request("GET", "/capabilities").json()["models"]
    assert capable["class_names"] == ["discs", "squares"]
    asked = service.request("POST", "/v1/images/generations", json={"prompt": "a red disc", "seed": 1}).json()
    assert base64.b64decode(asked["data"][0]["b64_json"]) == response.content

    photo = encode(Image.fromarray(np.random.default_rng(0).integers(0, 256, (30, 40), dtype=np.uint8)), "JPEG")
    for kind in ("model", "none"):
        noised = service.noise(photo, t=300, fit=kind, seed=1)
        assert noised.status_code == 200
        assert pixels(noised.content).shape == {"model": (16, 16, 3), "none": (30, 40)}[kind]
