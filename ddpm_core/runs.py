"""A training run on the disk: what is trained and how (Run), and the folder that holds it (RunDirectory).

<out>/run.json             what is trained, on what, how
<out>/state.safetensors    everything that changes, for --resume
<out>/metrics.jsonl        one line every few steps
<out>/samples.png loss.png pictures, renewed at every checkpoint
<out>/model/               the averaged weights as a model directory: DDPM_MODEL=<out>/model python -m app
"""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, ClassVar, Self, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save

from ddpm_core import checkpoint, pictures, record, sampling, trajectories
from ddpm_core.checkpoint import CheckpointError, Model
from ddpm_core.data import Options
from ddpm_core.recipe import Recipe
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.training import StepStats, Trainer
from ddpm_core.trajectories import Chains
from ddpm_core.unet import UNet, UNetConfig


def _recipe(d: Mapping[str, Any]) -> Recipe:
    fields: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in d.items()}
    return Recipe(**fields)


@dataclasses.dataclass(frozen=True)
class Run:
    """What run.json holds: enough to build the same training again. Its subclasses say what is learned."""

    unet: UNetConfig
    scheduler: SchedulerConfig
    recipe: Recipe
    bf16: bool  # autocast
    compile: bool
    started_from: dict[str, Any]  # of a model whose weights it began with: their sha256, and how they were trained

    # how many trained it at once, in turn where that changed; () before it begins
    processes: tuple[int, ...] = dataclasses.field(default=(), kw_only=True)

    READ: ClassVar[dict[str, Callable[[Any], Any]]] = {  # from JSON
        "unet": UNetConfig.from_dict, "scheduler": SchedulerConfig.from_dict, "recipe": _recipe, "processes": tuple,
    }  # fmt: skip
    PLACES: ClassVar[set[str]] = {"data_root", "teacher"}  # where things lie, which every host may have for itself

    def facts(self) -> dict[str, Any]:
        """What is learned from and how, for the model's records."""
        raise NotImplementedError

    def trained_by(self, processes: int) -> Self:
        """The same run, with so many processes from here on."""
        same = self.processes[-1:] == (processes,)
        return self if same else dataclasses.replace(self, processes=(*self.processes, processes))

    def by_several(self) -> dict[str, Any]:
        """The processes, where there ever was more than one at once."""
        return {"processes": list(self.processes)} if set(self.processes) - {1} else {}

    def to_dict(self) -> dict[str, Any]:
        content = dataclasses.asdict(self)
        del content["processes"]
        return {**content, **self.by_several()}

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Self:
        """The inverse of to_dict. Raises ValueError where a field is missing, unknown or out of range."""
        d = {"processes": (1,), **d}
        try:
            return cls(**{**d, **{name: read(d[name]) for name, read in cls.READ.items()}})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"a field is missing or wrong: {error}") from error


@dataclasses.dataclass(frozen=True)
class TrainingRun(Run):
    """A training on images.

    Raises:
        ValueError: the recipe does not fit the network.
    """

    data: str
    data_root: str
    data_options: Options
    data_facts: dict[str, Any]  # ImageSet.facts()

    READ: ClassVar[dict[str, Callable[[Any], Any]]] = {**Run.READ, "data_options": lambda d: Options(**d)}

    def __post_init__(self) -> None:
        if self.recipe.guidance_scale != 1 and self.unet.dropout:
            raise ValueError("guidance_scale needs a network without dropout: two of its outputs are compared")

    def facts(self) -> dict[str, Any]:
        return {
            "data": self.data,
            "data_options": dataclasses.asdict(self.data_options),
            "data_facts": self.data_facts,
            "recipe": dataclasses.asdict(self.recipe),
        }


