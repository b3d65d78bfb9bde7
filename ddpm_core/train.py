"""Offline training: `python -m ddpm_core.train --help`. Writes a run directory that can be resumed and served.

<out>/run.json             what is trained, on what, how
<out>/state.safetensors    everything that changes, for --resume
<out>/metrics.jsonl        one line every few steps
<out>/samples.png loss.png pictures, renewed at every checkpoint
<out>/model/               the averaged weights as a model directory: DDPM_MODEL=<out>/model python -m app
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save
from tqdm import tqdm

from ddpm_core import checkpoint, data, pictures
from ddpm_core.checkpoint import Model, SchedulerConfig
from ddpm_core.diffusion import Prediction
from ddpm_core.network import pick_device
from ddpm_core.sampling import generate
from ddpm_core.training import Recipe, StepStats, Trainer, TrainingDiverged
from ddpm_core.unet import UNet, UNetConfig

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
LOG_EVERY = 25  # steps between two lines of metrics.jsonl

PRESETS: dict[str, dict[str, Any]] = {
    "reference": {"prediction": "epsilon", "schedule": "linear"},  # Ho et al. 2020; the rest is Recipe's defaults
    "fast": {  # the most quality for little time: docs/log.md has the comparison
        "prediction": "v_prediction", "schedule": "cosine", "timesteps": "stratified", "min_snr_gamma": 5.0,
        "batch_size": 64, "lr": 2e-3, "warmup_steps": 200, "decay": 0.6, "adam_betas": (0.9, 0.99),
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Run:
    """What run.json holds: enough to build the same training again."""

    data: str
    data_root: str
    unet: UNetConfig
    scheduler: SchedulerConfig
    recipe: Recipe

    def to_dict(self) -> dict[str, Any]:
        return dataclasses.asdict(self)

    @classmethod
    def from_dict(cls, d: dict[str, Any]) -> Run:
        recipe: dict[str, Any] = {k: tuple(v) if isinstance(v, list) else v for k, v in d["recipe"].items()}
        return cls(
            d["data"], d["data_root"], UNetConfig.from_dict(d["unet"]),
            SchedulerConfig.from_dict(d["scheduler"]), Recipe(**recipe),
        )  # fmt: skip


def duration(text: str) -> float:
    """'90s', '40m' or '2.5h' -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 90s, 40m or 2.5h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def show_duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def build_parser() -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog="python -m ddpm_core.train",
        description="Train a DDPM. Ctrl-C saves and says how to resume.",
        argument_default=argparse.SUPPRESS,
    )
    where = p.add_argument_group("run")
    where.add_argument("--out", type=Path, default=Path("runs/mnist"), help="run directory (default: %(default)s)")
    where.add_argument("--resume", action="store_true", help="go on with the run in --out; only its length may change")
    where.add_argument("--steps", type=int, help="optimizer steps in all")
    where.add_argument(
        "--time-budget", type=duration, dest="time_budget_s", metavar="DURATION", help="such as 40m; instead of --steps"
    )
    where.add_argument(
        "--save-every", type=duration, default=300.0, metavar="DURATION", help="between checkpoints (default: 5m)"
    )
    where.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    where.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="torch.compile the step; takes a minute, gains half (default: yes)",
    )
    where.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        default=None,
        help="bfloat16 autocast (default: where the hardware has it)",
    )
    what = p.add_argument_group("data")
    what.add_argument("--data", choices=sorted(data.DATASETS), default="mnist")
    what.add_argument(
        "--data-root", type=Path, default=Path("data"), help="torchvision's root folder (default: %(default)s)"
    )
    what.add_argument("--download", action="store_true", default=False, help="fetch the data set where it is missing")
    how = p.add_argument_group("recipe (each option overrides the preset)")
    how.add_argument(
        "--recipe", choices=sorted(PRESETS), default="reference", help="preset (default: %(default)s, Ho et al. 2020)"
    )
    how.add_argument("--prediction", choices=get_args(Prediction))
    how.add_argument("--schedule", choices=sorted(SCHEDULES))
    how.add_argument("--variance", choices=("fixed_small", "fixed_large"), default="fixed_small")
    for field in dataclasses.fields(Recipe):
        if field.name in ("steps", "time_budget_s"):
            continue
        flag = "--" + field.name.replace("_", "-")
        if field.name == "timesteps":
            how.add_argument(flag, choices=("uniform", "stratified"))
        elif field.name == "adam_betas":
            how.add_argument(flag, type=float, nargs=2, metavar=("B1", "B2"))
        else:
            how.add_argument(flag, type=type(field.default))
    net = p.add_argument_group("network")
    net.add_argument(
        "--channels", type=int, nargs="+", default=[32, 64, 64], help="one width a resolution (default: 32 64 64)"
    )
    net.add_argument("--layers", type=int, default=1, help="residual blocks a resolution (default: 1)")
    net.add_argument("--dropout", type=float, default=0.0)
    return p


