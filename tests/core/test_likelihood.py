"""ddpm_core.likelihood against closed forms of Gaussian data and against the whole sum over t."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from ddpm_core import data, diffusion, likelihood, schedules
from ddpm_core.checkpoint import Model
from ddpm_core.denoiser import Denoiser
from ddpm_core.scheduler_config import SchedulerConfig
from tests.networks import eight

CPU = torch.device("cpu")
LEVELS = data.to_unit(torch.arange(256, dtype=torch.uint8)).double()


def normal(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("mean", [-1.4, -1.0, -0.3, 0.0, 0.5001, 1.0, 1.2])
@pytest.mark.parametrize("std", [1e-3, 5e-3, 0.1, 3.0])
def test_decoder_sums_to_one_over_the_grey_levels(mean: float, std: float) -> None:
    log_mass = likelihood.discretised_log_likelihood(LEVELS, torch.full_like(LEVELS, mean), std)
    assert bool((log_mass <= 0).all())
    assert float(log_mass.exp().sum()) == pytest.approx(1, abs=1e-4)  # float32 sets the levels


def test_decoder_is_exact_far_in_both_tails() -> None:
    """Where a difference of cdfs is 0 - 0 or 1 - 1: the log-density at the bin's near edge says how it falls off."""
    middle = LEVELS[100:101]
    for distance in (0.2, 0.5):
        near, far = (likelihood.discretised_log_likelihood(middle, middle + sign * distance, 0.005) for sign in (1, -1))
        assert float(near) == pytest.approx(float(far), rel=1e-9)
        z = (distance - likelihood.HALF_BIN) / 0.005
        assert float(near) == pytest.approx(-(z**2) / 2 - math.log(z * math.sqrt(2 * math.pi)), abs=1e-2)


def test_prior_kl_is_that_of_torch() -> None:
    x_0, abar = normal(3, 2, 4, 4).float(), 0.03
    prior = torch.distributions.Normal(torch.zeros(()).double(), torch.ones(()).double())
    q = torch.distributions.Normal(abar**0.5 * x_0.double(), (1 - abar) ** 0.5)
    by_torch = torch.distributions.kl_divergence(q, prior).flatten(1).sum(1)
    torch.testing.assert_close(likelihood.prior_kl(x_0, abar), by_torch)
    assert bool((likelihood.prior_kl(x_0, 0.0) == 0).all())


def oracle(variance: float) -> Denoiser:
    """E[x_0 | x_t] of data N(0, variance), as a network that predicts x_0."""
    abars = torch.from_numpy(schedules.linear().alphas_cumprod.copy())

    def network(x_t: torch.Tensor, t: torch.Tensor, _: torch.Tensor | None) -> torch.Tensor:
        abar = abars[t.long()][:, None, None, None]
        return abar.sqrt() * variance / (abar * variance + 1 - abar) * x_t

    return Denoiser(network, "sample", None, None)


@pytest.mark.parametrize("t", [1, 20, 500, 999])
def test_terms_of_gaussian_data_and_its_best_denoiser_have_their_closed_form(t: int) -> None:
    """(snr(t-1) - snr(t)) / 2 times the variance of x_0 given x_t, a pixel; Kingma et al. 2021, equation 14."""
    schedule, variance = schedules.linear(), 0.3
    x_0 = normal(4000, 1, 4, 4, seed=t) * variance**0.5
    terms = likelihood.bound_terms(
        oracle(variance), schedule, "fixed_small", x_0, torch.full((4000,), t), normal(4000, 1, 4, 4, seed=t + 1), None
    )
    abar = schedule.alphas_cumprod[t]
    left = variance * (1 - abar) / (abar * variance + 1 - abar)
    exact = 16 * 0.5 * (schedule.snr[t - 1] - schedule.snr[t]) * left
    assert float(terms.mean()) == pytest.approx(exact, abs=4 * float(terms.std()) / math.sqrt(4000))


def test_the_terms_from_t_on_are_the_information_that_x_holds_on_x_0() -> None:
    """With the best denoiser and many steps the prior's KL and those of t >= s sum to I(x_0; x_{s-1})."""
    schedule, variance, n = schedules.linear(), 0.3, 500
    x_0 = normal(n, 1, 4, 4) * variance**0.5
    first = 100  # before it the steps are too coarse for the limit
    total = likelihood.prior_kl(x_0, float(schedule.alphas_cumprod[-1]))
    for low, high in ((k, k + 25) for k in range(first, 1000, 25)):
        t = torch.randint(low, high, (n,), generator=torch.Generator().manual_seed(low))
        eps = normal(n, 1, 4, 4, seed=low)
        total += 25 * likelihood.bound_terms(oracle(variance), schedule, "fixed_small", x_0, t, eps, None)
    information = 16 * 0.5 * math.log(1 + variance * schedule.snr[first - 1])
    assert float(total.mean()) == pytest.approx(information, rel=0.03)


