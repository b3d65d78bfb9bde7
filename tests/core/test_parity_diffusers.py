"""The same numbers as diffusers: the U-Net on random weights, noise schedules, whole chains, directories that we wrote.

Everything is compared in float64. test_parity_directories.py has the chains of directories that diffusers wrote.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from diffusers import DDIMScheduler, DDPMPipeline, DDPMScheduler, DPMSolverMultistepScheduler, UNet2DModel
from torch import Tensor

from ddpm_core import checkpoint, samplers, schedules
from ddpm_core.denoiser import Denoiser
from ddpm_core.diffusion import Prediction
from ddpm_core.plans import SamplingPlan, Variance
from ddpm_core.sampling import sample
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.spacings import Spacing
from ddpm_core.unet import UNet, UNetConfig
from tests.core import theirs as oracle
from tests.core.theirs import (
    CELEBAHQ,
    CIFAR10,
    CIFAR10_NARROW,
    SEEDS,
    inputs_of,
    largest_difference,
    their_ddim,
    their_ddpm,
    theirs_of,
)
from tests.networks import DIGITS

# The U-Net

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
    "cifar10_narrow": CIFAR10_NARROW,
    "celebahq_narrow": dataclasses.replace(
        CELEBAHQ, sample_size=32, block_out_channels=(4, 4, 8, 8, 16, 16), norm_num_groups=4
    ),
    "heads_of_8_in_several_levels": SMALL,
    "heads_that_do_not_fill_a_level": dataclasses.replace(SMALL, attention_head_dim=6),
    "resampled_as_they_choose": dataclasses.replace(SMALL, downsample_type=None, upsample_type=None),
    "scale_shift": dataclasses.replace(SMALL, resnet_time_scale_shift="scale_shift", add_attention=False),
    "scale_shift_with_attention_groups": dataclasses.replace(
        SMALL, resnet_time_scale_shift="scale_shift", attn_norm_num_groups=4
    ),
    "no_middle_block": dataclasses.replace(SMALL, mid_block_type=None),
    "not_square": dataclasses.replace(SMALL, sample_size=(8, 16), in_channels=2, out_channels=4),
    "middle_scaled": dataclasses.replace(SMALL, mid_block_scale_factor=1.5),
    "inputs_centred": dataclasses.replace(SMALL, center_input_sample=True, time_embedding_dim=48),
    "other_layers": dataclasses.replace(SMALL, layers_per_block=3, act_fn="swish", norm_eps=1e-3),
    "resampled_by_residual_blocks": dataclasses.replace(SMALL, downsample_type="resnet", upsample_type="resnet"),
    "like_guided_diffusion": dataclasses.replace(  # and the consistency models on it
        SMALL,
        down_block_types=("ResnetDownsampleBlock2D", "ResnetDownsampleBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "ResnetUpsampleBlock2D", "ResnetUpsampleBlock2D"),
        downsample_type="resnet",
        upsample_type="resnet",
        resnet_time_scale_shift="scale_shift",
        num_class_embeds=5,
    ),
    "middle_attention_without_norm": dataclasses.replace(SMALL, resnet_time_scale_shift="scale_shift"),
    "learned_time_embedding": dataclasses.replace(SMALL, time_embedding_type="learned", num_train_timesteps=1000),
    "heads_that_fit_where_there_is_attention": dataclasses.replace(
        SMALL, down_block_types=("DownBlock2D",) * 3, up_block_types=("UpBlock2D",) * 3, attention_head_dim=32
    ),
    "odd_embedding": dataclasses.replace(
        SMALL, block_out_channels=(9, 18, 18), norm_num_groups=9, attention_head_dim=9
    ),
    "dropout_has_no_effect_in_evaluation": dataclasses.replace(SMALL, dropout=0.5),
    **{f"act_{name}": dataclasses.replace(SMALL, act_fn=name) for name in ("silu", "mish", "gelu", "relu", "SiLU")},
}


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


@pytest.mark.parametrize(
    ("config", "parameters"), [(CIFAR10, 35_746_307), (CELEBAHQ, 113_673_219)], ids=["cifar10_32", "celebahq_256"]
)
def test_the_networks_of_google_have_their_tensors_in_full_size(config: UNetConfig, parameters: int) -> None:
    with torch.device("meta"):
        ours = UNet(config)
        theirs = UNet2DModel(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
    assert sum(p.numel() for p in ours.parameters()) == parameters
    assert {k: v.shape for k, v in ours.state_dict().items()} == {k: v.shape for k, v in theirs.state_dict().items()}


def test_every_field_of_their_network_is_a_field_of_ours_with_its_default() -> None:
    theirs = UNet2DModel._get_init_keys(UNet2DModel) - {"self"}
    ours = {f.name: f.default for f in dataclasses.fields(UNetConfig)}
    assert set(ours) == theirs | {"no_label"}
    with torch.device("meta"):
        defaults = UNet2DModel().config
    assert {k: defaults[k] for k in theirs} == {k: ours[k] for k in theirs}


# Schedules


@pytest.mark.parametrize("rescaled", [False, True])
@pytest.mark.parametrize("name", ["linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid", "laplace"])
def test_noise_schedules_are_theirs(name: str, rescaled: bool) -> None:
    config: dict[str, Any] = {"beta_schedule": name, "num_train_timesteps": 700, "rescale_betas_zero_snr": rescaled}
    torch.set_default_dtype(torch.float64)  # of what they let torch choose
    try:
        theirs = DDPMScheduler(**config, beta_start=2e-4, beta_end=0.03, prediction_type="sample")
    finally:
        torch.set_default_dtype(torch.float32)
    ours = schedules.from_config({**config, "beta_start": 2e-4, "beta_end": 0.03})
    assert np.abs(ours.alphas_cumprod - theirs.alphas_cumprod.numpy()).max() <= 1e-13
    assert (ours.alphas_cumprod[-1] == 0) == rescaled


# Chains

SHAPE = (2, 4, 4)
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)
SCHEDULES = {"linear": schedules.linear(), "cosine": schedules.cosine()}


@pytest.fixture(autouse=True, scope="module")
def float64_schedulers() -> Iterator[None]:
    with oracle.float64_schedulers():
        yield


def network(x_t: Tensor, t: Tensor | int, label: Tensor | None = None) -> Tensor:
    """Nonlinear, different for every t, and large enough that clipping x_0_hat matters."""
    phase = torch.as_tensor(t, dtype=torch.float64).reshape(-1, 1, 1, 1) / 200
    return 1.3 * torch.tanh(0.8 * x_t + 0.3 * x_t.flip(-1)) * torch.cos(phase) + 0.2 * torch.sin(3 * phase)


def start() -> Tensor:
    return oracle.start(SHAPE)


def our_states(plan: SamplingPlan, prediction: Prediction, clip: float | None) -> list[Tensor]:
    return [s.x for s in sample(Denoiser(network, prediction, clip, None), plan, start(), SEEDS)]


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
    theirs = their_ddpm(scheduler, network, start())
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
    theirs = their_ddim(scheduler, network, start(), eta)
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


@torch.no_grad()
def test_a_directory_that_we_wrote_loads_in_diffusers(tmp_path: Path) -> None:
    ours = UNet(DIGITS).eval()
    ours.load_state_dict(theirs_of(DIGITS).float().state_dict())
    assert DIGITS.no_label
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
