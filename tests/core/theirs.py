"""diffusers as the oracle of the parity tests: its networks of our configs, and its schedulers in float64."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
import torch
from diffusers import UNet2DModel
from diffusers.schedulers import scheduling_ddim, scheduling_ddpm, scheduling_dpmsolver_multistep
from torch import Tensor

from ddpm_core.noise import noise
from ddpm_core.sampling import draw_noise
from ddpm_core.unet import UNetConfig

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
CIFAR10_NARROW = dataclasses.replace(CIFAR10, block_out_channels=(8, 16, 16, 16), norm_num_groups=4)
CELEBAHQ = dataclasses.replace(  # google/ddpm-celebahq-256
    CIFAR10,
    sample_size=256,
    down_block_types=("DownBlock2D",) * 4 + ("AttnDownBlock2D", "DownBlock2D"),
    up_block_types=("UpBlock2D", "AttnUpBlock2D") + ("UpBlock2D",) * 4,
    block_out_channels=(128, 128, 256, 256, 512, 512),
)
SEEDS = [3, 1, 4]


class Float64Torch:
    """torch as a module that was told to use float32 sees it, with float64 in its place."""

    float32 = torch.float64

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


@contextlib.contextmanager
def float64_schedulers() -> Iterator[None]:
    """Their schedulers round to float32 on the way; here they do not."""
    with pytest.MonkeyPatch.context() as patch:
        for module in (scheduling_ddpm, scheduling_ddim, scheduling_dpmsolver_multistep):
            patch.setattr(module, "torch", Float64Torch())
        yield


def theirs_of(config: UNetConfig, std: float = 0.15) -> UNet2DModel:
    """diffusers' network of the same config, in float64: every parameter random, none left at 0 or 1."""
    torch.manual_seed(0)
    net = UNet2DModel(**{k: v for k, v in config.to_dict().items() if not k.startswith("_")})
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter, std=std)
    return net.double().eval()


def inputs_of(config: UNetConfig) -> tuple[Tensor, Tensor, Tensor | None]:
    """x_t, t and labels of a call, in float64."""
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(3, *config.image_shape, generator=generator, dtype=torch.float64)
    classes = config.num_class_embeds
    return x, torch.tensor([0, 17, 999]), torch.tensor([0, 3, classes - 1]) if classes else None


def start(shape: Sequence[int], seeds: Sequence[int] = SEEDS) -> Tensor:
    """x_T of a chain."""
    return draw_noise(seeds, 0, torch.empty(0, *shape, dtype=torch.float64))


def their_noise(row: int, shape: Sequence[int], seeds: Sequence[int] = SEEDS) -> Tensor:
    """What our chain draws in a row of its plan."""
    return torch.stack([noise(seed, row + 1, tuple(shape)) for seed in seeds]).double()


def their_ddpm(scheduler: Any, network: Any, x: Tensor, seeds: Sequence[int] = SEEDS) -> list[Tensor]:
    """x after each step of a DDPMScheduler, with the noise that ours draws."""
    states = []
    with pytest.MonkeyPatch.context() as patch:
        for row, t in enumerate(scheduler.timesteps.tolist()):
            z = their_noise(row, x.shape[1:], seeds)
            patch.setattr(scheduling_ddpm, "randn_tensor", lambda *a, z=z, **k: z)
            x = scheduler.step(network(x, t), t, x).prev_sample
            states.append(x)
    return states


def their_ddim(
    scheduler: Any, network: Any, x: Tensor, eta: float = 0.0, seeds: Sequence[int] = SEEDS, rederive: bool = True
) -> list[Tensor]:
    """The same of a DDIMScheduler; rederive: eps from the clipped x_0_hat."""
    states = []
    for row, t in enumerate(scheduler.timesteps.tolist()):
        z = their_noise(row, x.shape[1:], seeds) if eta else None
        output = network(x, t)
        x = scheduler.step(output, t, x, eta, use_clipped_model_output=rederive, variance_noise=z).prev_sample
        states.append(x)
    return states


def largest_difference(ours: list[Tensor], theirs: list[Tensor]) -> float:
    assert len(ours) == len(theirs)
    return max(float((a - b).abs().max()) for a, b in zip(ours, theirs, strict=True))
