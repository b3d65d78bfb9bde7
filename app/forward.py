"""The forward process on uploaded pixels: what /noise computes. No network needed."""

from __future__ import annotations

import dataclasses

import numpy as np
import torch
from numpy.typing import NDArray

from ddpm_core import data
from ddpm_core.diffusion import q_sample
from ddpm_core.noise import noise


@dataclasses.dataclass(frozen=True)
class Noised:
    """x_t of each t, float32 (n, C, H, W), the one eps (C, H, W) that all of them share, and x_t as uint8."""

    x_t: NDArray[np.float32]
    eps: NDArray[np.float32]
    images: NDArray[np.uint8]


def noise_image(pixels: NDArray[np.uint8], alpha_bars: NDArray[np.float64], seed: int) -> Noised:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps with eps = noise(seed, 0), for several t.

    Args:
        pixels: uint8 (C, H, W).
        alpha_bars: (n,), one for each t.
        seed: of the noise stream.
    """
    x_0 = data.to_unit(torch.from_numpy(pixels))[None]
    eps = noise(seed, 0, pixels.shape)[None]
    x_t = torch.cat([q_sample(x_0, eps, float(abar)) for abar in alpha_bars])
    return Noised(x_t.numpy(), eps[0].numpy(), data.to_uint8(x_t).numpy())
