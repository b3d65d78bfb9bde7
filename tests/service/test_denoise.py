"""POST /denoise: an image noised to t and drawn anew from there."""

from __future__ import annotations

import io
import json

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_core import data
from ddpm_core.checkpoint import load_model
from ddpm_core.diffusion import q_sample
from ddpm_core.noise import noise
from ddpm_core.sampling import sample
from tests.service.conftest import Service, assert_problem, encode, pixels

PICTURE = np.random.default_rng(1).integers(0, 256, (28, 28), dtype=np.uint8)
UPLOAD = encode(Image.fromarray(PICTURE))


def denoise(service: Service, image: bytes = UPLOAD, headers: dict[str, str] | None = None, **fields: object):  # type: ignore[no-untyped-def]
    text = {k: str(v) for k, v in fields.items()}
    return service.request("POST", "/denoise", files={"image": ("upload", image)}, data=text, headers=headers)


def test_it_is_the_forward_process_and_then_the_chain_from_t(service: Service, model_dir) -> None:  # type: ignore[no-untyped-def]
    model = load_model(model_dir)
    x_0 = data.to_unit(torch.from_numpy(PICTURE)[None, None])
    x = q_sample(x_0, noise(5, 0, (1, 28, 28))[None], float(model.schedule.alphas_cumprod[400]))
    plan = model.plan("ddim", 4, eta=0.5, start=400)
    assert plan.timesteps[0] == 400
    *_, last = sample(model.denoiser(model.network(torch.device("cpu"))), plan, x, [5], labels=torch.tensor([3]))
    response = denoise(service, t=400, seed=5, label=3, sampler="ddim", steps=4, eta=0.5)
    assert response.status_code == 200, response.text
    assert np.array_equal(pixels(response.content), data.to_uint8(last.x)[0, 0].numpy())
    assert response.headers["x-seed"] == "5"


def test_the_same_request_gives_the_same_bytes_alone_or_in_a_set(service: Service) -> None:
    how = {"t": 300, "steps": 3, "sampler": "ddpm"}
    one = denoise(service, seed=8, label=2, **how)
    answer = denoise(service, headers={"accept": "application/json"}, seed=7, n=3, label="1,2,null", **how).json()
    assert [image["label"] for image in answer["images"]] == [1, 2, None]
    import base64

    assert base64.b64decode(answer["images"][1]["b64_json"]) == one.content
    other = denoise(service, encode(Image.fromarray(255 - PICTURE)), seed=8, label=2, **how)
    assert other.content != one.content


def test_the_text_chunk_tells_where_it_started(service: Service) -> None:
    facts = json.loads(Image.open(io.BytesIO(denoise(service, t=9, steps=2).content)).info["ddpm"])
    assert facts["t"] == 9
    assert len(facts["pixels_sha256"]) == 64


def test_steps_are_the_samplers_own_as_far_as_there_are_so_many(service: Service) -> None:
    def steps(**fields: object) -> int:
        found: int = denoise(service, headers={"accept": "application/json"}, **fields).json()["steps"]
        return found

    assert steps(t=999) == 10
    assert steps(t=3) == 4
    assert steps(t=0) == 1
    assert steps(t=5, sampler="ddpm") == 6


def test_any_picture_is_fitted_to_the_model(service: Service) -> None:
    upload = encode(Image.new("RGBA", (80, 50), (200, 30, 30, 128)))
    assert pixels(denoise(service, upload, t=100, steps=1, scale=2).content).shape == (56, 56)


def test_progress_can_be_watched(service: Service) -> None:
    response = denoise(service, headers={"accept": "text/event-stream"}, t=100, steps=3, previews=1)
    assert response.text.count("event: progress") == 4
    assert "event: completed" in response.text


@pytest.mark.parametrize(
    ("fields", "field"),
    [
        ({}, "t"),
        ({"t": 1000}, "t"),
        ({"t": -1}, "t"),
        ({"t": "1,2"}, "t"),
        ({"t": "x"}, "t"),
        ({"t": 3, "steps": 5}, "steps"),
        ({"t": 3, "label": "seven"}, "label"),
        ({"t": 3, "label": 10}, "label"),
        ({"t": 3, "n": 2, "label": "1"}, None),
        ({"t": 3, "n": 3, "label": "1,2"}, "label"),
        ({"t": 3, "fit": "model"}, "fit"),
        ({"t": 3, "n": 65}, "n"),
        ({"t": 3, "previews": 1}, "previews"),
        ({"t": 3, "eta": 0.5}, "eta"),
    ],
)
def test_a_bad_field_is_422_and_named(service: Service, fields: dict[str, object], field: str | None) -> None:
    response = denoise(service, **fields)
    if field is None:
        assert response.status_code == 200
    else:
        assert_problem(response, 422, field)


def test_what_is_no_image_is_422_and_what_is_no_form_415(service: Service) -> None:
    assert_problem(denoise(service, b"not an image", t=3), 422, "image")
    assert_problem(service.request("POST", "/denoise", json={"t": 3}), 415)
    assert_problem(service.request("POST", "/denoise", files={"other": b"x"}, data={"t": "3"}), 422, "image")
    assert_problem(denoise(service, t=3, headers={"accept": "text/html"}), 406)