@dataclasses.dataclass(frozen=True)
class DistillationRun(Run):
    """A training on what a teacher makes of noise; started_from is the teacher."""

    teacher: str  # its directory
    chains: Chains

    READ: ClassVar[dict[str, Callable[[Any], Any]]] = {**Run.READ, "chains": lambda d: Chains(**d)}

    def facts(self) -> dict[str, Any]:
        recipe = {k: v for k, v in dataclasses.asdict(self.recipe).items() if k in trajectories.OF_RECIPE}
        return {**dataclasses.asdict(self.chains), "recipe": recipe}


AnyRun = TypeVar("AnyRun", bound=Run)


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state, self.config, self.metrics = path / "state.safetensors", path / "run.json", path / "metrics.jsonl"
        self.model = path / "model"

    def save(self, trainer: Trainer, run: Run, log: list[StepStats]) -> None:
        """Writes a whole checkpoint. Once the state is there, a crash costs pictures only."""
        lines = "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in log)
        checkpoint.write_atomically(self.metrics, lines.encode())
        progress = {"step": trainer.step, "elapsed_s": trainer.elapsed_s, "skipped": trainer.skipped}
        tensors = {k: v.detach().contiguous() for k, v in trainer.state_tensors().items()}
        checkpoint.write_atomically(self.state, save(tensors, metadata={"progress": json.dumps(progress)}))
        weights = trainer.ema.weights
        sha256 = checkpoint.save_model(self.model, weights, run.unet, run.scheduler)
        facts = {
            **run.facts(),
            "steps_done": trainer.step,
            **({"steps_skipped": trainer.skipped} if trainer.skipped else {}),
            "images_seen": trainer.step * run.recipe.batch_size,
            "training_s": round(trainer.elapsed_s),
            "device": trainer.device.type,
            **run.by_several(),
            "precision": "bfloat16 autocast" if trainer.bf16 else "float32",
            "torch": torch.__version__,
            **({"started_from": run.started_from} if run.started_from else {}),
        }
        checkpoint.write_atomically(self.model / record.RECORD_NAME, checkpoint.to_json(facts))
        net = UNet(run.unet)
        net.load_state_dict(weights)
        model = Model("model", sha256, net, run.scheduler, run.scheduler.schedule())
        samples = pictures.samples_png(*sampling.one_row_a_class(model, trainer.device))
        checkpoint.write_atomically(self.path / "samples.png", samples)
        if len(log) > 1:
            curve = pictures.loss_curve_png([s.step for s in log], [s.loss for s in log])
            checkpoint.write_atomically(self.path / "loss.png", curve)

    def read(self, kind: type[AnyRun]) -> AnyRun:
        """The run that is here, which is one of a kind.

        Raises:
            FileNotFoundError: there is none. CheckpointError: its run.json cannot be used.
        """
        if not self.state.is_file():
            raise FileNotFoundError(f"{self.path} holds no run to resume: leave --resume out to start one")
        try:
            return kind.from_dict(checkpoint.read_json(self.config))
        except ValueError as error:
            message = f"{self.config}: {error} (`train` and `distill` each resume what they began)"
            raise CheckpointError(message) from error

    def load(self, trainer: Trainer) -> list[StepStats]:
        """Puts the saved state into trainer and returns the log up to it. Raises CheckpointError on damaged files."""
        try:
            trainer.load_state_tensors(load_file(self.state), **self._progress())
            log = [StepStats(**json.loads(line)) for line in self.metrics.read_text().splitlines()]
        except (SafetensorError, KeyError, TypeError, ValueError, RuntimeError) as error:
            raise CheckpointError(f"the run in {self.path} is damaged: {error}") from error
        return [s for s in log if s.step <= trainer.step]

    def saved_step(self) -> int | None:
        """The step of the checkpoint that is here; None: there is none."""
        return int(self._progress()["step"]) if self.state.is_file() else None

    def _progress(self) -> dict[str, Any]:
        with safe_open(self.state, framework="pt") as file:
            progress: dict[str, Any] = json.loads(file.metadata()["progress"])
        return progress
