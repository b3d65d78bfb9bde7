"""Samplers by name: which plan a name stands for, how many steps it takes, and where it stops on its way."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType

from ddpm_core import plans, spacings
from ddpm_core.plans import SamplingPlan, Variance
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.spacings import Spacing


@dataclasses.dataclass(frozen=True)
class Sampler:
    """What a sampler's name stands for where nothing else is asked."""

    build: Callable[..., SamplingPlan]  # (schedule, timesteps) and the options that only it has
    steps: int | None  # None: T


SAMPLERS: dict[str, Sampler] = {
    "ddpm": Sampler(plans.ddpm, None),
    "ddim": Sampler(plans.ddim, 20),
    "dpmpp_2m": Sampler(plans.dpmpp_2m, 10),
    "dpmpp_3m": Sampler(plans.dpmpp_3m, 10),
    "ipndm": Sampler(plans.ipndm, 10),
    "unipc": Sampler(plans.unipc, 10),
}

LEARNED = "learned"
"""The sampler whose plans are fitted to a network and lie beside its weights (learned.py)."""

PRESETS: dict[str, tuple[tuple[str, int | None], ...]] = {
    "fast": (("unipc", 3),),
    "balanced": ((LEARNED, 5), ("dpmpp_2m", 10)),
    "reference": (("ddpm", None),),
}
"""Names for people: samplers and their steps, of which the first that there is counts."""


def resolve(
    sampler: str,
    steps: int | None,
    most: int,
    learned: Collection[int] = (),
    *,
    eta: float = 0.0,
    distilled_steps: int | None = None,
    from_noise: bool = True,
) -> tuple[str, int]:
    """The sampler behind a sampler's or preset's name, and its steps: those asked for, else its own.

    Args:
        sampler: a key of SAMPLERS or PRESETS, or LEARNED.
        steps: 1 .. most; None: the sampler's own, as far as there are so many.
        most: how many steps the chain has: T, or t + 1 where it starts at t.
        learned: the numbers of steps that the model has learned plans for.
        eta: of ddim.
        distilled_steps: of ddim with eta 0, for which alone the model's network is trained; then every preset is that.
        from_noise: whether the chain starts at pure noise, as learned plans do; else at an image noised to some t.

    Raises:
        ValueError: no such sampler, or steps is out of range, or not what the network is trained for.
    """
    if distilled_steps is not None:
        return _distilled(sampler, steps, eta, distilled_steps, from_noise)
    own_steps = None
    if sampler in PRESETS:
        sampler, own_steps = next(
            (name, count)
            for name, count in PRESETS[sampler]
            if name != LEARNED or (from_noise and (count if steps is None else steps) in learned)
        )
    elif sampler in SAMPLERS:
        own_steps = SAMPLERS[sampler].steps
    elif sampler != LEARNED or not learned:
        known = ", ".join([*SAMPLERS, *([LEARNED] if learned else []), *PRESETS])
        raise ValueError(f"sampler={sampler!r} is not known; known: {known}")
    if sampler == LEARNED:
        if not from_noise:
            raise ValueError(f"sampler={LEARNED!r} starts from pure noise alone: take another to start at an image's t")
        if steps is None:
            steps = own_steps or max(learned)
        if steps not in learned:
            raise ValueError(f"steps={steps} must be one of {', '.join(map(str, sorted(learned)))} for {LEARNED}")
        return sampler, steps
    if steps is None:
        steps = min(own_steps or most, most)
    if not 1 <= steps <= most:
        raise ValueError(f"steps={steps} must be 1 .. {most}")
    return sampler, steps


def _distilled(sampler: str, steps: int | None, eta: float, own: int, from_noise: bool) -> tuple[str, int]:
    """resolve() for a network that is trained for ddim with its own number of steps and no noise on the way."""
    if not from_noise:
        raise ValueError(f"sampler={sampler!r} cannot start at an image's t: this model is distilled, from pure noise")
    if sampler != "ddim" and sampler not in PRESETS:
        raise ValueError(f"sampler={sampler!r} does not fit: this model is distilled for ddim with {own} steps")
    if steps not in (None, own):
        raise ValueError(f"steps={steps} must be {own}: this model is distilled for them")
    if eta:
        raise ValueError(f"eta={eta} must be 0: this model is distilled for ddim without noise on the way")
    return "ddim", own


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
    learned: Mapping[int, SamplingPlan] = MappingProxyType({}),
    distilled_steps: int | None = None,
) -> SamplingPlan:
    """A plan by the name of its sampler or preset.

    Args:
        schedule: the noise schedule.
        sampler: a key of SAMPLERS or PRESETS, or LEARNED.
        steps: 1 .. T, or 1 .. start + 1; None: the sampler's own.
        eta: ddim only.
        start: the timestep that the chain starts at, as an image noised to it does; None: from pure noise.
            Leading timesteps would not begin there: trailing ones stand in for them.
        variance: ddpm only.
        spacing, offset: of the timesteps; all T of them need neither.
        learned: plans fitted to the network, by their number of steps; they start from pure noise.
        distilled_steps: of ddim with eta 0, for which alone the network is trained.

    Raises:
        ValueError: no such sampler, or a number outside its range.
    """
    total = schedule.num_train_steps
    if start is not None:
        if not 0 <= start < total:
            raise ValueError(f"start={start} must be 0 .. {total - 1}")
        total = start + 1
    sampler, count = resolve(
        sampler, steps, total, learned, eta=eta, distilled_steps=distilled_steps, from_noise=start is None
    )
    if eta and sampler != "ddim":
        raise ValueError(f"eta={eta} is for sampler ddim alone; {sampler} has none")
    if sampler == LEARNED:
        return learned[count]
    if count == total or (start is not None and spacing == "leading"):
        spacing, offset = "trailing", 0
    t = spacings.timesteps(schedule, count, spacing, offset=offset, start=start)
    own: dict[str, dict[str, object]] = {"ddpm": {"variance": variance}, "ddim": {"eta": eta}}
    return SAMPLERS[sampler].build(schedule, t, **own.get(sampler, {}))