def plan_run(args: argparse.Namespace, images: data.ImageSet) -> Run:
    """The run that a command line asks for."""
    given = {**PRESETS[args.recipe], **{k: v for k, v in vars(args).items() if v is not None}}
    recipe = {f.name: given[f.name] for f in dataclasses.fields(Recipe) if f.name in given}
    if "adam_betas" in recipe:
        recipe["adam_betas"] = tuple(recipe["adam_betas"])
    if "steps" not in recipe and "time_budget_s" not in recipe:
        recipe["steps"] = 40 * len(images.images) // recipe.get("batch_size", Recipe(steps=1).batch_size)
    channels, height, width = images.images.shape[1:]
    levels = len(args.channels)
    unet = UNetConfig(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(args.channels),
        layers_per_block=args.layers,
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        norm_num_groups=8,
        attention_head_dim=None,
        dropout=args.dropout,
        num_class_embeds=images.num_classes + 1,
    )
    _ = unet.image_shape
    scheduler = SchedulerConfig(
        beta_schedule=SCHEDULES[given["schedule"]],
        prediction_type=given["prediction"],
        variance_type=args.variance,
        timestep_spacing="trailing",
    )
    return Run(args.data, str(args.data_root), unet, scheduler, Recipe(**recipe))


class RunDirectory:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.state, self.config, self.metrics = path / "state.safetensors", path / "run.json", path / "metrics.jsonl"

    def save(self, trainer: Trainer, run: Run, log: list[StepStats]) -> None:
        """Writes a whole checkpoint; the state first, so that a crash in between costs pictures only."""
        progress = {"step": trainer.step, "elapsed_s": trainer.elapsed_s}
        tensors = {k: v.detach().contiguous() for k, v in trainer.state_tensors().items()}
        checkpoint.write_atomically(self.state, save(tensors, metadata={"progress": json.dumps(progress)}))
        lines = "".join(json.dumps(dataclasses.asdict(s)) + "\n" for s in log)
        checkpoint.write_atomically(self.metrics, lines.encode())
        weights = trainer.ema.weights
        sha256 = checkpoint.save_model(self.path / "model", weights, run.unet, run.scheduler)
        facts = {
            **{k: v for k, v in run.to_dict().items() if k in ("data", "recipe")},
            "steps_done": trainer.step,
            "images_seen": trainer.step * run.recipe.batch_size,
            "training_s": round(trainer.elapsed_s),
            "device": trainer.device.type,
            "precision": "bfloat16 autocast" if trainer.bf16 else "float32",
            "torch": torch.__version__,
        }
        checkpoint.write_atomically(self.path / "model" / "training.json", checkpoint.to_json(facts))
        net = UNet(run.unet)
        net.load_state_dict(weights)
        model = Model("model", sha256, net, run.scheduler, run.scheduler.schedule())
        self.draw_samples(model, trainer.device)
        if len(log) > 1:
            pictures.save_loss_curve(self.path / "loss.png", [s.step for s in log], [s.loss for s in log])

    def draw_samples(self, model: Model, device: torch.device, columns: int = 10) -> None:
        """One row of samples a class."""
        rows = model.config.num_classes or columns
        labels = [row if model.config.num_classes else None for row in range(rows) for _ in range(columns)]
        pictures.save_samples(self.path / "samples.png", generate(model, device, range(len(labels)), labels), columns)

    def load(self, trainer: Trainer) -> list[StepStats]:
        """Puts the saved state into trainer and returns the log up to it."""
        with safe_open(self.state, framework="pt") as file:
            progress = json.loads(file.metadata()["progress"])
        trainer.load_state_tensors(load_file(self.state), **progress)
        log = [StepStats(**json.loads(line)) for line in self.metrics.read_text().splitlines()]
        return [s for s in log if s.step <= trainer.step]


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 itself, so that it is faster than float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def announce(run: Run, trainer: Trainer, images: data.ImageSet, out: Path, compiled: bool) -> None:
    """Says what will be trained, on what, and for about how long; measures a step for that and leaves no trace."""
    r = run.recipe
    parameters = sum(p.numel() for p in trainer.net.parameters())
    print(
        f"net    U-Net {'/'.join(map(str, run.unet.block_out_channels))}, {parameters:,} parameters, "
        f"{run.scheduler.prediction_type}, {run.scheduler.beta_schedule} schedule\n"
        f"data   {run.data}: {len(images.images):,} images {tuple(images.images.shape[1:])}, "
        f"{images.num_classes} classes\n"
        f"on     {trainer.device}, {torch.get_num_threads()} threads, {'bfloat16' if trainer.bf16 else 'float32'}"
        f"{', compiled (the first step takes a minute)' if compiled else ''}",
        flush=True,
    )
    for _ in range(2):  # the first one warms up
        start = time.monotonic()
        trainer.loss().backward()  # type: ignore[no-untyped-call]
        trainer.optimizer.zero_grad()
        step_s = time.monotonic() - start
    if r.steps:
        left = max(r.steps - trainer.step, 0)
        length = f"{left:,} steps of {r.batch_size} images, about {show_duration(left * step_s)}"
    else:
        left_s = max(r.time_budget_s - trainer.elapsed_s, 0)
        length = f"{show_duration(left_s)}, about {left_s / step_s:,.0f} steps of {r.batch_size} images"
    print(f"for    {length}\nto     {out}", flush=True)


