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

MOST_STEPS = 1_000_000  # of a process: its tables are computed at every start
DISTILLED = "_distilled_steps"  # as diffusers leaves it alone
CLASSES = ("DDPMScheduler", "DDIMScheduler")  # of scheduler configs: others mean something else by the same fields
VARIANCES = {  # by their names in a config; the logarithms are of the same variances
    "fixed_small": "fixed_small", "fixed_small_log": "fixed_small",
    "fixed_large": "fixed_large", "fixed_large_log": "fixed_large",
}  # fmt: skip


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
    thresholding: bool = False  # dynamic thresholding of x_0_hat, in the place of clipping
    dynamic_thresholding_ratio: float = 0.995  # the quantile that becomes 1
    sample_max_value: float = 1.0  # as far as it is below this
    prediction_type: Prediction = "epsilon"
    timestep_spacing: Spacing = "leading"  # leading, trailing or linspace
    steps_offset: int = 0  # added to leading timesteps
    rescale_betas_zero_snr: bool = False  # the schedule ends without signal
    distilled_steps: int | None = None  # the network is trained to draw by DDIM with so many, and for nothing else

    def __post_init__(self) -> None:
        for field, allowed in {
            "variance_type": tuple(dict.fromkeys(VARIANCES.values())),
            "prediction_type": ("epsilon", "sample", "v_prediction"),
            "timestep_spacing": ("leading", "trailing", "linspace"),
        }.items():
            if getattr(self, field) not in allowed:
                raise ValueError(f"{field}={getattr(self, field)!r} is not supported; supported: {', '.join(allowed)}")
        for field, kinds, low, high in (
            ("num_train_timesteps", (int,), 1, MOST_STEPS),
            ("beta_start", (int, float), 0, 1),
            ("beta_end", (int, float), 0, 1),
            ("clip_sample", (bool,), False, True),
            ("clip_sample_range", (int, float), 1e-9, math.inf),
            ("thresholding", (bool,), False, True),
            ("dynamic_thresholding_ratio", (int, float), 0, 1),
            ("sample_max_value", (int, float), 1, math.inf),
            ("steps_offset", (int,), 0, math.inf),
            ("rescale_betas_zero_snr", (bool,), False, True),
        ):
            value = getattr(self, field)
            if type(value) not in kinds or not low <= value <= high:
                names = " or ".join(kind.__name__ for kind in kinds)
                raise ValueError(f"{field}={value!r} must be {names}, {low} .. {high}")
        steps, total = self.distilled_steps, self.num_train_timesteps
        if steps is not None and (type(steps) is not int or not 1 <= steps <= total):
            raise ValueError(f"distilled_steps={steps!r} must be int, 1 .. {total}")
        few = min(3, total)  # of which a service tries every sampler at its start
        if self.timestep_spacing == "leading" and (few - 1) * (total // few) + self.steps_offset >= total:
            raise ValueError(
                f"steps_offset={self.steps_offset} is too large: of {few} leading timesteps the first would be no "
                f"timestep, which are 0 .. {total - 1}"
            )
        if self.trained_betas is not None:
            betas = self.trained_betas
            if not isinstance(betas, tuple) or not all(isinstance(beta, (int, float)) for beta in betas):
                raise ValueError("trained_betas must be a list of numbers, one a timestep")
            if len(self.trained_betas) != self.num_train_timesteps:
                raise ValueError(
                    f"trained_betas has {len(self.trained_betas)} entries, num_train_timesteps is "
                    f"{self.num_train_timesteps}: they must agree"
                )
            if self.prediction_type == "epsilon" and self.trained_betas[-1] == 1:
                raise ValueError("trained_betas ends in 1: x_T holds no signal, and epsilon cannot give x_0 there")
        if self.rescale_betas_zero_snr and (self.prediction_type == "epsilon" or total < 2):
            raise ValueError(
                "rescale_betas_zero_snr=True is supported for prediction_type sample and v_prediction, with 2 or more "
                "timesteps: x_T holds no signal, and epsilon cannot give x_0 there"
            )

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> SchedulerConfig:
        """Reads a scheduler_config.json; but for DISTILLED, keys with an underscore are notes of its writer."""
        known = {f.name for f in dataclasses.fields(cls)}
        if (name := config.get("_class_name", CLASSES[0])) not in CLASSES:
            raise ValueError(f"_class_name={name!r} is not supported; supported: {', '.join(CLASSES)}")
        if name == "DDIMScheduler" and config.get("set_alpha_to_one") is False:  # DDPMScheduler does not read it
            raise ValueError(
                "set_alpha_to_one=False is not supported: here every chain ends at the clean image, and with it ddim "
                "stops at t = 0, one noising step before. Set it to true if you mean the clean image"
            )
        fields: dict[str, Any] = {}
        for key, value in config.items():
            if key == DISTILLED:
                fields["distilled_steps"] = value
            elif key == "variance_type":
                fields[key] = _variance(value)
            elif key in known:
                fields[key] = tuple(value) if isinstance(value, list) else value
            elif not key.startswith("_") and key != "set_alpha_to_one":
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


def _variance(name: object) -> object:
    """The variance of a config's variance_type; what is none of them stays, to be refused."""
    if name in ("learned", "learned_range"):
        raise ValueError(
            f"variance_type={name!r} is not supported: how much noise a step adds is a number here, no tensor that the "
            f"network gives; supported: {', '.join(VARIANCES)}"
        )
    return VARIANCES.get(str(name), name)
