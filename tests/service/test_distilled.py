"""A distilled model draws in its own way: whatever the preset, and in no other."""

from __future__ import annotations

import io
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_core import sampling
from ddpm_core.checkpoint import load_model
from tests.networks import call_distilled
from tests.service.conftest import Service, assert_problem
from tests.service.test_image_urls import url


@pytest.fixture
def student_dir(model_dir: Path, tmp_path: Path) -> Path:
    directory = tmp_path / "student"
    shutil.copytree(model_dir, directory)
    call_distilled(directory)
    return directory


def test_every_preset_is_the_model_s_own_way(student_dir: Path, make_service: Callable[..., Service]) -> None:
    service = make_service(model=student_dir)
    assert service.app.state.engines.default.exactness.exact
    answers = {service.generate({"seed": 4, "label": 2, **more}).content for more in (
        {}, {"sampler": "ddim"}, {"sampler": "fast"}, {"sampler": "reference"}, {"steps": 2}
    )}  # fmt: skip
    (png,) = answers
    picture = Image.open(io.BytesIO(png))
    facts = json.loads(picture.info["ddpm"])
    assert (facts["sampler"], facts["steps"]) == ("ddim", 2)
    drawn = sampling.generate(load_model(student_dir), torch.device("cpu"), [4], [2])
    assert np.array_equal(np.asarray(picture), drawn[0, 0])
    linked = service.request("GET", url(service, "ddim-2/7/5.png"))
    assert "immutable" in linked.headers["cache-control"]


def test_what_the_network_was_not_trained_for_is_refused(
    student_dir: Path, make_service: Callable[..., Service]
) -> None:
    service = make_service(model=student_dir)
    problem = assert_problem(service.generate({"sampler": "learned", "steps": 2}), 422, "sampler")
    assert "distilled for ddim with 2 steps" in json.dumps(problem)
    assert_problem(service.request("GET", url(service, "ddpm-10/7/5.png")), 422, "sampler")
    problem = assert_problem(service.generate({"steps": 10}), 422, "steps")
    assert "must be 2" in json.dumps(problem)
    problem = assert_problem(service.generate({"sampler": "ddim", "eta": 0.5}), 422, "eta")
    assert "without noise on the way" in json.dumps(problem)
    assert_problem(service.request("GET", url(service, "ddim-2/7/5.png?eta=1")), 422, "eta")
    image = io.BytesIO()
    Image.new("L", (28, 28)).save(image, "PNG")
    for sampler in ("balanced", "learned", "ddim"):
        response = service.request(
            "POST", "/denoise", files={"image": ("upload", image.getvalue())}, data={"t": "500", "sampler": sampler}
        )
        assert "cannot start at an image" in json.dumps(assert_problem(response, 422, "model"))
