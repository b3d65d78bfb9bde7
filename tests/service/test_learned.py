"""sampler: "learned", on a model that has such plans and on one that has none."""

from __future__ import annotations

import dataclasses
import io
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from app.drawing import to_params
from app.errors import Invalid
from app.schemas import GenerateRequest
from ddpm_core import sampling
from ddpm_core.checkpoint import load_model
from tests.service.conftest import Service, assert_problem
from tests.service.test_image_urls import url


def test_a_learned_plan_is_served_and_named_by_its_digest(service: Service, model_dir: Path) -> None:
    response = service.generate({"sampler": "learned", "seed": 4, "label": 2})
    assert response.status_code == 200, response.text
    picture = Image.open(io.BytesIO(response.content))
    facts = json.loads(picture.info["ddpm"])
    model = load_model(model_dir)
    assert (facts["sampler"], facts["steps"], facts["plan_sha256"]) == ("learned", 3, model.learned[3].sha256)
    drawn = sampling.generate(model, torch.device("cpu"), [4], [2], sampler="learned")
    assert np.array_equal(np.asarray(picture), drawn[0, 0])
    assert "plan_sha256" not in Image.open(io.BytesIO(service.generate({"seed": 4}).content)).info["ddpm"]


def test_its_url_is_not_for_ever_since_plans_may_be_fitted_anew(service: Service) -> None:
    response = service.request("GET", url(service, "learned-3/7/5.png"))
    assert response.status_code == 200, response.text
    assert response.headers["cache-control"] == "no-cache"


def test_other_steps_and_other_starts_are_refused(service: Service) -> None:
    problem = assert_problem(service.generate({"sampler": "learned", "steps": 5}), 422, "steps")
    assert "must be one of 3" in json.dumps(problem)
    assert_problem(service.request("GET", url(service, "learned-5/7/5.png")), 422, "steps")
    image = io.BytesIO()
    Image.new("L", (28, 28)).save(image, "PNG")
    files, data = {"image": ("upload", image.getvalue())}, {"t": "500", "sampler": "learned"}
    problem = assert_problem(service.request("POST", "/denoise", files=files, data=data), 422, "sampler")
    assert "pure noise" in json.dumps(problem)


def test_a_model_without_learned_plans_says_what_it_knows(service: Service) -> None:
    info = dataclasses.replace(service.app.state.engines.default.info, learned={})
    with pytest.raises(Invalid) as refused:
        to_params(GenerateRequest(sampler="learned"), info, service.app.state.settings, "id")
    assert "not known; known: ddpm, ddim" in json.dumps(refused.value.errors)
    assert refused.value.errors[0]["field"] == "sampler"


def test_a_preset_is_no_url_of_an_image(service: Service) -> None:
    problem = assert_problem(service.request("GET", url(service, "fast-5/7/5.png")), 422, "sampler")
    assert "preset" in json.dumps(problem)
