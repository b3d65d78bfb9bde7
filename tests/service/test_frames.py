"""frames: the chain as an animation or as raw numbers."""

from __future__ import annotations

import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from app.engine.runner import to_pixels
from ddpm_core.checkpoint import load_model
from ddpm_core.noise import noise
from ddpm_core.sampling import draw_noise, sample
from tests.service.conftest import Service, assert_problem, encode_grey, pixels

BODY = {"label": 3, "seed": 5, "steps": 7, "sampler": "dpmpp_2m"}
NPZ, WEBP, APNG = "application/x-npz", "image/webp", "image/apng"


def arrays(content: bytes) -> dict[str, Any]:
    with np.load(io.BytesIO(content)) as found:
        return dict(found)


def frames_of(content: bytes) -> list[np.ndarray]:
    picture = Image.open(io.BytesIO(content))
    found = []
    for i in range(picture.n_frames):
        picture.seek(i)
        found.append(np.asarray(picture.convert("L")))
    return found


def test_every_moment_is_the_library_s(service: Service, model_dir: Path) -> None:
    """x and x_0_hat after every step, to the last bit; before the first x is the noise and there is no x_0_hat."""
    response = service.generate({**BODY, "frames": 8}, accept=NPZ)
    got = arrays(response.content)
    model = load_model(model_dir)
    plan = model.plan("dpmpp_2m", 7)
    x = draw_noise([5], 0, torch.empty(0, 1, 28, 28))
    chain = list(sample(model.denoiser(model.network(torch.device("cpu"))), plan, x, [5], labels=torch.tensor([3])))
    assert got["step"].tolist() == list(range(8))
    assert np.array_equal(got["alpha_bar"], [*plan.alpha_bars, 1.0])
    assert np.array_equal(got["x"][:, 0], [noise(5, 0, (1, 28, 28)).numpy(), *(s.x[0].numpy() for s in chain)])
    assert np.array_equal(got["x_0_hat"][1:, 0], [s.x_0_hat[0].numpy() for s in chain])
    assert np.isnan(got["x_0_hat"][0]).all()
    assert (got["seed"].tolist(), got["label"].tolist()) == ([5], [3])
    assert response.content == service.generate({**BODY, "frames": 8, "response_format": "npz"}).content


def test_fewer_frames_are_spread_evenly_with_both_ends(service: Service) -> None:
    whole = arrays(service.generate({**BODY, "frames": 8}, accept=NPZ).content)
    for frames, steps in ((2, [0, 7]), (3, [0, 4, 7]), (5, [0, 2, 4, 5, 7])):
        some = arrays(service.generate({**BODY, "frames": frames}, accept=NPZ).content)
        assert some["step"].tolist() == steps
        assert np.array_equal(some["x"], whole["x"][steps])


@pytest.mark.parametrize("kind", [APNG, WEBP, "image/png"])
def test_animations_show_x_and_end_in_the_image(service: Service, kind: str) -> None:
    response = service.generate({**BODY, "frames": 8, "scale": 2}, accept=kind)
    assert response.headers["content-type"] == kind
    shown = frames_of(response.content)
    numbers = arrays(service.generate({**BODY, "frames": 8}, accept=NPZ).content)
    assert len(shown) == 8
    for picture, x in zip(shown, numbers["x"], strict=True):
        assert np.array_equal(picture[::2, ::2], to_pixels(x)[0, 0])
    assert np.array_equal(shown[-1], pixels(service.generate({**BODY, "scale": 2}).content))
    assert response.content == service.generate({**BODY, "frames": 8, "scale": 2}, accept=kind).content


def test_an_animation_is_a_png_unless_asked_otherwise_and_says_what_made_it(service: Service) -> None:
    response = service.generate({**BODY, "n": 3, "frames": 3})
    assert response.headers["content-type"] == APNG
    assert frames_of(response.content)[0].shape == (58, 58)  # a grid
    told = json.loads(Image.open(io.BytesIO(response.content)).text["ddpm"])  # type: ignore[attr-defined]
    assert told["frames"] == [0, 4, 7]
    assert [of_image["seed"] for of_image in told["images"]] == [5, 6, 7]


def test_denoise_has_frames_from_its_t(service: Service, model_dir: Path) -> None:
    response = service.request(
        "POST", "/denoise", files={"image": ("x", encode_grey())}, headers={"accept": NPZ},
        data={"t": "400", "steps": "4", "frames": "5", "seed": "1", "n": "2", "sampler": "ddim"},
    )  # fmt: skip
    got = arrays(response.content)
    assert got["x"].shape == (5, 2, 1, 28, 28)
    assert got["alpha_bar"][0] == load_model(model_dir).schedule.alphas_cumprod[400]
    assert got["alpha_bar"][-1] == 1


def test_frames_do_not_change_the_image_nor_its_company(service: Service) -> None:
    last = arrays(service.generate({**BODY, "n": 5, "frames": 2}, accept=NPZ).content)["x"][-1]
    alone = [pixels(service.generate({**BODY, "seed": 5 + i}).content) for i in range(5)]
    assert np.array_equal(to_pixels(last)[:, 0], alone)


@pytest.mark.parametrize(
    ("body", "field"),
    [
        ({"frames": 1}, "frames"),
        ({"frames": 9}, "frames"),  # of 7 steps
        ({"frames": 8, "n": 64, "scale": 16}, "frames"),  # pixels
        ({"frames": 3, "response_format": "b64_json"}, "response_format"),
        ({"response_format": "apng"}, "response_format"),
        ({"frames": 3, "previews": 1}, "previews"),
    ],
)
def test_what_does_not_go_with_frames_is_422_and_named(service: Service, body: dict[str, object], field: str) -> None:
    assert_problem(service.generate({**BODY, **body}), 422, field)


def test_what_frames_are_not_sent_as_is_406(service: Service) -> None:
    detail = assert_problem(service.generate({**BODY, "frames": 3}, accept="application/zip"), 406)["detail"]
    assert NPZ in detail


def test_frames_of_all_requests_are_bounded(make_service: Callable[..., Service]) -> None:
    """A request over the bound is 422, one beside others 429; what an answer held is given back with it."""
    service = make_service(frame_bytes=100_000)
    problem = assert_problem(service.generate({**BODY, "steps": 20, "frames": 17}), 422, "frames")
    assert "106,624 bytes" in problem["detail"]
    budget = service.app.state.frames
    assert service.generate({**BODY, "frames": 8}).status_code == 200
    assert budget.taken == 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "taken", 60_000)
        response = service.generate({**BODY, "frames": 8})
        assert "bytes of frames" in assert_problem(response, 429)["detail"]
        assert response.headers["retry-after"] == "1"
    assert_problem(service.generate({**BODY, "frames": 8, "deadline_ms": 1}), 422)
    assert budget.taken == 0
