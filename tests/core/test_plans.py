"""Samplers as tables: exact Gaussians, orders of convergence, equal samplers, refusals.

For data N(mu, s^2) the best x_0_hat is affine in x_t, so every state of a chain is affine in its normal numbers and
its mean and variance are known exactly: no sampling error, everything in float64.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import get_args

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_core import diffusion, plans, samplers, schedules
from ddpm_core.denoiser import Denoiser
from ddpm_core.plans import SamplingPlan, Variance
from ddpm_core.sampling import draw_noise, sample
from ddpm_core.schedules import Float64Array, NoiseSchedule

MU, S = 0.3, 0.5
VARIANCES: tuple[Variance, ...] = get_args(Variance)
LINEAR, COSINE = schedules.linear(), schedules.cosine()
FINE_STEPS = 20_000
FINE = {  # the same processes as with T = 1000, on a grid so fine that it does not limit the number of steps
    "linear": schedules.linear(FINE_STEPS, beta_start=1e-4 / 20, beta_end=0.02 / 20),
    "cosine": schedules.cosine(FINE_STEPS),
}


def subset(count: int, seed: int = 0) -> Float64Array:
    """Timesteps of no regular spacing: `count` of 0 .. 999, decreasing."""
    chosen = np.random.default_rng(seed).choice(1000, count, replace=False)
    return np.sort(chosen)[::-1].astype(np.float64)


def gain_of(abar: float) -> float:
    """d x_0_hat / d x_t of the best denoiser of N(MU, S^2)."""
    return float(np.sqrt(abar) * S**2 / (abar * S**2 + 1 - abar))


def run_exactly(plan: SamplingPlan, given: Sequence[Float64Array] = ()) -> list[Float64Array]:
    """The states before every row and after the last, each as its factors of 1, x_T and the z of every row.

    The first of them may be given, instead of what the plan would make of x_T.
    """
    x = np.zeros(len(plan) + 2)
    x[1] = 1.0
    xs, x_0_hats, states = [x] * plan.a.shape[1], [np.zeros_like(x)] * plan.b.shape[1], [x]
    for i, abar in enumerate(plan.alpha_bars):
        x_0_hat = gain_of(abar) * xs[0]
        x_0_hat[0] += MU - gain_of(abar) * np.sqrt(abar) * MU
        x_0_hats = [x_0_hat, *x_0_hats[:-1]]
        new = sum(c * v for c, v in zip((*plan.a[i], *plan.b[i]), (*xs, *x_0_hats), strict=True))
        new[2 + i] += plan.d[i]
        new = given[i + 1] if i + 1 < len(given) else new
        xs = [new, *xs[:-1]]
        states.append(new)
    return states


def mean_and_variance(state: Float64Array) -> tuple[float, float]:
    return float(state[0]), float(np.sum(state[1:] ** 2))


def ode_map(abar_start: float, abar_end: float) -> tuple[float, float]:
    """The probability-flow ODE of N(MU, S^2) from a state at abar_start: its factors of 1 and of that state."""
    slope = np.sqrt((abar_end * S**2 + 1 - abar_end) / (abar_start * S**2 + 1 - abar_start))
    return float(np.sqrt(abar_end) * MU - slope * np.sqrt(abar_start) * MU), float(slope)


def slope_of(steps: list[int], errors: list[float]) -> float:
    """Order of convergence: minus the slope of log error over log steps, by least squares."""
    return -float(np.polyfit(np.log(steps), np.log(errors), 1)[0])


# Exact Gaussians


@pytest.mark.parametrize("variance", VARIANCES)
@pytest.mark.parametrize("t", [np.arange(1000.0)[::-1], subset(37), subset(5, seed=1)], ids=["full", "37", "5"])
def test_ddpm_follows_the_exact_mean_and_variance(t: Float64Array, variance: Variance) -> None:
    """The reference knows betas and Bayes only: q(x_s | x_t, x_0) by adding precisions, x_0_hat put into its mean."""
    states = run_exactly(plans.ddpm(LINEAR, t, variance=variance))
    signal = np.cumprod(np.sqrt(1 - LINEAR.betas))  # sqrt(alpha_bar), without alpha_bar's table
    mean, var = 0.0, 1.0
    for i, (now, after) in enumerate(zip(t.astype(int)[:-1], t.astype(int)[1:], strict=True)):
        alpha = float(np.prod(1 - LINEAR.betas[after + 1 : now + 1]))
        precision = 1 / (1 - signal[after] ** 2) + alpha / (1 - alpha)
        of_x_0 = signal[after] / (1 - signal[after] ** 2) / precision
        of_x_t = np.sqrt(alpha) / (1 - alpha) / precision
        gain = gain_of(signal[now] ** 2)
        offset = of_x_0 * (MU - gain * signal[now] * MU)
        mean = (of_x_0 * gain + of_x_t) * mean + offset
        var = (of_x_0 * gain + of_x_t) ** 2 * var + (1 / precision if variance == "fixed_small" else 1 - alpha)
        got = mean_and_variance(states[i + 1])
        assert got == pytest.approx((mean, var), rel=1e-9, abs=1e-10)
    last = signal[int(t[-1])]
    final = (MU + gain_of(last**2) * (mean - last * MU), gain_of(last**2) ** 2 * var)
    assert mean_and_variance(states[-1]) == pytest.approx(final, rel=1e-9, abs=1e-10)


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("variance", VARIANCES)
def test_the_full_ancestral_chain_returns_the_data(schedule: NoiseSchedule, variance: Variance) -> None:
    """1000 steps: mean and standard deviation of N(mu, s^2) to 1 %."""
    mean, var = mean_and_variance(run_exactly(samplers.build(schedule, "ddpm", variance=variance))[-1])
    assert mean == pytest.approx(MU, rel=0.01)
    assert np.sqrt(var) == pytest.approx(S, rel=0.01)


@pytest.mark.parametrize("schedule", FINE.values(), ids=FINE)
def test_deterministic_ddim_converges_to_the_ode_with_order_1(schedule: NoiseSchedule) -> None:
    """From x_T to the image, last row counted in: x_0 = mu + s (x_T - sqrt(ab_T) mu) / sqrt(ab_T s^2 + 1 - ab_T).

    T = 20,000 and 125 .. 2000 trailing steps, all divisors of T: rounding of t does not show.
    """
    offset, slope = ode_map(schedule.alphas_cumprod[-1], 1.0)
    counts = [125, 250, 500, 1000, 2000]
    errors = []
    for count in counts:
        constant, factor = run_exactly(samplers.build(schedule, "ddim", count))[-1][:2]
        errors.append(abs(factor - slope) + abs(constant - offset))
    assert slope_of(counts, errors) == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.01


def even_in_t(schedule: NoiseSchedule, first: int, last: int, steps: int) -> Float64Array:
    return np.linspace(first, last, steps + 1)


def even_in_sigma_over_alpha(schedule: NoiseSchedule, first: int, last: int, steps: int) -> Float64Array:
    ratio = np.sqrt(1 / schedule.alphas_cumprod - 1)
    return np.interp(np.linspace(ratio[first], ratio[last], steps + 1), ratio, np.arange(len(ratio)))


@pytest.mark.parametrize("schedule", FINE.values(), ids=FINE)
@pytest.mark.parametrize(
    ("sampler", "grid", "order"),
    [
        (plans.ddim, even_in_t, 1),
        (plans.dpmpp_2m, even_in_t, 2),
        (plans.dpmpp_3m, even_in_t, 3),
        (functools.partial(plans.unipc, order=1), even_in_t, 2),
        (functools.partial(plans.unipc, order=2), even_in_t, 3),
        (plans.unipc, even_in_t, 4),
        (plans.ipndm, even_in_t, 2),
        (plans.ipndm, even_in_sigma_over_alpha, 4),
    ],
    ids=["ddim", "dpmpp_2m", "dpmpp_3m", "unipc-1", "unipc-2", "unipc-3", "ipndm", "ipndm-even"],
)
def test_order_of_convergence_between_two_fixed_times(
    schedule: NoiseSchedule,
    sampler: Callable[[NoiseSchedule, Float64Array], SamplingPlan],
    grid: Callable[[NoiseSchedule, int, int, int], Float64Array],
    order: int,
) -> None:
    """Steps are halved from t = 0.9 T to 0.6 T, and the state there is compared with the ODE's.

    The last row jumps to the clean image whatever the number of steps (an infinite step in log-SNR, first order), and
    towards t = 0 the log-SNR steps of evenly spaced t hardly shrink, so the window leaves both out. A multistep
    method's first rows have no past and are of first order, which shows in the end as second: it is its own order
    that is asked for, so it is started on the ODE. Orders are read off the finest grids, above rounding.
    """
    first, last = 18_000, 12_000
    start = 4
    counts = [40, 80, 160, 320]
    errors = []
    for count in counts:
        plan = sampler(schedule, grid(schedule, first, last, count))
        on_ode = [np.array([*ode_map(plan.alpha_bars[0], abar), *[0.0] * len(plan)]) for abar in plan.alpha_bars]
        constant, factor = run_exactly(plan, on_ode[: start + 1])[-2][:2]
        errors.append(abs(factor - on_ode[-1][1]) + abs(constant - on_ode[-1][0]))
    assert slope_of(counts[-2:], errors[-2:]) == pytest.approx(order, rel=0.08)


def test_a_chain_of_third_order_is_of_second_from_its_own_start() -> None:
    """The price of a first row without a past; UniPC's corrector pays it back."""
    schedule = FINE["cosine"]
    orders = {}
    for sampler in (plans.dpmpp_3m, plans.unipc):
        errors = []
        for count in (50, 100):
            plan = sampler(schedule, np.linspace(18_000, 6_000, count + 1))
            _, slope = ode_map(plan.alpha_bars[0], plan.alpha_bars[-1])
            errors.append(abs(run_exactly(plan)[-2][1] - slope))
        orders[sampler.__name__] = slope_of([50, 100], errors)
    assert orders["dpmpp_3m"] == pytest.approx(2, abs=0.1)
    assert orders["unipc"] > 2.9


