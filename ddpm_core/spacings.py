"""Where a sampler stops on its way: timesteps, strictly decreasing, by the name of their spacing."""

from __future__ import annotations

from typing import Literal

import numpy as np

from ddpm_core.schedules import Float64Array, NoiseSchedule

Spacing = Literal["leading", "trailing", "linspace", "quadratic", "log_snr"]


def timesteps(
    schedule: NoiseSchedule, steps: int, spacing: Spacing, *, offset: int = 0, start: int | None = None
) -> Float64Array:
    """(steps,) strictly decreasing timesteps of 0 .. start. All are whole numbers but those of log_snr.

    trailing, linspace, leading: evenly spaced in t; table 2 of Lin et al. 2023 (arXiv 2305.08891).
    quadratic: evenly spaced in the root of t, both ends counted in; after section D.2 of Song et al. 2021.
    log_snr: evenly spaced in log(alpha_bar / (1 - alpha_bar)), both ends counted in; Lu et al. 2022.

    Args:
        schedule: the noise schedule.
        steps: 1 .. start + 1.
        spacing: all but leading begin at start.
        offset: added to leading timesteps (steps_offset of a scheduler config).
        start: 0 .. T-1; None: T-1.

    Raises:
        ValueError: a number out of range, timesteps that leave 0 .. start, or log_snr where alpha_bar reaches 0.
    """
    last = schedule.num_train_steps - 1
    first = last if start is None else start
    if not 0 <= first <= last:
        raise ValueError(f"start={start} must be 0 .. {last}")
    if not 1 <= steps <= first + 1:
        raise ValueError(f"steps={steps} must be 1 .. {first + 1}")
    if spacing == "trailing":
        t = np.round(np.arange(first + 1, 0, -(first + 1) / steps))[:steps] - 1
    elif spacing == "linspace":
        # From 0 up, as diffusers counts: from above, what lies near .5 rounds to another timestep.
        t = np.linspace(0, first, steps).round()[::-1] if steps > 1 else np.array([first])
    elif spacing == "quadratic":
        rising = (np.linspace(np.sqrt(first), 0, steps) ** 2).round()[::-1]
        t = np.maximum(rising, np.arange(steps))[::-1]  # near 0 rounding would name some timesteps twice
    elif spacing == "log_snr":
        low, high = schedule.log_snr[first], schedule.log_snr[0]
        if not np.isfinite(low):
            raise ValueError("log_snr spacing needs alpha_bar > 0 at every timestep")
        t = schedule.timesteps_of(np.linspace(low, high, steps))
    else:
        t = (np.arange(steps) * ((first + 1) // steps))[::-1] + offset
    if t.min() < 0 or t.max() > first:
        raise ValueError(f"{spacing} timesteps of {steps} steps with offset {offset} leave 0 .. {first}")
    return t.astype(np.float64)
