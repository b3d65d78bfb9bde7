"""Noise schedules: the published tables, diffusers' tables, and what is refused."""

from __future__ import annotations

import numpy as np
import pytest
from diffusers import DDPMScheduler

from ddpm_core import schedules
from ddpm_core.schedules import NoiseSchedule

BUILDERS = {
    "linear": schedules.linear,
    "scaled_linear": schedules.scaled_linear,
    "squaredcos_cap_v2": schedules.cosine,
    "sigmoid": schedules.sigmoid,
    "laplace": schedules.laplace,
}


def test_linear_runs_from_1e_4_to_2e_2() -> None:
    """Section 4 of Ho et al. 2020: T = 1000 equally spaced betas."""
    betas = schedules.linear().betas
    assert len(betas) == 1000
    assert betas[0] == 1e-4
    assert betas[-1] == 0.02
    assert np.diff(betas) == pytest.approx((0.02 - 1e-4) / 999, rel=1e-9)


def test_scaled_linear_has_equally_spaced_square_roots() -> None:
    roots = np.sqrt(schedules.scaled_linear(100, beta_start=0.01, beta_end=0.04).betas)
    assert np.diff(roots) == pytest.approx(0.1 / 99, rel=1e-9)


def test_cosine_follows_the_squared_cosine_and_clips_its_betas() -> None:
    """Nichol and Dhariwal 2021: before the clip, alpha_bar is f(t) / f(0); the largest beta is 0.999."""
    schedule = schedules.cosine(1000)
    f = np.cos((np.arange(1001) / 1000 + 0.008) / 1.008 * np.pi / 2) ** 2
    assert schedule.betas.max() == 0.999
    assert schedule.alphas_cumprod[:-1] == pytest.approx(f[1:-1] / f[0], rel=1e-9)


def test_sigmoid_is_a_logistic_curve_between_its_ends() -> None:
    betas = schedules.sigmoid(101, beta_start=0.01, beta_end=0.03).betas
    assert betas[50] == pytest.approx(0.02, rel=1e-12)
    share = (betas - 0.01) / 0.02
    assert np.log(share / (1 - share)) == pytest.approx(np.linspace(-6, 6, 101), abs=1e-9)


def test_a_schedule_without_signal_at_its_end_is_the_old_one_stretched() -> None:
    """Lin et al. 2023: sqrt(alpha_bar) keeps its beginning, becomes 0 at the end, and is affine in what it was."""
    old, new = schedules.scaled_linear(), schedules.zero_terminal_snr(schedules.scaled_linear())
    before, after = np.sqrt(old.alphas_cumprod), np.sqrt(new.alphas_cumprod)
    assert after[0] == pytest.approx(before[0], rel=1e-12)
    assert new.alphas_cumprod[-1] == 0
    assert after == pytest.approx((before - before[-1]) * before[0] / (before[0] - before[-1]), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("name", BUILDERS)
@pytest.mark.parametrize("num_train_steps", [1000, 200])
def test_tables_equal_diffusers_to_float32_rounding(name: str, num_train_steps: int) -> None:
    """Their tables are float32: betas agree to a few units in the last place, the product to T times as much."""
    ours = BUILDERS[name](num_train_steps)
    theirs = DDPMScheduler(num_train_timesteps=num_train_steps, beta_schedule=name)
    assert ours.betas == pytest.approx(theirs.betas.numpy(), rel=1e-6, abs=2e-7)
    assert ours.alphas_cumprod == pytest.approx(theirs.alphas_cumprod.numpy(), rel=5e-5, abs=1e-8)


@pytest.mark.parametrize("name", BUILDERS)
def test_alphas_cumprod_decreases_inside_0_and_1(name: str) -> None:
    schedule = BUILDERS[name]()
    abar = schedule.alphas_cumprod
    assert abar.dtype == np.float64
    assert 0 < abar[-1] < abar[0] < 1
    assert np.all(np.diff(abar) < 0)
    assert abar[0] == 1 - schedule.betas[0]
    assert schedule.snr == pytest.approx(abar / (1 - abar))


@pytest.mark.parametrize("name", BUILDERS)
def test_from_config_builds_the_schedule_it_names(name: str) -> None:
    schedule = schedules.from_config({"beta_schedule": name, "num_train_timesteps": 50})
    assert np.array_equal(schedule.betas, BUILDERS[name](50).betas)


def test_from_config_uses_the_ends_it_is_given() -> None:
    schedule = schedules.from_config({"num_train_timesteps": 10, "beta_start": 0.1, "beta_end": 0.3})
    assert np.array_equal(schedule.betas, np.linspace(0.1, 0.3, 10))


def test_trained_betas_win_over_the_schedules_name() -> None:
    schedule = schedules.from_config({"trained_betas": (0.1, 0.2, 0.4), "beta_schedule": "linear"})
    assert schedule.betas.tolist() == [0.1, 0.2, 0.4]
    assert schedule.num_train_steps == 3
    assert schedule.alphas_cumprod == pytest.approx([0.9, 0.72, 0.432])


def test_an_unknown_schedule_is_refused_by_its_name() -> None:
    with pytest.raises(ValueError, match=r"beta_schedule='exp' is not supported.*squaredcos_cap_v2"):
        schedules.from_config({"beta_schedule": "exp"})


@pytest.mark.parametrize(
    "betas", [[], [0.0, 0.1], [-0.1], [0.1, 1.2], [1.0, 0.5], [float("nan")], [[0.1, 0.2]]], ids=repr
)
def test_bad_betas_are_refused(betas: list[float]) -> None:
    with pytest.raises(ValueError, match="betas must be"):
        NoiseSchedule(np.array(betas))


def test_only_the_last_beta_may_be_1() -> None:
    assert NoiseSchedule(np.array([0.5, 1.0])).alphas_cumprod.tolist() == [0.5, 0.0]


def test_a_schedule_cannot_be_changed_by_whoever_holds_its_table() -> None:
    source = np.array([0.1, 0.2])
    schedule = NoiseSchedule(source)
    source[0] = 0.9
    assert schedule.betas[0] == 0.1
    with pytest.raises(ValueError, match="read-only"):
        schedule.betas[0] = 0.9
