"""Noise schedules: the table of betas and what follows from it, in float64.

Ho et al. 2020 count t = 1 .. T; here, as in their code and in diffusers, t = 0 .. T-1 and t = 0 is already one noising
step. The clean image has no t: where a formula needs its alpha_bar, that is 1.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

Float64Array = NDArray[np.float64]


@dataclasses.dataclass(frozen=True)
class NoiseSchedule:
    """betas (T,) of the forward process q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I); equation 2.

    Raises:
        ValueError: betas is not a non-empty vector of numbers in (0, 1], or reaches 1 before its last entry.
    """

    betas: Float64Array

    def __post_init__(self) -> None:
        betas = np.array(self.betas, dtype=np.float64)
        if betas.ndim != 1 or not len(betas) or not np.all((betas > 0) & (betas <= 1)) or np.any(betas[:-1] == 1):
            raise ValueError("betas must be a non-empty list of numbers in (0, 1); only the last one may be 1")
        betas.setflags(write=False)
        object.__setattr__(self, "betas", betas)

    @property
    def num_train_steps(self) -> int:
        """T."""
        return len(self.betas)

    @property
    def alphas_cumprod(self) -> Float64Array:
        """(T,) alpha_bar_t = prod_{s<=t} (1 - beta_s): the share of the signal's variance left in x_t."""
        return np.cumprod(1.0 - self.betas, dtype=np.float64)

    @property
    def snr(self) -> Float64Array:
        """(T,) alpha_bar / (1 - alpha_bar), the signal-to-noise ratio of x_t for data of unit variance."""
        abar = self.alphas_cumprod
        return abar / (1.0 - abar)

    @property
    def log_snr(self) -> Float64Array:
        """(T,) log(alpha_bar / (1 - alpha_bar)), strictly decreasing; -inf where alpha_bar is 0."""
        with np.errstate(divide="ignore"):
            return np.log(self.snr)

    def alpha_bar_at(self, t: Float64Array) -> Float64Array:
        """alpha_bar at timesteps of 0 .. T-1 that need not be whole: between two of the table the log-SNR is linear."""
        low = np.floor(t).astype(np.int64)
        whole = self.alphas_cumprod[low]
        if np.array_equal(low, t):
            return whole
        log_snr = np.interp(t, np.arange(self.num_train_steps), self.log_snr)
        return np.where(low == t, whole, 1 / (1 + np.exp(-log_snr)))

    def timesteps_of(self, log_snr: Float64Array) -> Float64Array:
        """The timesteps, whole or not, at which the log-SNR is this; the inverse of alpha_bar_at."""
        return np.interp(log_snr, self.log_snr[::-1], np.arange(self.num_train_steps)[::-1].astype(np.float64))


def linear(num_train_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Equally spaced betas; section 4 of Ho et al. 2020."""
    return NoiseSchedule(np.linspace(beta_start, beta_end, num_train_steps))


def scaled_linear(num_train_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Square roots of betas equally spaced; the schedule of latent diffusion models."""
    return NoiseSchedule(np.linspace(beta_start**0.5, beta_end**0.5, num_train_steps) ** 2)


def sigmoid(num_train_steps: int = 1000, *, beta_start: float = 1e-4, beta_end: float = 0.02) -> NoiseSchedule:
    """Betas along the logistic curve from -6 to 6; the schedule of GeoDiff (Xu et al. 2022, arXiv 2203.02923)."""
    share = 1 / (1 + np.exp(-np.linspace(-6, 6, num_train_steps)))
    return NoiseSchedule(beta_start + (beta_end - beta_start) * share)


def _following(alpha_bar: Callable[[float], float], n: int, max_beta: float) -> NoiseSchedule:
    """Betas of n steps along alpha_bar(u), u in 0 .. 1, as far as it does not fall too steeply."""
    return NoiseSchedule(np.array([min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), max_beta) for i in range(n)]))


def cosine(num_train_steps: int = 1000, *, max_beta: float = 0.999) -> NoiseSchedule:
    """alpha_bar follows a squared cosine; equation 17 of Nichol and Dhariwal 2021, s = 0.008, betas clipped."""
    return _following(lambda u: math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2, num_train_steps, max_beta)


def laplace(num_train_steps: int = 1000, *, max_beta: float = 0.999) -> NoiseSchedule:
    """The log-SNR has Laplace's distribution, of mean 0 and scale 1/2; Hang et al. 2024 (arXiv 2407.03297), table 1.

    As diffusers has it, for networks that were trained with it: alpha_bar follows the root of SNR / (1 + SNR).
    """

    def alpha_bar(u: float) -> float:
        log_snr = -0.5 * math.copysign(1, 0.5 - u) * math.log(1 - 2 * abs(0.5 - u) + 1e-6)
        return math.sqrt(1 / (1 + math.exp(-log_snr)))

    return _following(alpha_bar, num_train_steps, max_beta)


def zero_terminal_snr(schedule: NoiseSchedule) -> NoiseSchedule:
    """The schedule with sqrt(alpha_bar) shifted and stretched so that it ends at 0; algorithm 1 of Lin et al. 2023
    (arXiv 2305.08891)."""
    root = np.sqrt(schedule.alphas_cumprod)
    root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
    alphas_cumprod = root**2
    return NoiseSchedule(1 - np.append(alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]))


BY_NAME = {"linear": linear, "scaled_linear": scaled_linear, "sigmoid": sigmoid}  # between beta_start and beta_end
BY_NAME_ALONE = {"squaredcos_cap_v2": cosine, "laplace": laplace}


def from_config(config: Mapping[str, Any]) -> NoiseSchedule:
    """The schedule of a diffusers scheduler_config.json: trained_betas, else beta_schedule by name.

    Raises:
        ValueError: a schedule that is not known here.
    """
    schedule = _named(config)
    return zero_terminal_snr(schedule) if config.get("rescale_betas_zero_snr") else schedule


def _named(config: Mapping[str, Any]) -> NoiseSchedule:
    if config.get("trained_betas") is not None:
        return NoiseSchedule(np.array(config["trained_betas"]))
    num_train_steps = int(config.get("num_train_timesteps", 1000))
    name = config.get("beta_schedule", "linear")
    if name in BY_NAME_ALONE:
        return BY_NAME_ALONE[name](num_train_steps)
    if name in BY_NAME:
        ends = {k: float(config[k]) for k in ("beta_start", "beta_end") if k in config}
        return BY_NAME[name](num_train_steps, **ends)
    known = ", ".join((*BY_NAME, *BY_NAME_ALONE))
    raise ValueError(f"beta_schedule={name!r} is not supported; supported: {known}")
