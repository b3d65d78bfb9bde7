"""Training: the loss, the moving average, and train(), a generator that its caller watches and interrupts.

Knows tensors and numbers; files are runs.py's, progress bars and signals train.py's. Everything random in step k is a
function of (seed, k), and so is the batch: a state saved after step k and resumed goes on bit for bit as if never
interrupted. (With a time budget the learning rate follows the clock, and no two runs are the same.)
"""

from __future__ import annotations

import dataclasses
import functools
import math
import time
from collections.abc import Iterator
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ddpm_core import data, diffusion
from ddpm_core.schedules import NoiseSchedule

MAX_BAD_STEPS = 20  # consecutive steps without a finite gradient before training gives up


class TrainingDiverged(RuntimeError):
    """The loss stayed NaN or infinite; the weights are those of the last good step."""


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How to train. The defaults are the reference recipe, L_simple with uniform t (Ho et al. 2020, section 4).

    Raises:
        ValueError: a number outside its range.
    """

    steps: int = 0  # optimizer steps in all; 0 = until the time budget is spent
    time_budget_s: float = 0.0  # seconds of training, resumed ones counted in; 0 = until the steps are done
    batch_size: int = 128
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
            ("seed", 0, 2**31 - 1),
        ):
            value = getattr(self, field)
            if not low <= value <= high:
                raise ValueError(f"{field}={value} must be {low} .. {high}")
        if len(self.adam_betas) != 2 or not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas={self.adam_betas} must be two numbers in [0, 1)")


@dataclasses.dataclass(frozen=True)
class StepStats:
    """What one optimizer step did."""

    step: int  # steps done so far, this one counted in
    loss: float
    lr: float
    grad_norm: float
    elapsed_s: float  # seconds of training so far, resumed ones counted in
    progress: float  # 0 .. 1


def loss_weights(prediction: diffusion.Prediction, snr: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma weights of the squared error of each prediction type; section 3.4 of Hang et al. 2023. (B,)."""
    clipped = snr.clamp(max=gamma)
    return {"epsilon": clipped / snr, "sample": clipped, "v_prediction": clipped / (snr + 1)}[prediction]


def sample_timesteps(recipe: Recipe, num_train_steps: int, generator: torch.Generator) -> Tensor:
    """(B,) long, 0 .. T-1."""
    u = torch.rand(recipe.batch_size, generator=generator, dtype=torch.float64, device=generator.device)
    if recipe.timesteps == "stratified":
        u = (torch.arange(recipe.batch_size, device=u.device) + u) / recipe.batch_size
    return (u * num_train_steps).long().clamp(max=num_train_steps - 1)


def seed_of(seed: int, use: Literal["order", "loss", "dropout"], count: int) -> int:
    """The seed of one use of randomness: 32 bits, because torch's CPU generator drops all higher ones."""
    key = (seed, ("order", "loss", "dropout").index(use), count)
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


class Ema:
    """Exponential moving average of the weights, float32: these are what ships."""

    def __init__(self, net: nn.Module, max_decay: float) -> None:
        self.max_decay = max_decay
        self.weights = {k: v.detach().clone() for k, v in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net: nn.Module, step: int) -> None:
        """After step number `step` (1, 2, ...); early on the average spans about the last ninth of the steps."""
        decay = min(self.max_decay, (1 + step) / (10 + step))
        torch._foreach_lerp_(list(self.weights.values()), list(net.state_dict().values()), 1 - decay)


