"""Samplers as tables of numbers: a SamplingPlan, and one builder for each sampler.

Every step of every sampler here is linear in what is known when it is taken,

    x' = sum_k (a_k x[i-k] + b_k x_0_hat[i-k]) + d z,        z ~ N(0, I)

so a sampler is a list of timesteps and a row of coefficients for each, computed once in float64. Rows of different
plans share one network call and one update, and no sampler keeps state. One row = one network call (NFE).

Every plan ends at the clean image (alpha_bar = 1, d = 0): the last row returns its x_0_hat.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

import numpy as np

from ddpm_core.schedules import Float64Array, NoiseSchedule

Spacing = Literal["leading", "trailing", "linspace"]
Variance = Literal["fixed_small", "fixed_large"]


@dataclasses.dataclass(frozen=True)
class SamplingPlan:
    """What sampling.step needs to know of a sampler, row by row.

    Raises:
        ValueError: the tables disagree in length, or the plan does not end at the clean image.
    """

    sampler: str
    timesteps: Float64Array  # (S,) for the network, strictly decreasing
    alpha_bars: Float64Array  # (S,) alpha_bar at each timestep
    a: Float64Array  # (S, Ka) of x[i], x[i-1], ...
    b: Float64Array  # (S, Kb) of x_0_hat[i], x_0_hat[i-1], ...
    d: Float64Array  # (S,) of fresh noise

    def __post_init__(self) -> None:
        if not len(self) or any(len(rows) != len(self) for rows in (self.alpha_bars, self.a, self.b, self.d)):
            raise ValueError("a plan needs at least one row, and every table the same number of rows")
        if self.d[-1] != 0 or np.any(self.a[-1] != 0) or self.b[-1, 0] != 1 or np.any(self.b[-1, 1:] != 0):
            raise ValueError("the last row of a plan must return x_0_hat: a = 0, b = (1, 0, ...), d = 0")
        if np.any(np.diff(self.timesteps) >= 0):
            raise ValueError("timesteps must be strictly decreasing")

    def __len__(self) -> int:
        return len(self.timesteps)


def timesteps(num_train_steps: int, steps: int, spacing: Spacing, offset: int = 0) -> Float64Array:
    """(steps,) strictly decreasing timesteps of 0 .. T-1; table 2 of Lin et al. 2023 (arXiv 2305.08891).

    Args:
        num_train_steps: T.
        steps: 1 .. T.
        spacing: trailing starts at T-1, linspace has both ends, leading starts below T-1 and ends at offset.
        offset: added to leading timesteps (steps_offset of a scheduler config).

    Raises:
        ValueError: steps is out of range, or the timesteps leave 0 .. T-1.
    """
    if not 1 <= steps <= num_train_steps:
        raise ValueError(f"steps={steps} must be 1 .. {num_train_steps}")
    if spacing == "trailing":
        t = np.round(np.arange(num_train_steps, 0, -num_train_steps / steps))[:steps] - 1
    elif spacing == "linspace":
        t = np.linspace(0, num_train_steps - 1, steps).round()[::-1]
    else:
        t = (np.arange(steps) * (num_train_steps // steps))[::-1] + offset
    if t.min() < 0 or t.max() >= num_train_steps:
        raise ValueError(f"{spacing} timesteps of {steps} steps with offset {offset} leave 0 .. {num_train_steps - 1}")
    return t.astype(np.float64)


def _alpha_bars(schedule: NoiseSchedule, t: Float64Array) -> tuple[Float64Array, Float64Array]:
    """alpha_bar at each timestep, and where each row goes: at the next timestep, after the last the clean image."""
    alpha_bars = schedule.alphas_cumprod[t.astype(np.int64)]
    return alpha_bars, np.append(alpha_bars[1:], 1.0)


def ddpm(schedule: NoiseSchedule, t: Float64Array, *, variance: Variance = "fixed_small") -> SamplingPlan:
    """The ancestral chain of Ho et al. 2020, algorithm 2, on all timesteps or on a subset of them.

    On a subset the betas are those between the chosen timesteps (Nichol and Dhariwal 2021, equation 19).

    Args:
        schedule: the noise schedule.
        t: (S,) strictly decreasing timesteps.
        variance: fixed_small is the posterior variance, fixed_large is beta; section 3.2 of the paper.
    """
    abar, abar_next = _alpha_bars(schedule, t)
    alpha = abar / abar_next
    beta = 1 - alpha
    a = np.sqrt(alpha) * (1 - abar_next) / (1 - abar)
    b = np.sqrt(abar_next) * beta / (1 - abar)
    posterior_variance = beta * (1 - abar_next) / (1 - abar)
    d = np.sqrt(posterior_variance if variance == "fixed_small" else beta)
    d[-1] = 0.0  # the mean of the last step is the image; noise on it would only spoil it
    return SamplingPlan("ddpm", t, abar, a[:, None], _exact_end(b[:, None]), d)


def ddim(schedule: NoiseSchedule, t: Float64Array, *, eta: float = 0.0) -> SamplingPlan:
    """Song et al. 2021 (arXiv 2010.02502), equations 12 and 16; eps is re-derived from the clipped x_0_hat.

    Args:
        schedule: the noise schedule.
        t: (S,) strictly decreasing timesteps.
        eta: 0 = deterministic, 1 = the ancestral chain with fixed_small variance.

    Raises:
        ValueError: eta is outside 0 .. 1.
    """
    if not 0 <= eta <= 1:
        raise ValueError(f"eta={eta} must be 0 .. 1")
    abar, abar_next = _alpha_bars(schedule, t)
    posterior_std = eta * np.sqrt((1 - abar_next) / (1 - abar) * (1 - abar / abar_next))
    a = np.sqrt(np.maximum(1 - abar_next - posterior_std**2, 0)) / np.sqrt(1 - abar)
    b = np.sqrt(abar_next) - a * np.sqrt(abar)
    return SamplingPlan("ddim", t, abar, a[:, None], _exact_end(b[:, None]), posterior_std)


def dpmpp_2m(schedule: NoiseSchedule, t: Float64Array) -> SamplingPlan:
    """DPM-Solver++(2M) of Lu et al. 2022 (arXiv 2211.01095), algorithm 2: second order, one call a step.

    With lambda = log(alpha / sigma), h = lambda' - lambda and r = h_previous / h, a step is
    x' = sigma'/sigma x - alpha' (e^-h - 1) D, D = (1 + 1/2r) x_0_hat - 1/2r x_0_hat_previous.
    The first step has no past and the last an infinite h: both are of first order.

    Args:
        schedule: the noise schedule.
        t: (S,) strictly decreasing timesteps.
    """
    abar, abar_next = _alpha_bars(schedule, t)
    with np.errstate(divide="ignore"):  # alpha_bar = 0 is lambda = -inf, and fits the formula
        lam = 0.5 * np.log(abar / (1 - abar))
    steps = len(t)
    a, b = np.zeros((steps, 1)), np.zeros((steps, 2))
    for i in range(steps - 1):
        h = lam[i + 1] - lam[i]
        a[i, 0] = np.sqrt((1 - abar_next[i]) / (1 - abar[i]))
        weight = -np.sqrt(abar_next[i]) * np.expm1(-h)
        back = 0.5 * h / (lam[i] - lam[i - 1]) if i else 0.0
        b[i] = weight * (1 + back), -weight * back
    b[-1, 0] = 1.0
    return SamplingPlan("dpmpp_2m", t, abar, a, b, np.zeros(steps))


def _exact_end(b: Float64Array) -> Float64Array:
    """The last row's b is 1 in exact arithmetic; here it is 1 in float64 too."""
    b[-1, 0] = 1.0
    return b


