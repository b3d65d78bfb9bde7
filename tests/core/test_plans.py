"""Samplers as tables: exact Gaussians, orders of convergence, equal samplers, timesteps, refusals.

For data N(mu, s^2) the best x_0_hat is affine in x_t, so every state of a chain is affine in its normal numbers and
its mean and variance are known exactly: no sampling error, everything in float64.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import get_args

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler
from torch import Tensor

from ddpm_core import diffusion, plans, schedules
from ddpm_core.denoiser import Denoiser
from ddpm_core.plans import SamplingPlan, Spacing, Variance
from ddpm_core.sampling import draw_noise, sample
from ddpm_core.schedules import Float64Array, NoiseSchedule

MU, S = 0.3, 0.5
SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
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


def run_exactly(plan: SamplingPlan) -> list[Float64Array]:
    """The states before every row and after the last, each as its factors of 1, x_T and the z of every row."""
    x = np.zeros(len(plan) + 2)
    x[1] = 1.0
    xs, x_0_hats, states = [x] * plan.a.shape[1], [np.zeros_like(x)] * plan.b.shape[1], [x]
    for i, abar in enumerate(plan.alpha_bars):
        x_0_hat = gain_of(abar) * xs[0]
        x_0_hat[0] += MU - gain_of(abar) * np.sqrt(abar) * MU
        x_0_hats = [x_0_hat, *x_0_hats[:-1]]
        new = sum(c * v for c, v in zip((*plan.a[i], *plan.b[i]), (*xs, *x_0_hats), strict=True))
        new[2 + i] += plan.d[i]
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
    mean, var = mean_and_variance(run_exactly(plans.build(schedule, "ddpm", variance=variance))[-1])
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
        constant, factor = run_exactly(plans.build(schedule, "ddim", count))[-1][:2]
        errors.append(abs(factor - slope) + abs(constant - offset))
    assert slope_of(counts, errors) == pytest.approx(1, abs=0.1)
    assert errors[-1] < 0.01


@pytest.mark.parametrize("schedule", FINE.values(), ids=FINE)
@pytest.mark.parametrize(("sampler", "order"), [(plans.ddim, 1), (plans.dpmpp_2m, 2)], ids=["ddim", "dpmpp_2m"])
def test_order_of_convergence_between_two_fixed_times(
    schedule: NoiseSchedule, sampler: Callable[[NoiseSchedule, Float64Array], SamplingPlan], order: int
) -> None:
    """Steps are halved from t = 0.9 T to 0.3 T, and the state at 0.3 T is compared with the ODE's.

    The last row jumps to the clean image whatever the number of steps (an infinite step in log-SNR, first order), and
    towards t = 0 the log-SNR steps of evenly spaced t hardly shrink, so the window leaves both out. T = 20,000, and
    every count divides the window's 12,000: the table's granularity limits nothing.
    """
    first, last = 18_000, 6_000
    offset, slope = ode_map(schedule.alphas_cumprod[first], schedule.alphas_cumprod[last])
    counts = [50, 100, 200, 400, 800]
    errors = []
    for count in counts:
        plan = sampler(schedule, np.linspace(first, last, count + 1))
        constant, factor = run_exactly(plan)[-2][:2]
        errors.append(abs(factor - slope) + abs(constant - offset))
    assert slope_of(counts, errors) == pytest.approx(order, abs=0.05)


def test_the_second_order_sampler_beats_the_first_order_one_at_10_steps() -> None:
    errors = {}
    for name in ("ddim", "dpmpp_2m"):
        _, slope = ode_map(COSINE.alphas_cumprod[-1], 1.0)
        errors[name] = abs(run_exactly(plans.build(COSINE, name, 10))[-1][1] - slope)
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


@pytest.mark.parametrize("sampler", [*plans.DEFAULT_STEPS, *plans.PRESETS])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000, None])
def test_every_plan_ends_at_x_0_hat(sampler: str, spacing: Spacing, steps: int | None) -> None:
    plan = plans.build(COSINE, sampler, steps, spacing=spacing, variance="fixed_large")
    assert len(plan) == (steps or {"fast": 5, "balanced": 10, "ddim": 20, "dpmpp_2m": 10}.get(sampler, 1000))
    assert not plan.a[-1].any()
    assert plan.b[-1].tolist() == [1.0] + [0.0] * (plan.b.shape[1] - 1)
    assert plan.d[-1] == 0
    assert all(np.isfinite(table).all() for table in (plan.a, plan.b, plan.d))


# Timesteps


@pytest.mark.parametrize("total", [1000, 97])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_as_many_as_asked_and_strictly_decreasing(total: int, spacing: Spacing) -> None:
    """For every N of 1 .. T, whether it divides T or not."""
    for steps in range(1, total + 1):
        t = plans.timesteps(total, steps, spacing)
        assert len(t) == steps
        assert np.all(np.diff(t) < 0)
        assert np.array_equal(t, t.round())
        assert 0 <= t[-1] <= t[0] <= total - 1


def test_spacings_start_and_end_where_they_say() -> None:
    for steps in (2, 7, 10, 333, 1000):
        assert plans.timesteps(1000, steps, "trailing")[0] == 999
        assert plans.timesteps(1000, steps, "linspace")[[0, -1]].tolist() == [999, 0]
        assert plans.timesteps(1000, steps, "leading")[-1] == 0
    assert plans.timesteps(1000, 10, "leading")[0] == 900
    assert plans.timesteps(1000, 10, "leading", 1).tolist() == [*range(901, 0, -100)]


@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [2, 3, 7, 10, 13, 50, 333, 600, 999, 1000])
def test_timesteps_match_diffusers(spacing: Spacing, steps: int) -> None:
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert plans.timesteps(1000, steps, spacing).tolist() == scheduler.timesteps.tolist()


# Refusals


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_out_of_range_are_refused(steps: int, spacing: Spacing) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps} must be 1 \.\. 1000"):
        plans.timesteps(1000, steps, spacing)


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("sampler", [*plans.DEFAULT_STEPS, *plans.PRESETS])
def test_build_refuses_steps_out_of_range(steps: int, sampler: str) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps} must be 1 \.\. 1000"):
        plans.build(LINEAR, sampler, steps)


def test_timesteps_pushed_out_of_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"offset 100 leave 0 \.\. 999"):
        plans.timesteps(1000, 10, "leading", 100)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_0_and_1_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta=\S+ must be 0 \.\. 1"):
        plans.build(LINEAR, "ddim", 10, eta=eta)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm", "fast"])
def test_eta_is_refused_where_it_means_nothing(sampler: str) -> None:
    with pytest.raises(ValueError, match=r"eta=0\.5 is for sampler ddim alone"):
        plans.build(LINEAR, sampler, 10, eta=0.5)


@pytest.mark.parametrize("sampler", ["ddpm", "ddim", "dpmpp_2m", "fast", "balanced", "reference"])
@pytest.mark.parametrize("start", [0, 1, 7, 400, 999])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_a_chain_from_an_image_starts_at_its_t(sampler: str, start: int, spacing: Spacing) -> None:
    """Whatever the spacing; with the sampler's own steps as far as there are so many."""
    schedule = schedules.linear(1000)
    plan = plans.build(schedule, sampler, start=start, spacing=spacing)
    assert plan.timesteps[0] == start
    assert plan.timesteps[-1] >= 0
    assert len(plan) == min(start + 1, plans.resolve(sampler, None, 1000)[1])
    assert plan.alpha_bars[0] == schedule.alphas_cumprod[start]


def test_a_full_chain_from_the_last_t_is_the_chain_from_noise() -> None:
    schedule = schedules.linear(1000)
    whole, started = plans.build(schedule, "ddpm"), plans.build(schedule, "ddpm", start=999)
    assert np.array_equal(whole.timesteps, started.timesteps)
    assert np.array_equal(whole.b, started.b)


@pytest.mark.parametrize(("start", "steps"), [(-1, None), (1000, None), (5, 7)])
def test_a_start_outside_the_schedule_or_too_many_steps_are_refused(start: int, steps: int | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        plans.build(schedules.linear(1000), "ddim", steps, start=start)


def test_an_unknown_sampler_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="'euler' is not known; known: ddpm, ddim, dpmpp_2m, fast, balanced, reference"
    ):
        plans.build(LINEAR, "euler", 10)


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
    *_, last = sample(Denoiser(network, "sample", None, None), plans.build(schedule, sampler, steps), x, seeds)
    distances, nearest = torch.cdist(last.x.reshape(-1, 2), points).min(1)
    assert float(distances.max()) < 0.01
    assert int(nearest.bincount(minlength=4).min()) >= 5  # of an expected 16; 4 standard deviations below it are 2