def test_the_second_order_sampler_beats_the_first_order_one_at_10_steps() -> None:
    errors = {}
    for name in ("ddim", "dpmpp_2m"):
        _, slope = ode_map(COSINE.alphas_cumprod[-1], 1.0)
        errors[name] = abs(run_exactly(samplers.build(COSINE, name, 10))[-1][1] - slope)
    assert errors["dpmpp_2m"] < errors["ddim"] / 2


# Samplers that are the same


@pytest.mark.parametrize("schedule", [LINEAR, COSINE], ids=["linear", "cosine"])
@pytest.mark.parametrize("t", [np.arange(1000.0)[::-1], subset(50), subset(3, seed=1)], ids=["full", "50", "3"])
def test_ddim_with_eta_1_is_ddpm_coefficient_for_coefficient(schedule: NoiseSchedule, t: Float64Array) -> None:
    ddim, ddpm = plans.ddim(schedule, t, eta=1.0), plans.ddpm(schedule, t)
    for table in ("timesteps", "alpha_bars", "a", "b", "d"):
        assert getattr(ddim, table) == pytest.approx(getattr(ddpm, table), abs=1e-12, rel=0), table


@pytest.mark.parametrize("t", [np.arange(1000.0)[::-1], subset(37)], ids=["full", "37"])
def test_ddpms_coefficients_are_those_of_the_posterior(t: Float64Array) -> None:
    """diffusion.posterior is linear: x_0 = 1, x_t = 0 gives b, x_0 = 0, x_t = 1 gives a; d is its deviation."""
    plan = plans.ddpm(LINEAR, t)
    abar = torch.from_numpy(plan.alpha_bars.copy())
    after = torch.cat([abar[1:], torch.ones(1, dtype=torch.float64)])
    one = torch.ones(len(t), 1, 1, 1, dtype=torch.float64)
    zero = torch.zeros_like(one)
    b, variance = diffusion.posterior(one, zero, abar, after)
    a, _ = diffusion.posterior(zero, one, abar, after)
    assert plan.a[:, 0] == pytest.approx(a.flatten().numpy(), abs=1e-12)
    assert plan.b[:, 0] == pytest.approx(b.flatten().numpy(), abs=1e-12)
    assert plan.d**2 == pytest.approx(variance.flatten().numpy(), abs=1e-12)


