"""What a teacher makes of noise on its way to images, and the loss of a student that is to get there in fewer calls.

The teacher's way is a deterministic sampler's of many steps: from one noise it comes to one image (Luhman and Luhman
2021, arXiv 2101.02388). The student's is DDIM's of few, and a step of training is the whole of it: each of its calls
is held to where the teacher is at that timestep, and each but the first begins where the student's own call before it
ended. So it learns from what it will see when it draws, and a later call mends what an earlier one leaves.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from ddpm_core import checkpoint, diffusion, samplers, sampling
from ddpm_core.checkpoint import Model
from ddpm_core.network import Network
from ddpm_core.parallel import ONE, Ranks
from ddpm_core.plans import SamplingPlan
from ddpm_core.recipe import Recipe, batch_indices
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.training import Predict

FIRST_SEED = 2**41  # far from those that people and evaluations use
FILE_CHAINS = 256  # drawn at once, into one file: what a crash can cost
OF_RECIPE = (  # the fields of Recipe that count here
    "steps", "time_budget_s", "batch_size", "optimizer", "lr", "warmup_steps", "decay", "adam_betas", "weight_decay",
    "clip_grad", "ema_decay", "seed",
)  # fmt: skip
SOFTEN = 0.03  # differences far below it count by their square, far above by themselves


@dataclasses.dataclass(frozen=True)
class Chains:
    """Which chains are drawn.

    Raises:
        ValueError: a number outside its range.
    """

    chains: int = 30_720
    nfe: int = 2  # network calls of the student
    teacher_nfe: int = 10  # of dpmpp_2m, which makes the chains

    def __post_init__(self) -> None:
        if self.chains < 1 or self.nfe < 1:
            raise ValueError(f"chains={self.chains} and nfe={self.nfe} must be 1 or more")
        if self.teacher_nfe <= self.nfe or self.teacher_nfe % self.nfe:
            raise ValueError(
                f"teacher_nfe={self.teacher_nfe} must be a multiple of nfe={self.nfe}: they meet at its steps"
            )

    def plans(self, schedule: NoiseSchedule) -> tuple[SamplingPlan, SamplingPlan]:
        """The student's and the teacher's.

        Raises:
            ValueError: the schedule does not allow so many steps, or rounding keeps the two apart.
        """
        student = samplers.build(schedule, "ddim", self.nfe, spacing="trailing")
        teacher = samplers.build(schedule, "dpmpp_2m", self.teacher_nfe, spacing="trailing")
        if list(student.timesteps) != list(teacher.timesteps[:: self.every]):
            raise ValueError(f"teacher_nfe={self.teacher_nfe} has not all timesteps of nfe={self.nfe}: take another")
        return student, teacher

    @property
    def every(self) -> int:
        """The teacher's steps to one of the student's."""
        return self.teacher_nfe // self.nfe


def labels_of(model: Model, chains: range) -> Tensor | None:
    """(N,) long: in turn, "no label" one of them if there is one; None: the network takes none."""
    embedded = model.config.num_class_embeds
    return torch.tensor(chains) % embedded if embedded else None


def draw(
    model: Model,
    network: Network,
    device: torch.device,
    which: Chains,
    folder: Path,
    on_batch: sampling.OnBatch,
    ranks: Ranks = ONE,
) -> Tensor:
    """The teacher's chains: x_T and where the student is to be after each of its calls, (N, nfe + 1, C, H, W).

    They are kept in `folder`, a file for every FILE_CHAINS of them; what lies there of the same chains is not drawn
    again. on_batch is told how many more there are, drawn or found. Ranks draw the files in turn, then read the others.

    Raises:
        ValueError: the two plans do not meet. FloatingPointError: the teacher returned NaN or infinity.
    """
    _, plan = which.plans(model.schedule)
    of = {
        "weights": model.sha256, "scheduler": json.dumps(model.scheduler.to_dict()), "network": type(network).__name__,
        "plan": plan.sha256, "every": str(which.every),
    }  # fmt: skip
    starts, each = range(0, which.chains, FILE_CHAINS), FILE_CHAINS * ranks.world

    def found(first: int) -> Tensor:
        chains = range(first, min(first + FILE_CHAINS, which.chains))
        path = folder / f"{first:08}.safetensors"
        content = {**of, "chains": str(chains)}
        part = _read(path, content)
        if part is None:
            part = _draw(model, network, device, plan, which.every, chains)
            checkpoint.write_atomically(path, save({"x": part}, metadata=content))
        return part

    def share() -> dict[int, Tensor]:
        parts = {}
        for first in starts[ranks.rank :: ranks.world]:
            parts[first] = found(first)
            on_batch(min(each, which.chains - first // each * each))
        return parts

    own = ranks.agree(share)
    return torch.cat([own[first] if first in own else found(first) for first in starts])


def _read(path: Path, content: dict[str, str]) -> Tensor | None:
    """The chains in a file; None where there is none, or none of these."""
    try:
        with safe_open(path, framework="pt") as file:
            return file.get_tensor("x") if file.metadata() == content else None
    except (OSError, SafetensorError):
        return None


def _draw(
    model: Model, network: Network, device: torch.device, plan: SamplingPlan, every: int, chains: range
) -> Tensor:
    seeds = range(FIRST_SEED + chains.start, FIRST_SEED + chains.stop)
    labels = labels_of(model, chains)
    x = sampling.draw_noise(seeds, 0, torch.empty(0, *model.config.image_shape, device=device))
    steps = sampling.sample(
        model.denoiser(network), plan, x, seeds, labels=None if labels is None else labels.to(device)
    )
    drawn = torch.stack([x, *(step.x for step in steps if (step.index + 1) % every == 0)], dim=1).cpu()
    if not bool(torch.isfinite(drawn).all()):
        raise FloatingPointError(f"{model.name} returned numbers that are not finite")
    return drawn.clone()  # no tensor of inference mode: gradients will pass


class TrajectoryLoss:
    """How far the student's chain is from the teacher's, summed over its calls, mean over the batch.

    Of a call counts sqrt(d^2 + c^2), d being the root mean square difference of x after it, in units of x_0_hat: from
    some noises the student's image will be another than the teacher's, and squares would let these rule.
    """

    def __init__(
        self,
        chains: Tensor,
        labels: Tensor | None,
        plan: SamplingPlan,
        prediction: diffusion.Prediction,
        recipe: Recipe,
        *,
        device: torch.device,
        ranks: Ranks = ONE,
    ) -> None:
        if plan.a.shape[1] != 1 or plan.b.shape[1] != 1 or plan.d.any():
            raise ValueError("a student's plan looks at the last x alone and draws no noise")
        self.chains, self.plan, self.prediction, self.recipe = chains, plan, prediction, recipe
        self.labels, self.device, self.rows = labels, device, ranks.share(recipe.batch_size)

    def __call__(self, predict: Predict, step: int) -> Tensor:
        index = batch_indices(self.recipe, step, len(self.chains))[self.rows]
        x, *wanted = self.chains[index].to(self.device).unbind(1)
        labels = () if self.labels is None else (self.labels[index].to(self.device),)
        plan, total = self.plan, torch.zeros((), device=self.device)
        for i, goal in enumerate(wanted):
            t = torch.full((len(x),), float(plan.timesteps[i]), device=self.device)
            output = predict(x.contiguous(memory_format=torch.channels_last), t, *labels)
            x_0_hat = diffusion.to_x_0(self.prediction, output, x, float(plan.alpha_bars[i]))
            x = float(plan.a[i, 0]) * x + float(plan.b[i, 0]) * x_0_hat
            squares = ((x - goal) / float(plan.b[i, 0])).square().flatten(1).mean(1)
            total = total + (squares + SOFTEN**2).sqrt().mean()
        return total