def train(run: Run, trainer: Trainer, directory: RunDirectory, log: list[StepStats], save_every: float) -> bool:
    """Trains to the end or to the first SIGINT or SIGTERM, saving as it goes. Returns whether it came to the end."""
    stop = False

    def on_signal(signum: int, frame: object) -> None:
        nonlocal stop
        if stop:
            raise KeyboardInterrupt
        stop = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=1.0, initial=trainer.progress, bar_format="{percentage:3.0f}% |{bar:20}| {desc}", mininterval=0.5)
    first_step, first_time, first_progress = trainer.step, time.monotonic(), trainer.progress
    saved_at, loss_mean = first_time, math.nan
    try:
        for stats in trainer.train():
            now = time.monotonic()
            loss_mean = stats.loss if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * stats.loss
            if stats.step % LOG_EVERY == 0:
                log.append(stats)
            rate = (stats.step - first_step) * run.recipe.batch_size / (now - first_time)
            left_s = (now - first_time) * (1 - stats.progress) / max(stats.progress - first_progress, 1e-9)
            bar.set_description_str(
                f"step {stats.step:,}  loss {loss_mean:.4f}  {rate:.0f} images/s  {show_duration(left_s)} left", False
            )
            bar.update(stats.progress - bar.n)
            if stop:
                break
            if now - saved_at >= save_every:
                directory.save(trainer, run, log)
                saved_at = time.monotonic()
    finally:
        bar.close()
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    directory.save(trainer, run, log)
    return not stop


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    directory = RunDirectory(args.out)
    try:
        if getattr(args, "resume", False):
            if not directory.state.is_file():
                raise FileNotFoundError(f"{args.out} holds no run to resume: leave --resume out to start one")
            run = Run.from_dict(checkpoint.read_json(directory.config))
            length = {k: vars(args)[k] for k in ("steps", "time_budget_s") if k in args}
            if length:
                recipe = dataclasses.replace(run.recipe, **{"steps": 0, "time_budget_s": 0.0, **length})
                run = dataclasses.replace(run, recipe=recipe)
            images = data.load(run.data, Path(run.data_root), train=True)
        else:
            if directory.state.exists():
                raise FileExistsError(
                    f"{args.out} already holds a run: add --resume to go on with it, or name another --out"
                )
            images = data.load(args.data, args.data_root, train=True, download=args.download)
            run = plan_run(args, images)
        device = pick_device(args.device)
    except (ValueError, OSError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    torch.manual_seed(run.recipe.seed)  # the initial weights
    trainer = Trainer(
        UNet(run.unet), run.scheduler.schedule(), run.scheduler.prediction_type, images, run.recipe,
        null_label=run.unet.num_classes, device=device,
        compile_net=args.compile and (device.type == "cuda" or shutil.which("c++") is not None),
        bf16=has_bf16(device) if args.bf16 is None else args.bf16,
    )  # fmt: skip
    log = directory.load(trainer) if getattr(args, "resume", False) else []
    checkpoint.write_atomically(directory.config, checkpoint.to_json(run.to_dict()))
    announce(run, trainer, images, args.out, trainer.forward is not trainer.net)
    resume = f"resume with: python -m ddpm_core.train --out {args.out} --resume"
    try:
        finished = train(run, trainer, directory, log, args.save_every)
    except TrainingDiverged as error:
        print(f"error: {error}\n{resume}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(f"stopped; what came after the last checkpoint is lost. {resume}", file=sys.stderr)
        return 130
    print(f"{'done' if finished else 'saved'} at step {trainer.step:,}: {args.out}/samples.png, {args.out}/model")
    if not finished:
        print(resume)
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main())