class Trainer:
    """A network in training: its weights, their average, the optimizer, and how far it is."""

    def __init__(
        self,
        net: nn.Module,
        schedule: NoiseSchedule,
        prediction: diffusion.Prediction,
        images: data.ImageSet,
        recipe: Recipe,
        *,
        null_label: int | None,  # None: the network takes no labels
        device: torch.device,
        compile_net: bool = False,
        bf16: bool = False,
    ) -> None:
        self.recipe, self.prediction, self.null_label, self.device, self.bf16 = (
            recipe, prediction, null_label, device, bf16,
        )  # fmt: skip
        self.net = net.to(device).to(memory_format=torch.channels_last).train()
        self.forward = torch.compile(net) if compile_net else net
        self.ema = Ema(net, recipe.ema_decay)
        self.optimizer = torch.optim.AdamW(
            net.parameters(), lr=0.0, betas=recipe.adam_betas, weight_decay=recipe.weight_decay, fused=True
        )
        self.images, self.labels = images.images.to(device), images.labels.to(device)
        self.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod).to(device)
        self.snr = torch.from_numpy(schedule.snr).to(device)
        self.step = 0
        self.elapsed_s = 0.0

    @property
    def progress(self) -> float:
        """0 .. 1, in steps or in time, whichever the recipe counts."""
        r = self.recipe
        return min(1.0, self.step / r.steps if r.steps else self.elapsed_s / r.time_budget_s)

    def lr(self) -> float:
        """The learning rate of the next step."""
        r = self.recipe
        warmup = min(1.0, (self.step + 1) / r.warmup_steps) if r.warmup_steps else 1.0
        decay = min(1.0, (1 - self.progress) / r.decay) if r.decay else 1.0
        return r.lr * warmup * decay

    def loss(self) -> Tensor:
        """The loss of the next step's batch: E ||target - prediction||^2, weighted by min-SNR where asked."""
        r, device = self.recipe, self.device
        index = batch_indices(r, self.step, len(self.images)).to(device)
        generator = torch.Generator(device).manual_seed(seed_of(r.seed, "loss", self.step))
        x_0 = data.to_unit(self.images[index])
        t = sample_timesteps(r, len(self.alphas_cumprod), generator)
        eps = torch.randn(x_0.shape, generator=generator, device=device)
        alpha_bar = self.alphas_cumprod[t]
        x_t = diffusion.q_sample(x_0, eps, alpha_bar).contiguous(memory_format=torch.channels_last)
        inputs = [x_t, t]
        if self.null_label is not None:
            drop = torch.rand(len(t), generator=generator, device=device) < r.label_drop
            inputs.append(torch.where(drop, self.null_label, self.labels[index]))
        with torch.autocast(device.type, torch.bfloat16, enabled=self.bf16):
            output = self.forward(*inputs)
        error = output.float() - diffusion.target(self.prediction, x_0, eps, alpha_bar)
        per_image = error.square().flatten(1).mean(1)
        if r.min_snr_gamma:
            per_image = per_image * loss_weights(self.prediction, self.snr[t], r.min_snr_gamma).float()
        loss: Tensor = per_image.mean()
        return loss

    def train_step(self) -> tuple[float, float, float] | None:
        """One optimizer step: loss, lr, gradient norm. None where the gradient is not finite: nothing was changed."""
        lr = self.lr()
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # dropout draws from the global generator
            torch.manual_seed(seed_of(self.recipe.seed, "dropout", self.step))
            loss_tensor = self.loss()
            loss_tensor.backward()  # type: ignore[no-untyped-call]
        loss = float(loss_tensor.detach())
        norm = float(nn.utils.clip_grad_norm_(self.net.parameters(), self.recipe.clip_grad))
        finite = math.isfinite(norm) and math.isfinite(loss)
        if finite:
            self.optimizer.step()
        self.optimizer.zero_grad()
        self.step += 1
        if finite:
            self.ema.update(self.net, self.step)
        return (loss, lr, norm) if finite else None

    def train(self) -> Iterator[StepStats]:
        """Trains to the end of the recipe, yielding after every step. Leave the loop at will: the state is whole.

        Raises:
            TrainingDiverged: the gradient was not finite for MAX_BAD_STEPS steps on end.
        """
        bad = 0
        while self.progress < 1:
            start = time.monotonic()
            done = self.train_step()
            self.elapsed_s += time.monotonic() - start
            if done is None:
                bad += 1
                if bad == MAX_BAD_STEPS:
                    raise TrainingDiverged(
                        f"no finite gradient in {bad} steps up to step {self.step}: "
                        "resume from the last checkpoint with a lower --lr or a longer --warmup-steps"
                    )
                continue
            bad = 0
            loss, lr, norm = done
            yield StepStats(self.step, loss, lr, norm, self.elapsed_s, self.progress)

    def state_tensors(self) -> dict[str, Tensor]:
        """All that changes in training, by name; step and elapsed_s are beside it."""
        tensors = {f"net.{k}": v for k, v in self.net.state_dict().items()}
        tensors |= {f"ema.{k}": v for k, v in self.ema.weights.items()}
        for index, slots in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{index}.{k}": v for k, v in slots.items()}
        return tensors

    def load_state_tensors(self, tensors: dict[str, Tensor], *, step: int, elapsed_s: float) -> None:
        """The inverse of state_tensors."""

        def part(prefix: str) -> dict[str, Tensor]:
            return {k.removeprefix(prefix): v for k, v in tensors.items() if k.startswith(prefix)}

        self.net.load_state_dict(part("net."))
        for k, v in part("ema.").items():
            self.ema.weights[k].copy_(v)
        # The fused optimizer walks over memory as it lies: moments need the layout of their parameter (channels last).
        parameters = list(self.net.parameters())
        slots: dict[int, dict[str, Tensor]] = {}
        for k, v in part("optimizer.").items():
            index, name = k.split(".")
            parameter = parameters[int(index)]
            slots.setdefault(int(index), {})[name] = torch.empty_like(parameter).copy_(v) if v.dim() else v
        self.optimizer.load_state_dict({**self.optimizer.state_dict(), "state": slots})
        self.step, self.elapsed_s = step, elapsed_s
