"""The same numbers as diffusers: the U-Net on random weights, whole chains, and directories in both directions.

Everything is compared in float64. Their schedulers round to float32 on the way; Float64Torch keeps them from it.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep
from torch import Tensor

from ddpm_core import checkpoint, samplers, schedules
from ddpm_core.denoiser import Denoiser
from ddpm_core.diffusion import Prediction
from ddpm_core.noise import noise
from ddpm_core.plans import SamplingPlan, Variance
from ddpm_core.sampling import draw_noise, sample
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.spacings import Spacing
from ddpm_core.unet import UNet, UNetConfig
from tests.networks import DIGITS

# The U-Net

CIFAR10 = UNetConfig(  # google/ddpm-cifar10-32
    sample_size=32,
    freq_shift=1,
    flip_sin_to_cos=False,
    down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    block_out_channels=(128, 256, 256, 256),
    layers_per_block=2,
    downsample_padding=0,
    attention_head_dim=None,
    norm_eps=1e-6,
)
SMALL = UNetConfig(
    sample_size=16,
    block_out_channels=(16, 32, 32),
    layers_per_block=1,
    down_block_types=("AttnDownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D"),
    norm_num_groups=8,
    attention_head_dim=8,
)
CONFIGS = {
    "digits": DIGITS,
    "cifar10_narrow": dataclasses.replace(CIFAR10, block_out_channels=(8, 16, 16, 16), norm_num_groups=4),
    "heads_of_8_in_several_levels": SMALL,
    "scale_shift": dataclasses.replace(SMALL, resnet_time_scale_shift="scale_shift", add_attention=False),
    "scale_shift_with_attention_groups": dataclasses.replace(
        SMALL, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4
    ),
    "no_middle_block": dataclasses.replace(SMALL, mid_block_type=None),
    "not_square": dataclasses.replace(SMALL, sample_size=(8, 16), in_channels=2, out_channels=4),
    "middle_scaled": dataclasses.replace(SMALL, mid_block_scale_factor=1.5),
    "inputs_centred": dataclasses.replace(SMALL, center_input_sample=True, time_embedding_dim=48),
    "other_layers": dataclasses.replace(SMALL, layers_per_block=3, act_fn="swish", norm_eps=1e-3),
}


def theirs_of(config: UNetConfig) -> UNet2DModel:
    """diffusers' network of the same config: every parameter random, none left at 0 or 1."""
    torch.manual_seed(0)
    net = UNet2DModel(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=0.15)
    return net.double().eval()


def inputs_of(config: UNetConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *config.image_shape, generator=generator, dtype=torch.float64)
    return x, torch.tensor([0, 17, 999]), torch.tensor([0, 3, 10]) if config.num_class_embeds else None


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
@torch.no_grad()
def test_the_unet_is_theirs_on_random_weights(config: UNetConfig) -> None:
    """One state dict, loaded strictly in both directions, and outputs that differ by less than 1e-9."""
    theirs, ours = theirs_of(config), UNet(config).double().eval()
    ours.load_state_dict(theirs.state_dict(), strict=True)
    theirs.load_state_dict(ours.state_dict(), strict=True)
    x, t, label = inputs_of(config)
    wanted = theirs(x, t, class_labels=label).sample
    got = ours(x, t, label)
    assert float(wanted.std()) > 1e-3
    assert float((got - wanted).abs().max()) <= 1e-9


def test_the_network_of_ddpm_cifar10_32_has_its_number_of_parameters() -> None:
    with torch.device("meta"):
        assert sum(p.numel() for p in UNet(CIFAR10).parameters()) == 35_746_307


# Chains

SHAPE = (2, 4, 4)
SEEDS = [3, 1, 4]
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
SCHEDULES = {"linear": schedules.linear(), "cosine": schedules.cosine()}


