"""DDIM as diffusers' users write it: what the contenders without our engine share."""

from __future__ import annotations

import io
import math
from collections.abc import Sequence

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DModel
from numpy.typing import NDArray
from PIL import Image
from pydantic import BaseModel
from torch import Tensor

from benchmarks.machine import MODEL


class DrawRequest(BaseModel):
    """The body that every contender gets; there is one sampler here."""

    n: int
    steps: int
    label: int
    seed: int
    sampler: str


class Chain:
    """The shipped weights in diffusers' network and sampler."""

    def __init__(self, memory_format: torch.memory_format = torch.contiguous_format) -> None:
        self.unet = UNet2DModel.from_pretrained(MODEL / "unet").to(memory_format=memory_format).eval()
        self.scheduler = DDIMScheduler.from_pretrained(MODEL / "scheduler", timestep_spacing="trailing")

    def draw(self, seeds: Sequence[int], labels: Sequence[int], steps: int) -> NDArray[np.uint8]:
        """One image a seed and label, (B, H, W)."""
        shape = self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size
        x_T = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        return self.denoise(x_T, labels, steps)

    @torch.inference_mode()
    def denoise(self, x_T: Tensor, labels: Sequence[int], steps: int) -> NDArray[np.uint8]:
        """The same from the noise given, (B, C, H, W)."""
        x, class_labels = x_T, torch.tensor(labels)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            v_hat = self.unet(x, t, class_labels).sample
            # eps is taken from the clipped x_0_hat, as our sampler does: all contenders draw the same image
            x = self.scheduler.step(v_hat, t, x, eta=0.0, use_clipped_model_output=True).prev_sample
        return to_uint8(x)


def to_uint8(x: Tensor) -> NDArray[np.uint8]:
    """(B, 1, H, W) in [-1, 1] -> (B, H, W)."""
    pixels: NDArray[np.uint8] = ((x + 1) * 127.5).round().clamp(0, 255).to(torch.uint8).numpy()[:, 0]
    return pixels


def png(images: NDArray[np.uint8]) -> bytes:
    """(B, H, W) as one picture, several as a grid."""
    count, height, width = images.shape
    columns = math.ceil(math.sqrt(count))
    sheet = np.zeros((math.ceil(count / columns) * height, columns * width), np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * height, i % columns * width
        sheet[top : top + height, left : left + width] = image
    buffer = io.BytesIO()
    Image.fromarray(sheet).save(buffer, format="PNG")
    return buffer.getvalue()