DEFAULT_STEPS: dict[str, int | None] = {"ddpm": None, "ddim": 20, "dpmpp_2m": 10}
"""The samplers by name, each with the steps it takes where none are asked for; None: T."""

PRESETS: dict[str, tuple[str, int | None]] = {
    "fast": ("dpmpp_2m", 5),
    "balanced": ("dpmpp_2m", 10),
    "reference": ("ddpm", None),
}
"""Names for people: a sampler and its steps."""


def resolve(sampler: str, steps: int | None, most: int) -> tuple[str, int]:
    """The sampler behind a sampler's or preset's name, and its steps: those asked for, else its own.

    Args:
        sampler: a key of DEFAULT_STEPS or PRESETS.
        steps: 1 .. most; None: the sampler's own, as far as there are so many.
        most: how many steps the chain has: T, or t + 1 where it starts at t.

    Raises:
        ValueError: no such sampler, or steps is out of range.
    """
    if sampler in PRESETS:
        sampler, own_steps = PRESETS[sampler]
    elif sampler in DEFAULT_STEPS:
        own_steps = DEFAULT_STEPS[sampler]
    else:
        known = ", ".join([*DEFAULT_STEPS, *PRESETS])
        raise ValueError(f"sampler={sampler!r} is not known; known: {known}")
    if steps is None:
        steps = min(own_steps or most, most)
    if not 1 <= steps <= most:
        raise ValueError(f"steps={steps} must be 1 .. {most}")
    return sampler, steps


def build(
    schedule: NoiseSchedule,
    sampler: str,
    steps: int | None = None,
    *,
    eta: float = 0.0,
    start: int | None = None,
    variance: Variance = "fixed_small",
    spacing: Spacing = "trailing",
    offset: int = 0,
) -> SamplingPlan:
    """A plan by the name of its sampler or preset.

    Args:
        schedule: the noise schedule.
        sampler: a key of DEFAULT_STEPS or PRESETS.
        steps: 1 .. T, or 1 .. start + 1; None: the sampler's own.
        eta: ddim only.
        start: the timestep that the chain starts at, as an image noised to it does; None: from pure noise.
            Its timesteps are trailing ones, whatever the spacing: others would not begin there.
        variance: ddpm only.
        spacing, offset: of the timesteps; all T of them need neither.

    Raises:
        ValueError: no such sampler, or a number outside its range.
    """
    total = schedule.num_train_steps
    if start is not None:
        if not 0 <= start < total:
            raise ValueError(f"start={start} must be 0 .. {total - 1}")
        total, spacing = start + 1, "trailing"
    sampler, count = resolve(sampler, steps, total)
    if eta and sampler != "ddim":
        raise ValueError(f"eta={eta} is for sampler ddim alone; {sampler} has none")
    t = timesteps(total, count, "trailing" if count == total else spacing, offset)
    if sampler == "ddpm":
        return ddpm(schedule, t, variance=variance)
    return ddim(schedule, t, eta=eta) if sampler == "ddim" else dpmpp_2m(schedule, t)
