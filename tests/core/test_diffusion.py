"""The forward process and the conversions, against closed forms in float64."""

from __future__ import annotations

import math
from typing import get_args

import pytest
import torch
from torch import Tensor

from ddpm_core import diffusion, schedules
from ddpm_core.denoiser import Denoiser
from ddpm_core.diffusion import Prediction

ALPHA_BARS = torch.from_numpy(schedules.linear().alphas_cumprod)
PREDICTIONS: tuple[Prediction, ...] = get_args(Prediction)


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def column(values: Tensor | float) -> Tensor:
    """Numbers as a batch of images of one pixel."""
    return torch.as_tensor(values, dtype=torch.float64).reshape(-1, 1, 1, 1)


@pytest.mark.parametrize("t", [0, 100, 400, 999])
def test_q_sample_has_the_mean_and_variance_of_the_closed_form(t: int) -> None:
    """N = 200,000 pixels; both within 5 standard errors: sd / sqrt(N), and var sqrt(2 / N) for the variance."""
    n = 200_000
    abar = float(ALPHA_BARS[t])
    x_t = diffusion.q_sample(torch.full((1, 1, 1, n), 0.7, dtype=torch.float64), randn(1, 1, 1, n, seed=t), abar)
    variance = 1 - abar
    assert abs(float(x_t.mean()) - math.sqrt(abar) * 0.7) < 5 * math.sqrt(variance / n)
    assert abs(float(x_t.var()) - variance) < 5 * variance * math.sqrt(2 / n)


def test_q_sample_gives_every_row_its_own_alpha_bar() -> None:
    x_0, eps = randn(3, 1, 2, 2), randn(3, 1, 2, 2, seed=1)
    abar = torch.tensor([1.0, 0.36, 0.0], dtype=torch.float64)
    x_t = diffusion.q_sample(x_0, eps, abar)
    assert torch.equal(x_t[0], x_0[0])
    assert torch.allclose(x_t[1], 0.6 * x_0[1] + 0.8 * eps[1], rtol=1e-15)
    assert torch.equal(x_t[2], eps[2])


@pytest.mark.parametrize("name", ["linear", "cosine"])
def test_single_steps_composed_equal_q_sample_at_every_t(name: str) -> None:
    """q_step is linear: its factors of x and eps, composed t times, are q_sample's to 1e-12 in float64."""
    schedule = getattr(schedules, name)()
    betas, abar = torch.from_numpy(schedule.betas.copy()), torch.from_numpy(schedule.alphas_cumprod)
    one, zero = column(torch.ones(len(betas))), column(torch.zeros(len(betas)))
    keep, added = diffusion.q_step(one, zero, betas).flatten(), diffusion.q_step(zero, one, betas).flatten()
    mean, variance, means, variances = 1.0, 0.0, [], []
    for k, s in zip(keep.tolist(), added.tolist(), strict=True):
        mean, variance = k * mean, k * k * variance + s * s
        means.append(mean)
        variances.append(variance)
    closed_mean, closed_sd = diffusion.q_sample(one, zero, abar).flatten(), diffusion.q_sample(zero, one, abar)
    assert means == pytest.approx(closed_mean.tolist(), rel=1e-11, abs=1e-15)
    assert variances == pytest.approx(closed_sd.flatten().square().tolist(), rel=1e-11)


@pytest.mark.parametrize(("t", "s"), [(999, 998), (999, 500), (500, 499), (10, 2), (1, 0)])
def test_posterior_is_the_bayes_product_of_two_gaussians(t: int, s: int) -> None:
    """q(x_s | x_t, x_0) is proportional to N(x_s; from x_0) N(x_t; from x_s): precisions add, means are weighed."""
    x_0, x_t = randn(5, 1, 3, 3), randn(5, 1, 3, 3, seed=1)
    abar_t, abar_s = float(ALPHA_BARS[t]), float(ALPHA_BARS[s])
    alpha = abar_t / abar_s  # x_t = sqrt(alpha) x_s + sqrt(1 - alpha) eps
    precision = 1 / (1 - abar_s) + alpha / (1 - alpha)
    mean = (math.sqrt(abar_s) * x_0 / (1 - abar_s) + math.sqrt(alpha) * x_t / (1 - alpha)) / precision
    got_mean, got_variance = diffusion.posterior(x_0, x_t, abar_t, abar_s)
    assert torch.allclose(got_mean, mean, rtol=1e-9, atol=1e-11)
    assert float(got_variance) == pytest.approx(1 / precision, rel=1e-9)


