"""All torch of the engine: loads the model onto the device, warms it up, turns requests into images."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from app.engine.request import GenerateParams, ModelInfo
from ddpm_core import data
from ddpm_core.checkpoint import load_model
from ddpm_core.sampling import draw_noise, sample


class Runner:
    """One model on one device.

    Raises:
        CheckpointError: the directory cannot be used. RuntimeError: the device cannot.
    """

    def __init__(self, directory: Path, device: str) -> None:
        name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
        self.device = torch.device(name)
        self.model = load_model(directory)
        self.denoiser = self.model.denoiser(self.device)

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
        plan = self.model.plan(params.sampler, params.steps, eta=params.eta)
        like = torch.empty(0, *self.model.config.image_shape, device=self.device)
        labels = scale = None
        if self.model.null_label is not None:
            null = self.model.null_label
            labels = torch.tensor([null if label is None else label for label in params.labels], device=self.device)
            scale = torch.tensor(
                [1.0 if label is None else params.guidance_scale for label in params.labels], device=self.device
            )
        x_T = draw_noise(params.seeds, 0, like)
        *_, last = sample(self.denoiser, plan, x_T, params.seeds, labels=labels, guidance_scale=scale)
        if not bool(torch.isfinite(last.x).all()):
            raise RuntimeError("the network returned numbers that are not finite")
        images: NDArray[np.uint8] = data.to_uint8(last.x).cpu().numpy()
        return images
