"""lucidrains' denoising-diffusion-pytorch with a network of our size, as its README uses it.

Its U-Net cannot hold our weights: the one that comes nearest in parameters and FLOPs stands in, with random weights,
which cost what trained ones do. It takes no labels.
"""

from __future__ import annotations

import numpy as np
import torch
from denoising_diffusion_pytorch import GaussianDiffusion, Unet, denoising_diffusion_pytorch
from numpy.typing import NDArray

from benchmarks.contenders.chain import to_uint8

denoising_diffusion_pytorch.tqdm = lambda steps, **_: steps  # a progress bar is no part of the work


class Lucidrains:
    """Its network and its DDIM of so many steps, for images of size x size."""

    def __init__(self, size: int, steps: int, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        self.unet = Unet(dim=24, dim_mults=(1, 2, 3), channels=1).to(memory_format=memory_format).eval()
        self.diffusion = GaussianDiffusion(
            self.unet, image_size=size, sampling_timesteps=steps, beta_schedule="cosine", auto_normalize=False
        )

    def draw(self, count: int) -> NDArray[np.uint8]:
        """(B, H, W)."""
        return to_uint8(self.diffusion.sample(batch_size=count))
