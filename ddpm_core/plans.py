"""Samplers as tables of numbers: a SamplingPlan, and one builder for each sampler.

Every step of every sampler here is linear in what is known when it is taken,

    x' = sum_k (a_k x[i-k] + b_k x_0_hat[i-k]) + d z,        z ~ N(0, I)

so a sampler is a list of timesteps and a row of coefficients for each, computed once in float64. Rows of different
plans share one network call and one update, and no sampler keeps state. One row = one network call (NFE).

Every plan ends at the clean image (alpha_bar = 1, d = 0): the last row returns its x_0_hat.

The multistep samplers reuse what earlier calls said. In lambda = log(alpha / sigma), half the log-SNR, the
probability-flow ODE is solved exactly but for x_0_hat (Lu et al. 2022, arXiv 2211.01095, proposition 4.1),

    x(lambda') = sigma'/sigma x(lambda) + sigma' * integral of e^u x_0_hat(u) du from lambda to lambda'

so such a solver is a choice of polynomial for x_0_hat. (The last row is an infinite step in lambda.)
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Sequence
from typing import Literal

import numpy as np

from ddpm_core.schedules import Float64Array, NoiseSchedule

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

    @property
    def sha256(self) -> str:
        """Of all its numbers: plans that differ anywhere have different ones."""
        tables = (self.timesteps, self.alpha_bars, self.a, self.b, self.d)
        return hashlib.sha256(b"".join(np.ascontiguousarray(table).tobytes() for table in tables)).hexdigest()


def _alpha_bars(schedule: NoiseSchedule, t: Float64Array) -> tuple[Float64Array, Float64Array]:
    """alpha_bar at each timestep, and where each row goes: at the next timestep, after the last the clean image."""
    alpha_bars = schedule.alpha_bar_at(t)
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


def _exact_end(b: Float64Array) -> Float64Array:
    """The last row's b is 1 in exact arithmetic; here it is 1 in float64 too."""
    b[-1, 0] = 1.0
    return b


_NODES, _WEIGHTS = np.polynomial.legendre.leggauss(64)  # exact to rounding for the smooth integrands here


class _Grid:
    """alpha, sigma and lambda at each row of a plan."""

    def __init__(self, schedule: NoiseSchedule, t: Float64Array) -> None:
        self.alpha_bars = schedule.alpha_bar_at(t)
        self.alpha, self.sigma = np.sqrt(self.alpha_bars), np.sqrt(1 - self.alpha_bars)
        with np.errstate(divide="ignore"):  # alpha_bar = 0 is lambda = -inf, and fits the formulas
            self.lam = np.log(self.alpha / self.sigma)

    def weights(self, i: int, nodes: Sequence[int]) -> Float64Array:
        """Of x_0_hat at rows `nodes` in the step from row i to i + 1, where one polynomial goes through them all.

        sigma' * integral of e^u L_k(u) du = alpha' h * integral of e^(-h (1 - tau)) L_k(tau) dtau, tau in 0 .. 1.
        A node infinitely far back bends nothing; a step from there sees one node alone.
        """
        h = self.lam[i + 1] - self.lam[i]
        if not np.isfinite(h):
            return np.where(np.arange(len(nodes)) == 0, self.alpha[i + 1], 0.0)
        near = np.isfinite(self.lam[list(nodes)])
        where = (self.lam[list(nodes)][near] - self.lam[i]) / h
        tau = (_NODES + 1) / 2
        integrand = _WEIGHTS / 2 * np.exp(-h * (1 - tau))
        found = np.zeros(len(nodes))
        found[near] = [
            self.alpha[i + 1] * h * np.sum(integrand * np.prod((tau[:, None] - others) / (node - others), axis=1))
            for k, node in enumerate(where)
            for others in [np.delete(where, k)]
        ]
        return found

    def plan(self, sampler: str, t: Float64Array, a: Float64Array, b: Float64Array) -> SamplingPlan:
        """The rows so far and the last one, which returns x_0_hat."""
        a[-1], b[-1] = 0.0, np.eye(b.shape[1])[0]
        return SamplingPlan(sampler, t, self.alpha_bars, a, b, np.zeros(len(t)))


