"""Directories that diffusers saved, served: in colour, of any labels, by an id of the hub; the pixels are theirs."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import DDIMPipeline, DDIMScheduler, DDPMPipeline, DDPMScheduler, UNet2DModel

from app.engine.runner import read
from ddpm_core.checkpoint import CheckpointError, load_model
from ddpm_core.noise import noise
from tests.service.conftest import Service, assert_problem, encode_grey, pixels
from tests.service.process import server

SHAPE = (3, 16, 16)
REVISION = "0123456789abcdef0123456789abcdef01234567"


def net_of(classes: int | None = None, channels: int = 3) -> UNet2DModel:
    torch.manual_seed(0)
    net = UNet2DModel(
        sample_size=16, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=None,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        num_class_embeds=classes, in_channels=channels, out_channels=channels,
    )  # fmt: skip
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return net.eval()


@torch.inference_mode()
def drawn_by_diffusers(net: UNet2DModel, scheduler: DDIMScheduler, seed: int, label: int | None) -> np.ndarray:
    """10 steps of DDIM from our x_T; uint8 (H, W, C)."""
    scheduler.set_timesteps(10)
    x = noise(seed, 0, SHAPE)[None]
    labels = None if label is None else torch.tensor([label])
    for t in scheduler.timesteps:
        x = scheduler.step(net(x, t, class_labels=labels).sample, t, x, use_clipped_model_output=True).prev_sample
    grey_levels: np.ndarray = ((x[0].clamp(-1, 1) + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()
    return grey_levels


def assert_alike(content: bytes, wanted: np.ndarray) -> None:
    """To one grey level: their float32 rounds elsewhere."""
    apart = np.abs(pixels(content).astype(int) - wanted.astype(int))
    assert apart.max() <= 1
    assert (apart > 0).mean() < 0.02
    assert wanted.std() > 10


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
def test_an_unconditional_colour_model(make_service: Callable[..., Service], tmp_path: Path, flat: bool) -> None:
    net, scheduler = net_of(), DDIMScheduler(beta_schedule="squaredcos_cap_v2")
    if flat:
        net.save_pretrained(tmp_path / "theirs")
        scheduler.save_pretrained(tmp_path / "theirs")
    else:
        DDIMPipeline(net, scheduler).save_pretrained(tmp_path / "theirs")
    service = make_service(model=tmp_path / "theirs")
    body = {"seed": 4, "sampler": "ddim", "steps": 10}
    assert_alike(service.generate(body).content, drawn_by_diffusers(net, scheduler, 4, None))
    assert_problem(service.generate({**body, "label": 0}), 422, "label")
    assert_problem(service.generate({**body, "label": None, "guidance_scale": 2}), 422, "guidance_scale")
    noised = service.noise(encode_grey(), t=500, fit="model", seed=1)
    assert pixels(noised.content).shape == (16, 16, 3)
    (told,) = service.request("GET", "/capabilities").json()["models"]
    assert (told["image_shape"], told["num_classes"], told["unlabelled"]) == ([3, 16, 16], 0, True)
    assert service.app.state.engines.default.exactness.exact


def test_a_class_conditional_one_draws_with_a_label_alone(
    make_service: Callable[..., Service], tmp_path: Path
) -> None:  # fmt: skip
    """diffusers knows no label that means none: every index is a class, there is no guidance, and null is refused."""
    net, scheduler = net_of(classes=4), DDPMScheduler(variance_type="fixed_large")
    DDPMPipeline(net, scheduler).save_pretrained(tmp_path / "pets")
    service = make_service(model=tmp_path / "pets")
    body: dict[str, Any] = {"seed": 4, "sampler": "ddim", "steps": 10}
    ddim = DDIMScheduler.from_config(scheduler.config, set_alpha_to_one=True)
    pictures = []
    for label in range(4):
        pictures.append(drawn_by_diffusers(net, ddim, 4, label))
        assert_alike(service.generate({**body, "label": label}).content, pictures[-1])
    assert all((pictures[0] != other).any() for other in pictures[1:])
    assert "allowed: 0 .. 3" in assert_problem(service.generate({**body, "label": 4}), 422, "label")["detail"]
    assert "null is not a label" in assert_problem(service.generate(body), 422, "label")["detail"]
    assert_problem(service.generate({**body, "label": 1, "guidance_scale": 2}), 422, "guidance_scale")
    (told,) = service.request("GET", "/capabilities").json()["models"]
    assert (told["num_classes"], told["unlabelled"], told["guidance"]) == (4, False, False)
    denoised = service.request(
        "POST", "/denoise", files={"image": ("x", encode_grey())}, data={"t": "99", "label": "2", "steps": "3"}
    )
    assert pixels(denoised.content).shape == (16, 16, 3)


@pytest.mark.parametrize("channels", [2, 4, 5])
def test_a_model_that_draws_no_pictures_is_refused_by_the_service_alone(tmp_path: Path, channels: int) -> None:
    DDPMPipeline(net_of(channels=channels), DDPMScheduler()).save_pretrained(tmp_path / "theirs")
    assert load_model(tmp_path / "theirs").config.in_channels == channels
    with pytest.raises(CheckpointError) as caught:
        read(str(tmp_path / "theirs"))
    assert str(caught.value).startswith(f"{tmp_path / 'theirs' / 'unet' / 'config.json'}: in_channels={channels} is ")
    assert str(caught.value).endswith("the service makes grey or RGB pictures; supported: 1, 3")


def test_by_its_id_on_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the hub's cache, as a download leaves it, by the real process."""
    repository = tmp_path / "hub" / "models--somebody--small-model"
    DDPMPipeline(net_of(), DDPMScheduler()).save_pretrained(repository / "snapshots" / REVISION)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(REVISION)
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with server(model="somebody/small-model") as it:
        health = it.get("/health").json()
        assert health["model"] == "small-model"
        drawn = it.post("/generate", json={"steps": 2, "seed": 1, "model": "small-model"})
        assert drawn.headers["x-model"] == f"small-model@{health['sha256'][:12]}"
        assert pixels(drawn.content).shape == (16, 16, 3)
        assert json.loads(it.get("/v2/models/small-model").text)["name"] == "small-model"