def test_fixed_large_is_the_kl_of_two_gaussians() -> None:
    schedule = schedules.linear()
    x_0, eps, t = normal(3, 1, 4, 4), normal(3, 1, 4, 4, seed=1), torch.tensor([1, 300, 999])
    found = likelihood.bound_terms(oracle(0.3), schedule, "fixed_large", x_0, t, eps, None)
    abars = torch.from_numpy(schedule.alphas_cumprod.copy())
    x_t = diffusion.q_sample(x_0, eps, abars[t])
    mean, variance = diffusion.posterior(x_0, x_t, abars[t], abars[t - 1])
    mean_hat, _ = diffusion.posterior(oracle(0.3)(x_t, t, abars[t]), x_t, abars[t], abars[t - 1])
    betas = torch.from_numpy(schedule.betas.copy())[t][:, None, None, None]
    kl = torch.distributions.kl_divergence(
        torch.distributions.Normal(mean, variance.sqrt()), torch.distributions.Normal(mean_hat, betas.sqrt())
    )
    torch.testing.assert_close(found, kl.flatten(1).sum(1), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("calls", [2, 3, 10, 20, 999, 1000, 5000])
@pytest.mark.parametrize("steps", [1, 2, 5, 1000])
def test_strata_hold_every_t_once(steps: int, calls: int) -> None:
    ranges = likelihood.strata(steps, calls)
    assert [t for low, high in ranges for t in range(low, high)] == list(range(steps))
    assert len(ranges) == max(1, min(calls, steps))


def tiny(steps: int) -> Model:
    scheduler = SchedulerConfig(num_train_timesteps=steps, prediction_type="v_prediction", beta_end=0.3)
    return eight(scheduler=scheduler)


def test_stratified_estimate_agrees_with_the_whole_sum_over_t() -> None:
    """T = 12 by every t many times over, term by term, against 4 calls an image that draw their t."""
    model, real = tiny(12), data.load("digits", Path(), train=False)
    images, labels = real.images[:200], real.labels[:200]
    x_0 = data.to_unit(images)
    denoiser = model.denoiser(model.network(CPU))
    total = likelihood.prior_kl(x_0, float(model.schedule.alphas_cumprod[-1]))
    for t in range(12):
        eps = normal(*x_0.shape, seed=t).float()
        total += likelihood.bound_terms(
            denoiser, model.schedule, "fixed_small", x_0, torch.full((200,), t), eps, labels
        )
    whole = total / math.log(2) / 64
    found = likelihood.bits_per_dimension(model, CPU, images, labels, calls=4)
    assert (found.samples, found.calls) == (200, 4)
    assert found.value == pytest.approx(float(whole.mean()), abs=4 * found.standard_error)
    assert found.standard_error < 0.05 * found.value
    every = likelihood.bits_per_dimension(model, CPU, images, labels, calls=12)
    assert every.value == pytest.approx(float(whole.mean()), abs=4 * float(whole.std()) / math.sqrt(200))


def test_each_range_of_t_counts_as_often_as_it_is_long(monkeypatch: pytest.MonkeyPatch) -> None:
    """Terms of 1 / (t + 1), whatever the network says: every t once is their sum, a draw from each range its mean."""

    def reciprocal(*arguments: Any) -> torch.Tensor:
        return 1 / (arguments[4].double() + 1)

    monkeypatch.setattr(likelihood, "bound_terms", reciprocal)
    monkeypatch.setattr(likelihood, "prior_kl", lambda x_0, _: torch.zeros(len(x_0), dtype=torch.float64))
    images, exact = torch.zeros(3000, 1, 8, 8, dtype=torch.uint8), sum(1 / k for k in range(1, 41)) / math.log(2) / 64
    assert likelihood.bits_per_dimension(tiny(40), CPU, images, None, calls=40).value == pytest.approx(exact, rel=1e-12)
    drawn = likelihood.bits_per_dimension(tiny(40), CPU, images, None, calls=5)
    assert 0 < drawn.standard_error < 0.01 * exact
    assert drawn.value == pytest.approx(exact, abs=4 * drawn.standard_error)


def test_a_chain_of_one_step_is_its_decoder() -> None:
    model, real = tiny(1), data.load("digits", Path(), train=False)
    finished: list[int] = []
    found = likelihood.bits_per_dimension(
        model, CPU, real.images[:5], real.labels[:5], batch_size=2, on_batch=finished.append
    )
    assert (found.calls, finished) == (1, [2, 2, 1])
    assert np.isfinite(found.value)


def test_the_bound_refuses() -> None:
    real = data.load("digits", Path(), train=False)
    with pytest.raises(ValueError, match="at least 2 images"):
        likelihood.bits_per_dimension(tiny(5), CPU, real.images[:1], real.labels[:1])
    with pytest.raises(ValueError, match="at least 2 images and 2 calls"):
        likelihood.bits_per_dimension(tiny(5), CPU, real.images[:5], real.labels[:5], calls=1)
    broken = tiny(5)
    next(broken.net.parameters()).fill_(math.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        likelihood.bits_per_dimension(broken, CPU, real.images[:5], real.labels[:5])
