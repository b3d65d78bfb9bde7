"""All torch of the engine: loads the model onto the device, warms it up, turns requests into images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from app.engine.request import GenerateParams, ModelInfo
from ddpm_core import sampling
from ddpm_core.checkpoint import load_model
from ddpm_core.network import pick_device


class Runner:
    """One model on one device.

    Raises:
        CheckpointError: the directory cannot be used. ValueError: the device cannot.
    """

    def __init__(self, directory: Path, device: str) -> None:
        self.device = pick_device(device)
        self.model = load_model(directory)

    @property
    def info(self) -> ModelInfo:
        """What the outside needs to know of the model."""
        m = self.model
        return ModelInfo(
            m.name, m.sha256, str(self.device), m.config.image_shape,
            m.schedule.num_train_steps, m.config.num_classes, m.schedule.alphas_cumprod,
        )  # fmt: skip

    def warm_up(self) -> None:
        """One short run, so that the first client does not pay for lazy initialisation."""
        self.generate(GenerateParams("warm-up", (0,), (None,), "ddim", 2, 0.0, 1.0))

    def generate(self, params: GenerateParams) -> NDArray[np.uint8]:
        """The images of one request, uint8 (n, C, H, W)."""
        images = sampling.generate(
            self.model,
            self.device,
            params.seeds,
            params.labels,
            sampler=params.sampler,
            steps=params.steps,
            eta=params.eta,
            guidance_scale=params.guidance_scale,
            batch_size=params.slots,
        )
        pixels: NDArray[np.uint8] = images.numpy()
        return pixels
