"""Samplers by name: their plans, their steps, and what is refused."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest

from ddpm_core import samplers, schedules
from ddpm_core.spacings import Spacing

SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
LINEAR, COSINE = schedules.linear(), schedules.cosine()


@pytest.mark.parametrize("sampler", [*samplers.SAMPLERS, *samplers.PRESETS])
@pytest.mark.parametrize("spacing", SPACINGS)
@pytest.mark.parametrize("steps", [1, 2, 7, 1000, None])
def test_every_plan_ends_at_x_0_hat(sampler: str, spacing: Spacing, steps: int | None) -> None:
    plan = samplers.build(COSINE, sampler, steps, spacing=spacing, variance="fixed_large")
    assert len(plan) == (steps or samplers.resolve(sampler, None, 1000)[1])
    assert not plan.a[-1].any()
    assert plan.b[-1].tolist() == [1.0] + [0.0] * (plan.b.shape[1] - 1)
    assert plan.d[-1] == 0
    assert all(np.isfinite(table).all() for table in (plan.a, plan.b, plan.d))


def test_a_preset_is_the_first_of_its_samplers_that_there_is() -> None:
    assert samplers.resolve("balanced", None, 1000) == ("dpmpp_2m", 10)
    assert samplers.resolve("balanced", None, 1000, [3]) == ("dpmpp_2m", 10)
    assert samplers.resolve("balanced", None, 1000, [3, 5]) == ("learned", 5)
    assert samplers.resolve("balanced", 3, 1000, [3, 5]) == ("learned", 3)
    assert samplers.resolve("balanced", 7, 1000, [3, 5]) == ("dpmpp_2m", 7)
    assert samplers.resolve("balanced", None, 1000, [5], from_noise=False) == ("dpmpp_2m", 10)
    assert samplers.resolve("balanced", None, 4, [5], from_noise=False) == ("dpmpp_2m", 4)
    with pytest.raises(ValueError, match="pure noise"):
        samplers.resolve("learned", None, 1000, [5], from_noise=False)
    for sampler in ("balanced", "learned"):
        with pytest.raises(ValueError, match="steps=0"):
            samplers.resolve(sampler, 0, 1000, [5])


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("sampler", [*samplers.SAMPLERS, *samplers.PRESETS])
def test_build_refuses_steps_out_of_range(steps: int, sampler: str) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps} must be 1 \.\. 1000"):
        samplers.build(LINEAR, sampler, steps)


@pytest.mark.parametrize("eta", [-0.1, 1.1, float("nan")])
def test_eta_outside_0_and_1_is_refused(eta: float) -> None:
    with pytest.raises(ValueError, match=r"eta=\S+ must be 0 \.\. 1"):
        samplers.build(LINEAR, "ddim", 10, eta=eta)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "ddpm", "fast"])
def test_eta_is_refused_where_it_means_nothing(sampler: str) -> None:
    with pytest.raises(ValueError, match=r"eta=0\.5 is for sampler ddim alone"):
        samplers.build(LINEAR, sampler, 10, eta=0.5)


@pytest.mark.parametrize("sampler", [*samplers.SAMPLERS, *samplers.PRESETS])
@pytest.mark.parametrize("start", [0, 1, 7, 400, 999])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_a_chain_from_an_image_starts_at_its_t(sampler: str, start: int, spacing: Spacing) -> None:
    """Whatever the spacing; with the sampler's own steps as far as there are so many."""
    schedule = schedules.linear(1000)
    plan = samplers.build(schedule, sampler, start=start, spacing=spacing)
    assert plan.timesteps[0] == start
    assert plan.timesteps[-1] >= 0
    assert len(plan) == min(start + 1, samplers.resolve(sampler, None, 1000)[1])
    assert plan.alpha_bars[0] == schedule.alphas_cumprod[start]


def test_a_full_chain_from_the_last_t_is_the_chain_from_noise() -> None:
    schedule = schedules.linear(1000)
    whole, started = samplers.build(schedule, "ddpm"), samplers.build(schedule, "ddpm", start=999)
    assert np.array_equal(whole.timesteps, started.timesteps)
    assert np.array_equal(whole.b, started.b)


@pytest.mark.parametrize(("start", "steps"), [(-1, None), (1000, None), (5, 7)])
def test_a_start_outside_the_schedule_or_too_many_steps_are_refused(start: int, steps: int | None) -> None:
    with pytest.raises(ValueError, match="must be"):
        samplers.build(schedules.linear(1000), "ddim", steps, start=start)


def test_an_unknown_sampler_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="'euler' is not known; known: ddpm, ddim, dpmpp_2m, dpmpp_3m, ipndm, unipc, fast, balanced"
    ):
        samplers.build(LINEAR, "euler", 10)
