"""DDIM as diffusers' users write it: what the two contenders without our engine share."""

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

    def __init__(self) -> None:
        self.unet = UNet2DModel.from_pretrained(MODEL / "unet").eval()
        self.scheduler = DDIMScheduler.from_pretrained(MODEL / "scheduler", timestep_spacing="trailing")

    @torch.inference_mode()
    def draw(self, seeds: Sequence[int], labels: Sequence[int], steps: int) -> NDArray[np.uint8]:
        """One image a seed and label, (B, H, W)."""
        shape = self.unet.config.in_channels, self.unet.config.sample_size, self.unet.config.sample_size
        x = torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for seed in seeds])
        class_labels = torch.tensor(labels)
        self.scheduler.set_timesteps(steps)
        for t in self.scheduler.timesteps:
            x = self.scheduler.step(self.unet(x, t, class_labels).sample, t, x, eta=0.0).prev_sample
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
