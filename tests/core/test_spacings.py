"""Timesteps: as many as asked, strictly decreasing, where their spacing says."""

from __future__ import annotations

from typing import get_args

import numpy as np
import pytest
from diffusers import DDPMScheduler

from ddpm_core import schedules, spacings
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.spacings import Spacing

SPACINGS: tuple[Spacing, ...] = get_args(Spacing)
THEIRS: tuple[Spacing, ...] = ("leading", "trailing", "linspace")  # what diffusers has too
COSINE = schedules.cosine()


@pytest.mark.parametrize("total", [1000, 97])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_timesteps_are_as_many_as_asked_and_strictly_decreasing(total: int, spacing: Spacing) -> None:
    """For every N of 1 .. T, whether it divides T or not."""
    schedule = schedules.cosine(total)
    for steps in range(1, total + 1):
        t = spacings.timesteps(schedule, steps, spacing)
        assert len(t) == steps
        assert np.all(np.diff(t) < 0)
        assert spacing == "log_snr" or np.array_equal(t, t.round())
        assert 0 <= t[-1] <= t[0] <= total - 1


def test_spacings_start_and_end_where_they_say() -> None:
    for steps in (2, 7, 10, 333, 1000):
        assert spacings.timesteps(COSINE, steps, "trailing")[0] == 999
        assert spacings.timesteps(COSINE, steps, "leading")[-1] == 0
        for spacing in ("linspace", "quadratic", "log_snr"):
            assert spacings.timesteps(COSINE, steps, spacing)[[0, -1]].tolist() == [999, 0]
    assert spacings.timesteps(COSINE, 10, "leading")[0] == 900
    assert spacings.timesteps(COSINE, 10, "leading", offset=1).tolist() == [*range(901, 0, -100)]


@pytest.mark.parametrize("spacing", ["trailing", "linspace", "quadratic", "log_snr"])
def test_a_chain_may_start_below_the_last_timestep(spacing: Spacing) -> None:
    for start in (0, 1, 7, 400):
        for steps in {1, min(5, start + 1), start + 1}:
            t = spacings.timesteps(COSINE, steps, spacing, start=start)
            assert (len(t), t[0]) == (steps, start)
            assert np.all(np.diff(t) < 0)


def test_quadratic_timesteps_are_even_in_their_roots() -> None:
    roots = np.sqrt(spacings.timesteps(schedules.cosine(100_000), 20, "quadratic"))
    assert np.diff(roots) == pytest.approx(np.diff(roots).mean(), rel=0.01)


@pytest.mark.parametrize("schedule", [COSINE, schedules.linear()], ids=["cosine", "linear"])
def test_log_snr_timesteps_are_even_in_log_snr(schedule: NoiseSchedule) -> None:
    """And alpha_bar between two timesteps is the one that the spacing asked for."""
    alpha_bar = schedule.alpha_bar_at(spacings.timesteps(schedule, 20, "log_snr"))
    log_snr = np.log(alpha_bar / (1 - alpha_bar))
    assert np.diff(log_snr) == pytest.approx(np.diff(log_snr).mean(), rel=1e-6)
    assert log_snr[[0, -1]] == pytest.approx(schedule.log_snr[[-1, 0]])


def test_log_snr_spacing_is_refused_where_no_signal_is_left() -> None:
    with pytest.raises(ValueError, match="needs alpha_bar > 0"):
        spacings.timesteps(NoiseSchedule(np.array([0.1, 0.5, 1.0])), 2, "log_snr")


@pytest.mark.parametrize("spacing", THEIRS)
@pytest.mark.parametrize("steps", [2, 3, 7, 10, 13, 50, 333, 600, 999, 1000])
def test_timesteps_match_diffusers(spacing: Spacing, steps: int) -> None:
    scheduler = DDPMScheduler(timestep_spacing=spacing)
    scheduler.set_timesteps(steps)
    assert spacings.timesteps(COSINE, steps, spacing).tolist() == scheduler.timesteps.tolist()


@pytest.mark.parametrize("total", [1000, 999, 97, 50])
@pytest.mark.parametrize("spacing", THEIRS)
def test_timesteps_match_diffusers_for_any_number_of_steps(spacing: Spacing, total: int) -> None:
    """But for a further trailing one at t = -1, which theirs have at some counts that do not divide T."""
    scheduler, schedule = DDPMScheduler(num_train_timesteps=total, timestep_spacing=spacing), schedules.linear(total)
    for steps in range(2, total + 1):
        scheduler.set_timesteps(steps)
        ours, theirs = spacings.timesteps(schedule, steps, spacing).tolist(), scheduler.timesteps.tolist()
        assert ours == theirs[:steps]
        assert len(theirs) == steps or (spacing == "trailing" and theirs[steps:] == [-1])


@pytest.mark.parametrize("steps", [-1, 0, 1001])
@pytest.mark.parametrize("spacing", SPACINGS)
def test_steps_out_of_range_are_refused(steps: int, spacing: Spacing) -> None:
    with pytest.raises(ValueError, match=rf"steps={steps} must be 1 \.\. 1000"):
        spacings.timesteps(COSINE, steps, spacing)


@pytest.mark.parametrize("start", [-1, 1000])
def test_a_start_out_of_range_is_refused(start: int) -> None:
    with pytest.raises(ValueError, match=rf"start={start} must be 0 \.\. 999"):
        spacings.timesteps(COSINE, 1, "trailing", start=start)


def test_timesteps_pushed_out_of_the_table_are_refused() -> None:
    with pytest.raises(ValueError, match=r"offset 100 leave 0 \.\. 999"):
        spacings.timesteps(COSINE, 10, "leading", offset=100)


def test_one_evenly_spaced_step_begins_at_the_start_here_and_ends_there() -> None:
    """diffusers' only linspace timestep is t = 0: a network that is shown x_T is told that it is almost clean."""
    scheduler = DDPMScheduler(timestep_spacing="linspace")
    scheduler.set_timesteps(1)
    assert scheduler.timesteps.tolist() == [0]
    assert spacings.timesteps(COSINE, 1, "linspace").tolist() == [999]
    assert spacings.timesteps(COSINE, 1, "linspace", start=7).tolist() == [7]
