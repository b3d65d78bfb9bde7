"""Learned plans: a sampler's timesteps and coefficients, fitted to one network so that few calls do the work of many.

A plan is a table of numbers, so it can be fitted like any parameters; the network's weights stay as they are. From the
same noise the short plan's images are to be those of a long one (after Frankel et al. 2025, arXiv 2502.17423, who match
a teacher's solution too). Some twenty numbers are fitted on some hundred images, by Levenberg and Marquardt's least
squares with differences for derivatives: no gradients of the network are needed, so whatever runs it fast fits it fast.

learned.json lies beside the weights that its plans were fitted to and names them by their sha256.
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ddpm_core.plans import SamplingPlan
from ddpm_core.schedules import Float64Array, NoiseSchedule

PLANS_NAME = "learned.json"
HISTORY = 3  # x_0_hats that a learned step sees
MOST_HISTORY = 4  # columns of any plan's a and b
DIFFERENCE = 1e-3  # of a parameter, for the derivatives
TABLES = ("timesteps", "alpha_bars", "a", "b", "d")


class StalePlans(ValueError):
    """The plans were fitted to other weights."""


def to_json(plans: Mapping[int, SamplingPlan], sha256: str, facts: Mapping[str, Any]) -> dict[str, Any]:
    """The content of learned.json: plans by their number of steps, whose they are, and how they came about."""
    tables = {str(s): {k: getattr(plan, k).tolist() for k in TABLES} for s, plan in sorted(plans.items())}
    return {"weights_sha256": sha256, "plans": tables, "fit": dict(facts)}


def load(path: Path, sha256: str) -> dict[int, SamplingPlan]:
    """The plans in a learned.json, by their number of steps; none where there is no such file.

    Raises:
        StalePlans: they belong to other weights. ValueError: the file cannot be used.
    """
    if not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text("utf-8"))
        if content["weights_sha256"] != sha256:
            raise StalePlans("was fitted to other weights")
        plans = [_plan(steps, tables) for steps, tables in content["plans"].items()]
    except (OSError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"a field is missing or wrong: {error!r}") from error
    return {len(plan): plan for plan in plans}


def _plan(steps: str, tables: Mapping[str, Any]) -> SamplingPlan:
    """A plan from its tables in a file. Raises ValueError where it is none that we could have written."""
    arrays = {k: np.array(tables[k], np.float64) for k in TABLES}
    for name, array in arrays.items():
        wide = name in ("a", "b")
        if array.ndim != 1 + wide or str(len(array)) != steps or (wide and not 1 <= array.shape[1] <= MOST_HISTORY):
            raise ValueError(f"{name} of the plan of {steps} steps has the shape {array.shape}")
        if not np.isfinite(array).all():
            raise ValueError(f"{name} of the plan of {steps} steps holds numbers that are not finite")
    if arrays["timesteps"][-1] < 0 or not ((arrays["alpha_bars"] > 0) & (arrays["alpha_bars"] < 1)).all():
        raise ValueError(f"the plan of {steps} steps has timesteps below 0 or alpha_bars outside 0 .. 1")
    return SamplingPlan("learned", **arrays)


@dataclasses.dataclass(frozen=True)
class Form:
    """A learned plan's parameters, a vector, and the plan that they make.

    They are corrections of a training-free plan: how the way from T-1 to 0 is shared among the steps, a factor on every
    a, and a summand on every b, in units of what all x_0_hats of the step weigh together. Zeros: that plan itself.
    """

    base: Callable[[NoiseSchedule, Float64Array], SamplingPlan]
    schedule: NoiseSchedule
    start: Float64Array  # (S,) the timesteps of the zero vector; the first is T-1

    @property
    def _free(self) -> NDArray[np.bool_]:
        """(S - 1, HISTORY) where row i sees x_0_hat k steps back: not before the first call."""
        return np.tril(np.ones((len(self.start) - 1, HISTORY), bool), 0)

    @property
    def size(self) -> int:
        return 2 * (len(self.start) - 1) + int(self._free.sum())

    def plan(self, parameters: Float64Array) -> SamplingPlan:
        """The plan of (size,) parameters."""
        rows = len(self.start) - 1
        ways, factors, summands = np.split(parameters, [rows, 2 * rows])
        first = self.start[0]
        shares = -np.diff(np.append(self.start, 0.0)) * np.exp(np.append(ways, 0.0))  # the last: what is left above 0
        t = first * (1 - np.cumsum(shares) / shares.sum())
        base = self.base(self.schedule, np.append(first, t[:-1]))
        a, b = base.a.copy(), np.zeros((rows + 1, max(HISTORY, base.b.shape[1])))
        b[:, : base.b.shape[1]] = base.b
        a[:-1] *= np.exp(factors)[:, None]
        corrections = np.zeros((rows, HISTORY))
        corrections[self._free] = summands
        b[:-1, :HISTORY] += corrections * np.abs(base.b[:-1].sum(1, keepdims=True))
        return dataclasses.replace(base, sampler="learned", a=a, b=b)


@dataclasses.dataclass(frozen=True)
class FitStep:
    """What is known after one step of the fit."""

    iteration: int
    error: float  # mean over images of the root mean square pixel difference to the long plan's image
    plan: SamplingPlan  # the best so far


def fit(form: Form, draw: Callable[[SamplingPlan], Tensor], wanted: Tensor, iterations: int) -> Iterator[FitStep]:
    """Fits a plan, yielding the start and every step after it; ends early where no step makes it better.

    The sum over images of the distance to the wanted one is made smaller, not of its square: from some noises two
    solvers end at different digits, and no coefficient mends that. (Weights 1 / distance, anew at every step.)

    Args:
        form: what is fitted.
        draw: the images of a plan, (N, C, H, W), from the same noises each time.
        wanted: (N, C, H, W), the images of a long plan from them.
        iterations: each costs size + 1 draws, and one for every step that makes things worse.
    """

    def residuals(parameters: Float64Array) -> Float64Array:
        return (draw(form.plan(parameters)) - wanted).flatten(1).double().numpy()

    def distances(r: Float64Array) -> Float64Array:
        found: Float64Array = np.sqrt((r**2).mean(1))
        return found

    best, damping = np.zeros(form.size), 1e-2
    r = residuals(best)
    yield FitStep(0, float(distances(r).mean()), form.plan(best))
    for iteration in range(1, iterations + 1):
        slopes = [(residuals(best + DIFFERENCE * unit) - r) / DIFFERENCE for unit in np.eye(form.size)]
        weights = 1 / np.maximum(distances(r), 1e-3)
        gram = np.array([[np.sum(weights * (p * q).sum(1)) for q in slopes] for p in slopes])
        slope = np.array([np.sum(weights * (p * r).sum(1)) for p in slopes])
        better = False
        while not better and damping < 1e4:
            step = np.linalg.solve(gram + damping * np.diag(np.diag(gram)), slope)
            tried = residuals(best - step) if _sensible(form, best - step) else None
            if tried is not None and distances(tried).mean() < distances(r).mean():
                best, r, damping, better = best - step, tried, damping / 3, True
            else:
                damping *= 4
        yield FitStep(iteration, float(distances(r).mean()), form.plan(best))
        if not better:
            return


def _sensible(form: Form, parameters: Float64Array) -> bool:
    """Whether a step of the fit stays where plans are plans."""
    try:
        return bool(np.isfinite(form.plan(parameters).b).all())
    except ValueError:
        return False