class Float64Torch:
    """torch as a module that was told to use float32 sees it, with float64 in its place."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@pytest.fixture(autouse=True, scope="module")
def float64_schedulers() -> Iterator[None]:
    modules: list[ModuleType] = [scheduling_ddpm, scheduling_ddim, scheduling_dpmsolver_multistep]
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(module, "torch", Float64Torch())
        yield


def network(x_t: Tensor, t: Tensor | int, label: Tensor | None = None) -> Tensor:
    """Nonlinear, different for every t, and large enough that clipping x_0_hat matters."""
    phase = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1, 1) / 200
    return 1.3 * torch.tanh(0.8 * x_t + 0.3 * x_t.flip(-1)) * torch.cos(phase) + 0.2 * torch.sin(3 * phase)


def start() -> Tensor:
    return draw_noise(SEEDS, 0, torch.empty(0, *SHAPE, dtype=torch.float64))


def our_states(plan: SamplingPlan, prediction: Prediction, clip: float | None) -> list[Tensor]:
    return [s.x for s in sample(Denoiser(network, prediction, clip, None), plan, start(), SEEDS)]


def their_noise(row: int) -> Tensor:
    """What our chain draws in a row of its plan."""
    return torch.stack([noise(seed, row + 1, SHAPE) for seed in SEEDS]).double()


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))


def config_of(name: str, prediction: Prediction, spacing: Spacing) -> dict[str, Any]:
    return {
        "trained_betas": SCHEDULES[name].betas.tolist(),
        "prediction_type": prediction,
        "timestep_spacing": spacing,
    }


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize(
    ("name", "steps", "variance", "spacing"),
    [
        ("linear", None, "fixed_small", "leading"),
        ("linear", None, "fixed_large", "leading"),
        ("cosine", 25, "fixed_small", "leading"),
        ("linear", 30, "fixed_large", "leading"),
        ("linear", 30, "fixed_large", "linspace"),
        ("cosine", 40, "fixed_small", "trailing"),
    ],
)
def test_ddpm_chains_are_theirs(
    monkeypatch: pytest.MonkeyPatch,
    name: str,
    steps: int | None,
    variance: Variance,
    spacing: Spacing,
    prediction: Prediction,
) -> None:
    """Full and strided, clipped. Leaves out trailing with fixed_large: diffusers adds noise to that final image."""
    scheduler = DDPMScheduler(
        **config_of(name, prediction, spacing), variance_type=variance, clip_sample=True, clip_sample_range=1.0
    )
    if steps:
        scheduler.set_timesteps(steps)
    x, theirs = start(), []
    for row, t in enumerate(scheduler.timesteps.tolist()):
        monkeypatch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, row=row, **k: their_noise(row))
        x = scheduler.step(network(x, t), t, x).prev_sample
        theirs.append(x)
    plan = samplers.build(SCHEDULES[name], "ddpm", steps, variance=variance, spacing=spacing)
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    assert largest_difference(our_states(plan, prediction, 1.0), theirs) <= 1e-9


@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("eta", [0.0, 0.7])
@pytest.mark.parametrize(("name", "spacing"), [("linear", "leading"), ("cosine", "trailing")])
def test_ddim_chains_are_theirs(name: str, spacing: Spacing, eta: float, prediction: Prediction) -> None:
    """20 steps, clipped at 0.9, with eps re-derived from the clipped x_0_hat."""
    scheduler = DDIMScheduler(**config_of(name, prediction, spacing), clip_sample=True, clip_sample_range=0.9)
    scheduler.set_timesteps(20)
    x, theirs = start(), []
    for row, t in enumerate(scheduler.timesteps.tolist()):
        noise_of_row = their_noise(row) if eta else None
        x = scheduler.step(
            network(x, t), t, x, eta=eta, use_clipped_model_output=True, variance_noise=noise_of_row
        ).prev_sample
        theirs.append(x)
    plan = samplers.build(SCHEDULES[name], "ddim", 20, eta=eta, spacing=spacing)
    assert largest_difference(our_states(plan, prediction, 0.9), theirs) <= 1e-9


@pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning")  # their set_timesteps, numpy 2
@pytest.mark.parametrize("prediction", PREDICTIONS)
@pytest.mark.parametrize("steps", [5, 10, 25])
@pytest.mark.parametrize("name", SCHEDULES)
def test_dpmpp_2m_chains_are_theirs(name: str, steps: int, prediction: Prediction) -> None:
    """dpmsolver++ of order 2, midpoint, ending at sigma 0: its last step returns x_0_hat. It never clips."""
    scheduler = DPMSolverMultistepScheduler(
        **config_of(name, prediction, "trailing"),
        algorithm_type="dpmsolver++",
        solver_order=2,
        solver_type="midpoint",
        final_sigmas_type="zero",
    )
    scheduler.set_timesteps(steps)
    plan = samplers.build(SCHEDULES[name], "dpmpp_2m", steps, spacing="trailing")
    assert plan.timesteps.tolist() == scheduler.timesteps.tolist()
    scheduler.sigmas = torch.from_numpy(np.append(np.sqrt(1 / plan.alpha_bars - 1), 0.0))  # they keep float32
    x, theirs = start(), []
    for t in scheduler.timesteps:
        x = scheduler.step(network(x, t), t, x).prev_sample
        theirs.append(x)
    scale = max(1.0, *(float(state.abs().max()) for state in theirs))
    assert largest_difference(our_states(plan, prediction, None), theirs) <= 1e-9 * scale


# Directories


def write_with_diffusers(directory: Path, *, flat: bool) -> UNet2DModel:
    net = theirs_of(DIGITS).float()
    scheduler = DDPMScheduler(
        variance_type="fixed_large", prediction_type="v_prediction", beta_schedule="squaredcos_cap_v2"
    )
    if flat:
        net.save_pretrained(directory)
        scheduler.save_pretrained(directory)
    else:
        DDPMPipeline(net, scheduler).save_pretrained(directory)
    return net


@pytest.mark.parametrize("flat", [False, True], ids=["nested", "flat"])
@torch.no_grad()
def test_a_directory_that_diffusers_wrote_loads_here(tmp_path: Path, flat: bool) -> None:
    theirs = write_with_diffusers(tmp_path / "model", flat=flat)
    model = checkpoint.load_model(tmp_path / "model")
    x, t, label = inputs_of(DIGITS)
    assert label is not None
    wanted = theirs(x.float(), t, class_labels=label).sample
    assert torch.allclose(model.net(x.float(), t, label), wanted, atol=1e-5, rtol=1e-4)
    assert model.scheduler.prediction_type == "v_prediction"
    assert model.scheduler.variance_type == "fixed_large"
    assert np.array_equal(model.schedule.betas, SCHEDULES["cosine"].betas)
    assert (model.name, model.null_label, model.config.image_shape) == ("model", 10, (1, 28, 28))


@torch.no_grad()
def test_a_directory_that_we_wrote_loads_in_diffusers(tmp_path: Path) -> None:
    ours = UNet(DIGITS).eval()
    ours.load_state_dict(theirs_of(DIGITS).float().state_dict())
    scheduler = SchedulerConfig(prediction_type="v_prediction", beta_schedule="scaled_linear", clip_sample_range=0.7)
    checkpoint.save_model(tmp_path, ours.state_dict(), DIGITS, scheduler)
    pipeline = DDPMPipeline.from_pretrained(tmp_path)
    theirs = UNet2DModel.from_pretrained(tmp_path / "unet").eval()
    x, t, label = inputs_of(DIGITS)
    wanted = ours(x.float(), t, label)
    for net in (theirs, pipeline.unet.eval()):
        assert torch.allclose(net(x.float(), t, class_labels=label).sample, wanted, atol=1e-5, rtol=1e-4)
    for field, value in scheduler.to_dict().items():
        assert field[0] == "_" or pipeline.scheduler.config[field] == value, field
    assert json.loads((tmp_path / "unet" / "config.json").read_text())["_class_name"] == "UNet2DModel"