def test_posterior_of_the_clean_image_is_x_0_without_variance() -> None:
    x_0, x_t = randn(4, 1, 2, 2), randn(4, 1, 2, 2, seed=1)
    mean, variance = diffusion.posterior(x_0, x_t, ALPHA_BARS[[0, 10, 500, 999]], 1.0)
    assert torch.allclose(mean, x_0, rtol=1e-13)
    assert torch.equal(variance, torch.zeros(4, 1, 1, 1, dtype=torch.float64))


def test_the_posterior_variance_is_never_above_beta() -> None:
    betas = torch.from_numpy(schedules.linear().betas.copy())
    zero = column(torch.zeros(999))
    _, variance = diffusion.posterior(zero, zero, ALPHA_BARS[1:], ALPHA_BARS[:-1])
    assert bool((variance.flatten() <= betas[1:]).all())
    assert bool((variance > 0).all())


@pytest.mark.parametrize("prediction", PREDICTIONS)
def test_a_target_converts_back_to_x_0_and_eps(prediction: Prediction) -> None:
    x_0, eps = randn(1000, 1, 2, 2), randn(1000, 1, 2, 2, seed=1)
    x_t = diffusion.q_sample(x_0, eps, ALPHA_BARS)
    x_0_hat = diffusion.to_x_0(prediction, diffusion.target(prediction, x_0, eps, ALPHA_BARS), x_t, ALPHA_BARS)
    assert torch.allclose(x_0_hat, x_0, rtol=1e-12, atol=1e-12)
    assert torch.allclose(diffusion.to_eps(x_0_hat, x_t, ALPHA_BARS), eps, rtol=1e-9, atol=1e-9)


def test_v_is_the_rotation_of_eps_and_x_0() -> None:
    x_0, eps = randn(2, 1, 2, 2), randn(2, 1, 2, 2, seed=1)
    assert torch.allclose(diffusion.target("v_prediction", x_0, eps, 0.36), 0.6 * eps - 0.8 * x_0, rtol=1e-13)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_x_0_survives_where_no_signal_is_left(prediction: Prediction) -> None:
    """At alpha_bar = 0 x_t is noise alone: v and x_0 predictions still name x_0, eps cannot."""
    x_0, eps = randn(2, 1, 2, 2), randn(2, 1, 2, 2, seed=1)
    output = diffusion.target(prediction, x_0, eps, 0.0)
    assert torch.equal(diffusion.to_x_0(prediction, output, eps, 0.0), x_0)
    assert not bool(diffusion.to_x_0("epsilon", randn(2, 1, 2, 2, seed=2), eps, 0.0).isfinite().any())


@pytest.mark.parametrize("guidance", [None, [1.0, 2.5, 0.0, 7.0]])
@pytest.mark.parametrize("clip", [None, 0.8])
def test_one_oracle_gives_the_same_x_0_hat_in_every_parameterisation(
    guidance: list[float] | None, clip: float | None
) -> None:
    """eps and v are affine in x_0 at a fixed x_t, so guidance of the raw outputs is the same in all three."""
    x_t, t = randn(4, 1, 3, 3), torch.tensor([0, 250, 600, 999])
    abar, labels = ALPHA_BARS[t], torch.tensor([0, 1, 2, 3])

    def run(prediction: Prediction) -> Tensor:
        def network(x: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
            assert label is not None
            x_0 = torch.tanh(x + 0.2 * label[:, None, None, None])
            eps = diffusion.to_eps(x_0, x, ALPHA_BARS[t])
            return diffusion.target(prediction, x_0, eps, ALPHA_BARS[t])

        scale = None if guidance is None else torch.tensor(guidance, dtype=torch.float64)
        return Denoiser(network, prediction, clip, null_label=4)(x_t, t, abar, labels, scale)

    wanted = run("sample")
    assert clip is None or float(wanted.abs().max()) <= clip
    for prediction in PREDICTIONS:
        assert torch.allclose(run(prediction), wanted, rtol=1e-10, atol=1e-10)


def test_float32_images_stay_float32() -> None:
    x = torch.zeros(1, 1, 2, 2)
    assert diffusion.q_sample(x, x, 0.5).dtype == torch.float32
    assert all(part.dtype == torch.float32 for part in diffusion.posterior(x, x, 0.5, 0.6))
