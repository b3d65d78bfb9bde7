"""scheduler_config.json: every field of diffusers' DDPM and DDIM schedulers is honoured or refused by its name."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from ddpm_core import schedules
from ddpm_core.diffusion import Prediction
from ddpm_core.plans import Variance
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.spacings import Spacing

UNUSED_BY_US = {  # fields of diffusers' schedulers that change nothing for the processes we run
    "dynamic_thresholding_ratio",  # only with thresholding
    "sample_max_value",  # only with thresholding
    "skip_prk_steps",  # written by old pipelines of other schedulers
}
DISTILLED = "_distilled_steps"  # as diffusers leaves it alone
CLASSES = ("DDPMScheduler", "DDIMScheduler")  # of scheduler configs: others mean something else by the same fields
ONLY = {  # fields that we can honour at one value alone
    "thresholding": False,
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": True,
}


@dataclasses.dataclass(frozen=True)
class SchedulerConfig:
    """The fields of scheduler_config.json that say how the network was trained and how its chain is meant to run.

    Raises:
        ValueError: a value that is not supported.
    """

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    beta_schedule: str = "linear"
    trained_betas: tuple[float, ...] | None = None
    variance_type: Variance = "fixed_small"  # of the ancestral chain: fixed_small or fixed_large
    clip_sample: bool = True  # clip x_0_hat to +-clip_sample_range
    clip_sample_range: float = 1.0
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing = "leading"  # leading, trailing or linspace
    steps_offset: int = 0  # added to leading timesteps
    distilled_steps: int | None = None  # the network is trained to draw by DDIM with so many, and for nothing else

    def __post_init__(self) -> None:
        for field, allowed in {
            "variance_type": ("fixed_small", "fixed_large"),
            "prediction_type": ("epsilon", "sample", "v_prediction"),
            "timestep_spacing": ("leading", "trailing", "linspace"),
        }.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not supported; supported: {', '.join(allowed)}")
        for field, kinds, low, high in (
            ("num_train_timesteps", (int,), 1, math.inf),
            ("beta_start", (int, float), 0, 1),
            ("beta_end", (int, float), 0, 1),
            ("clip_sample", (bool,), False, True),
            ("clip_sample_range", (int, float), 1e-9, math.inf),
            ("steps_offset", (int,), 0, math.inf),
        ):
            value = getattr(self, field)
            if type(value) not in kinds or not low <= value <= high:
                names = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{field}={value!r} must be {names}, {low} .. {high}")
        steps, total = self.distilled_steps, self.num_train_timesteps
        if steps is not None and (type(steps) is not int or not 1 <= steps <= total):
            raise ValueError(f"distilled_steps={steps!r} must be int, 1 .. {total}")
        if self.trained_betas is not None:
            if len(self.trained_betas) != self.num_train_timesteps:
                raise ValueError(
                    f"trained_betas has {len(self.trained_betas)} entries, num_train_timesteps is "
                    f"{self.num_train_timesteps}: they must agree"
                )
            if self.prediction_type == "epsilon" and self.trained_betas[-1] == 1:
                raise ValueError("trained_betas ends in 1: x_T holds no signal, and epsilon cannot give x_0 there")

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SchedulerConfig:
        """Reads a scheduler_config.json; but for DISTILLED, keys with an underscore are notes of its writer."""
        known = {f.name for f in dataclasses.fields(cls)}
        if (name := config.get("_class_name", CLASSES[0])) not in CLASSES:
            raise ValueError(f"_class_name={name!r} is not supported; supported: {', '.join(CLASSES)}")
        fields: dict[str, Any] = {}
        for key, value in config.items():
            if key == DISTILLED:
                fields["distilled_steps"] = value
            elif key in known:
                fields[key] = tuple(value) if isinstance(value, list) else value
            elif key in ONLY:
                if value != ONLY[key]:
                    raise ValueError(f"{key}={value!r} is not supported; supported: {ONLY[key]!r}")
            elif not key.startswith("_") and key not in UNUSED_BY_US:
                raise ValueError(f"unknown field {key!r} in the scheduler's config; known: {', '.join(sorted(known))}")
        return cls(**fields)

    def to_dict(self) -> dict[str, Any]:
        """The content of a scheduler_config.json that diffusers reads."""
        content = {"_class_name": "DDPMScheduler", **dataclasses.asdict(self)}
        steps = content.pop("distilled_steps")
        return content if steps is None else {**content, DISTILLED: steps}

    def schedule(self) -> NoiseSchedule:
        """The noise schedule that these fields name."""
        return schedules.from_config(dataclasses.asdict(self))