def dpmpp_2m(schedule: NoiseSchedule, t: Float64Array) -> SamplingPlan:
    """DPM-Solver++(2M) of Lu et al. 2022 (arXiv 2211.01095), algorithm 2: second order.

    With h = lambda' - lambda and r = h_previous / h, a step is x' = sigma'/sigma x - alpha' (e^-h - 1) D,
    D = (1 + 1/2r) x_0_hat - 1/2r x_0_hat_previous: the line through two points, its slope's integral taken by halves.

    Args:
        schedule: the noise schedule.
        t: (S,) strictly decreasing timesteps.
    """
    grid = _Grid(schedule, t)
    a, b = np.zeros((len(t), 1)), np.zeros((len(t), 2))
    for i in range(len(t) - 1):
        h = grid.lam[i + 1] - grid.lam[i]
        back = 0.5 * h / (grid.lam[i] - grid.lam[i - 1]) if i else 0.0
        a[i, 0] = grid.sigma[i + 1] / grid.sigma[i]
        b[i] = -grid.alpha[i + 1] * np.expm1(-h) * np.array([1 + back, -back])
    return grid.plan("dpmpp_2m", t, a, b)


def dpmpp_3m(schedule: NoiseSchedule, t: Float64Array) -> SamplingPlan:
    """DPM-Solver++(3M): the parabola through three points, integrated exactly; third order.

    Args:
        schedule: the noise schedule.
        t: (S,) strictly decreasing timesteps.
    """
    grid = _Grid(schedule, t)
    a, b = np.zeros((len(t), 1)), np.zeros((len(t), 3))
    for i in range(len(t) - 1):
        nodes = range(i, max(i - 3, -1), -1)
        a[i, 0] = grid.sigma[i + 1] / grid.sigma[i]
        b[i, : len(nodes)] = grid.weights(i, nodes)
    return grid.plan("dpmpp_3m", t, a, b)


def unipc(schedule: NoiseSchedule, t: Float64Array, *, order: int = 3) -> SamplingPlan:
    """UniPC of Zhao et al. 2023 (arXiv 2302.04867): predict, call the network, correct with what it said; order + 1.

    The corrected state is corrected = x[i] + sum_k (c_k - p_k) x_0_hat[i-k]: predictor and corrector of one step differ
    in their polynomials alone (the corrector's goes through row i too), so x holds the predictions and no corrected
    state is kept. Both polynomials are integrated exactly.

    Args:
        schedule: the noise schedule.
        t: (S,) strictly decreasing timesteps.
        order: points of the predictor, 1 .. 3.
    """
    grid = _Grid(schedule, t)
    a, b = np.zeros((len(t), 1)), np.zeros((len(t), order + 1))
    correction, predictor = np.zeros(order + 1), np.zeros(order)
    for i in range(len(t) - 1):
        if i:  # of the step that led here
            nodes = range(i, max(i - 1 - order, -1), -1)
            correction = np.zeros(order + 1)
            correction[: len(nodes)] = grid.weights(i - 1, nodes)
            correction[1:] -= predictor
        nodes = range(i, max(i - order, -1), -1)
        predictor = np.zeros(order)
        predictor[: len(nodes)] = grid.weights(i, nodes)
        a[i, 0] = grid.sigma[i + 1] / grid.sigma[i]
        b[i] = a[i, 0] * correction
        b[i, :order] += predictor
    return grid.plan("unipc", t, a, b)


ADAMS_BASHFORTH = ((1.0,), (3 / 2, -1 / 2), (23 / 12, -16 / 12, 5 / 12), (55 / 24, -59 / 24, 37 / 24, -9 / 24))


def ipndm(schedule: NoiseSchedule, t: Float64Array) -> SamplingPlan:
    """iPNDM-4 (Zhang and Chen 2023, arXiv 2204.13902, after Liu et al. 2022): Adams and Bashforth's weights on eps.

    In x / alpha the ODE is d(x / alpha) / d(sigma / alpha) = eps. The weights are those of even steps, whatever the
    steps are: of fourth order where sigma / alpha is evenly spaced, of second elsewhere.

    Args:
        schedule: the noise schedule.
        t: (S,) strictly decreasing timesteps; alpha_bar > 0 at each.

    Raises:
        ValueError: alpha_bar is 0 at a timestep: there is no eps there.
    """
    grid = _Grid(schedule, t)
    if not grid.alpha.all():
        raise ValueError("sampler='ipndm' needs alpha_bar > 0 at every timestep")
    ratio = grid.sigma / grid.alpha
    a, b = np.zeros((len(t), 4)), np.zeros((len(t), 4))
    for i in range(len(t) - 1):
        a[i, 0] = grid.alpha[i + 1] / grid.alpha[i]
        step = grid.alpha[i + 1] * (ratio[i + 1] - ratio[i])
        for k, weight in enumerate(ADAMS_BASHFORTH[min(i, 3)]):
            a[i, k] += step * weight / grid.sigma[i - k]
            b[i, k] -= step * weight * grid.alpha[i - k] / grid.sigma[i - k]
    return grid.plan("ipndm", t, a, b)
