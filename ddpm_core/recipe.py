"""How to train, and what every step draws: all of it functions of the recipe and the number of the step."""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from ddpm_core import optimizers


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the reference recipe, L_simple with uniform t (Ho et al. 2020, section 4).

    Raises:
        ValueError: a number outside its range.
    """

    steps: int = 0  # optimizer steps in all; 0 = until the time budget is spent
    time_budget_s: float = 0.0  # seconds of training, resumed ones counted in; 0 = until the steps are done
    batch_size: int = 128
    optimizer: optimizers.Name = "adamw"
    lr: float = 2e-4  # the peak
    warmup_steps: int = 500  # lr rises linearly from 0
    decay: float = 0.0  # the last share of training over which lr falls linearly to 0
    adam_betas: tuple[float, float] = (0.9, 0.999)
    weight_decay: float = 0.0  # decoupled (AdamW)
    clip_grad: float = 1.0  # global gradient norm
    ema_decay: float = 0.9999  # after a warm-up of min(ema_decay, (1 + step) / (10 + step))
    timesteps: Literal["uniform", "stratified"] = "uniform"  # stratified: one t in each of B equal parts of 0..T-1
    min_snr_gamma: float = 0.0  # weight clipping of Hang et al. 2023; 0 = off
    label_drop: float = 0.1  # share of labels replaced by "no label" (Ho and Salimans 2022)
    guidance_scale: float = 1.0  # s: with a label, learn what guidance by s would say (Tang et al. 2025); 1 = off
    flip: bool = False  # mirror half of the images, left to right: only where a mirrored image is as good as another
    shift: int = 0  # move images by up to so many pixels, at random
    seed: int = 0

    def __post_init__(self) -> None:
        if (self.steps > 0) == (self.time_budget_s > 0):
            raise ValueError("give either steps or a time budget, and not both")
        for field, low, high in (
            ("batch_size", 1, math.inf),
            ("lr", 0, 1),
            ("warmup_steps", 0, math.inf),
            ("decay", 0, 1),
            ("weight_decay", 0, 1),
            ("clip_grad", 1e-9, math.inf),
            ("ema_decay", 0, 1),
            ("min_snr_gamma", 0, math.inf),
            ("label_drop", 0, 1),
            ("guidance_scale", 1, 20),
            ("shift", 0, math.inf),
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise ValueError(f"{field}={value} must be {low} .. {high}")
        if self.guidance_scale != 1 and not self.label_drop:
            raise ValueError(f"guidance_scale={self.guidance_scale} needs label_drop above 0: it is learned from both")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas={self.adam_betas} must be two numbers in [0, 1)")


def sample_timesteps(recipe: Recipe, num_train_steps: int, generator: torch.Generator) -> Tensor:
    """(B,) long, 0 .. T-1."""
    u = torch.rand(recipe.batch_size, generator=generator, dtype=torch.float64, device=generator.device)
    if recipe.timesteps == "stratified":
        u = (torch.arange(recipe.batch_size, device=u.device) + u) / recipe.batch_size
    return (u * num_train_steps).long().clamp(max=num_train_steps - 1)


def seed_of(seed: int, use: Literal["order", "loss", "dropout", "augmentation"], count: int, rank: int = 0) -> int:
    """The seed of one use of randomness: 32 bits, because torch's CPU generator drops all higher ones.

    rank is for what each of several processes has to draw otherwise.
    """
    key = (seed, ("order", "loss", "dropout", "augmentation").index(use), count, *([rank] if rank else []))
    return int(np.random.SeedSequence(key).generate_state(1)[0])


@functools.lru_cache(maxsize=2)
def epoch_order(seed: int, epoch: int, size: int) -> Tensor:
    """A permutation of 0 .. size - 1, a function of seed and epoch alone."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed_of(seed, "order", epoch)))


def batch_indices(recipe: Recipe, step: int, size: int) -> Tensor:
    """The images of step number `step`, (B,) long: every epoch a new order, no image twice in one, none left out."""
    first = step * recipe.batch_size
    epochs = range(first // size, (first + recipe.batch_size - 1) // size + 1)
    orders = [epoch_order(recipe.seed, epoch, size) for epoch in epochs]
    return torch.cat(orders)[first - epochs[0] * size :][: recipe.batch_size]