def test_fixed_large_differs_from_fixed_small_in_its_noise_alone() -> None:
    """d is sqrt(beta) instead of the smaller posterior deviation, and 0 in both where the chain ends."""
    t = subset(40)
    small, large = plans.ddpm(LINEAR, t), plans.ddpm(LINEAR, t, variance="fixed_large")
    assert np.array_equal(small.a, large.a)
    assert np.array_equal(small.b, large.b)
    assert np.all(large.d[:-1] > small.d[:-1])
    abar = LINEAR.alphas_cumprod[t.astype(int)]
    assert large.d[:-1] ** 2 == pytest.approx(1 - abar[:-1] / abar[1:])
    assert large.d[-1] == small.d[-1] == 0


def test_eta_scales_the_noise_of_ddim_and_0_has_none() -> None:
    t = subset(20)
    one = plans.ddim(LINEAR, t, eta=1.0).d
    assert plans.ddim(LINEAR, t, eta=0.3).d == pytest.approx(0.3 * one)
    assert not plans.ddim(LINEAR, t).d.any()


def test_the_first_two_rows_of_dpmpp_2m_are_first_and_second_order() -> None:
    """The first row has no past and equals DDIM's; the second puts weight on the x_0_hat before it."""
    t = subset(20)
    ddim, dpmpp = plans.ddim(LINEAR, t), plans.dpmpp_2m(LINEAR, t)
    assert dpmpp.a == pytest.approx(ddim.a)
    assert dpmpp.b[0] == pytest.approx([ddim.b[0, 0], 0])
    assert dpmpp.b.sum(axis=1) == pytest.approx(ddim.b[:, 0])
    assert np.all(dpmpp.b[1:-1, 1] < 0)


def test_a_plan_that_ends_elsewhere_or_disagrees_is_refused() -> None:
    good = plans.ddpm(LINEAR, subset(3))
    parts = {name: getattr(good, name) for name in ("timesteps", "alpha_bars", "a", "b", "d")}
    with pytest.raises(ValueError, match="last row"):
        SamplingPlan("x", **{**parts, "d": np.ones(3)})
    with pytest.raises(ValueError, match="last row"):
        SamplingPlan("x", **{**parts, "a": np.ones((3, 1))})
    with pytest.raises(ValueError, match="same number of rows"):
        SamplingPlan("x", **{**parts, "d": np.zeros(2)})
    with pytest.raises(ValueError, match="decreasing"):
        SamplingPlan("x", **{**parts, "timesteps": good.timesteps[::-1]})


# A finite data set


@pytest.mark.parametrize(("sampler", "steps"), [("dpmpp_2m", 20), ("ddim", 20), ("ddpm", None)])
def test_the_ideal_denoiser_of_four_points_lands_on_them(sampler: str, steps: int | None) -> None:
    """The best x_0_hat for a finite data set is its mean weighed by N(x_t; sqrt(abar) y, 1 - abar).

    Every sample ends within 0.01 of a point (the points are 1.4 and more apart), and each point gets a fair share.
    """
    points = torch.tensor([[-1.0, -1.0], [-1.0, 1.0], [1.0, -1.0], [0.4, 0.4]], dtype=torch.float64)
    schedule = schedules.cosine(200)
    alpha_bars = torch.from_numpy(schedule.alphas_cumprod)

    def network(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        abar = alpha_bars[t.long()][:, None, None]
        squares = (x_t.reshape(-1, 1, 2) - abar.sqrt() * points).square().sum(2)
        weights = torch.softmax(-squares / (2 * (1 - abar[..., 0])), dim=1)
        return (weights @ points).reshape(x_t.shape)

    seeds = range(64)
    x = draw_noise(seeds, 0, torch.empty(0, 1, 1, 2, dtype=torch.float64))
    *_, last = sample(Denoiser(network, "sample", None, None), samplers.build(schedule, sampler, steps), x, seeds)
    distances, nearest = torch.cdist(last.x.reshape(-1, 2), points).min(1)
    assert float(distances.max()) < 0.01
    assert int(nearest.bincount(minlength=4).min()) >= 5  # of an expected 16; 4 standard deviations below it are 2
