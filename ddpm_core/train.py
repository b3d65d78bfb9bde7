"""Offline training: `python -m ddpm_core.train --help`. Writes a run directory (runs.py), to be resumed and served."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any, get_args

import torch
from tqdm import tqdm

from ddpm_core import checkpoint, data
from ddpm_core.checkpoint import SchedulerConfig
from ddpm_core.diffusion import Prediction
from ddpm_core.network import pick_device
from ddpm_core.plans import Variance
from ddpm_core.runs import Run, RunDirectory
from ddpm_core.training import Recipe, StepStats, Trainer, TrainingDiverged
from ddpm_core.unet import UNet, UNetConfig

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}
LOG_EVERY = 25  # steps between two lines of metrics.jsonl

PRESETS: dict[str, dict[str, Any]] = {
    "reference": {"prediction": "epsilon", "schedule": "linear"},  # Ho et al. 2020; the rest is Recipe's defaults
    "fast": {  # the most quality for little time on a CPU; docs/log.md
        "prediction": "v_prediction", "schedule": "cosine", "timesteps": "stratified", "min_snr_gamma": 5.0,
        "batch_size": 64, "lr": 2e-3, "warmup_steps": 200, "decay": 0.6, "adam_betas": (0.9, 0.99),
    },
}  # fmt: skip


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
    where.add_argument(
        "--resume", action="store_true", default=False, help="go on with the run in --out; its recipe stays"
    )
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
        help="torch.compile the step; takes a minute, gains half (default: where there is a compiler)",
    )
    where.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 autocast (default: where the hardware has it)",
    )
    what = p.add_argument_group("data")
    what.add_argument("--data", choices=sorted(data.DATASETS), help="default: mnist")
    what.add_argument("--data-root", type=Path, help="torchvision's root folder (default: data)")
    what.add_argument("--download", action="store_true", default=False, help="fetch the data set where it is missing")
    how = p.add_argument_group("recipe (each option overrides the preset)")
    how.add_argument("--recipe", choices=sorted(PRESETS), help="preset (default: reference, Ho et al. 2020)")
    how.add_argument("--prediction", choices=get_args(Prediction))
    how.add_argument("--schedule", choices=sorted(SCHEDULES))
    how.add_argument("--variance", choices=get_args(Variance), help="default: fixed_small")
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
    net.add_argument("--channels", type=int, nargs="+", help="one width a resolution (default: 32 64 64)")
    net.add_argument("--layers", type=int, help="residual blocks a resolution (default: 1)")
    net.add_argument("--dropout", type=float, help="default: 0")
    return p


DEFAULTS: dict[str, Any] = {
    "data": "mnist", "data_root": Path("data"), "recipe": "reference", "variance": "fixed_small",
    "channels": [32, 64, 64], "layers": 1, "dropout": 0.0,
}  # fmt: skip
MAY_CHANGE = {  # what --resume takes besides its own option
    "out", "resume", "steps", "time_budget_s", "save_every", "device", "compile", "bf16", "data_root", "download",
}  # fmt: skip


def new_run(args: argparse.Namespace) -> tuple[Run, data.ImageSet]:
    """The run that a command line asks for, and its images."""
    given = {**DEFAULTS, **PRESETS[getattr(args, "recipe", DEFAULTS["recipe"])], **vars(args)}
    images = data.load(given["data"], given["data_root"], train=True, download=args.download)
    recipe = {f.name: given[f.name] for f in dataclasses.fields(Recipe) if f.name in given}
    if "adam_betas" in recipe:
        recipe["adam_betas"] = tuple(recipe["adam_betas"])
    if "steps" not in recipe and "time_budget_s" not in recipe:
        batch_size = recipe.get("batch_size", Recipe(steps=1).batch_size)
        recipe["steps"] = math.ceil(40 * len(images.images) / max(batch_size, 1))
    channels, height, width = images.images.shape[1:]
    levels = len(given["channels"])
    unet = UNetConfig(
        sample_size=height if height == width else (height, width),
        in_channels=channels,
        out_channels=channels,
        block_out_channels=tuple(given["channels"]),
        layers_per_block=given["layers"],
        down_block_types=("DownBlock2D",) * (levels - 1) + ("AttnDownBlock2D",),
        up_block_types=("AttnUpBlock2D",) + ("UpBlock2D",) * (levels - 1),
        norm_num_groups=8,
        attention_head_dim=None,
        dropout=given["dropout"],
        num_class_embeds=images.num_classes + 1,
    )
    _ = unet.image_shape
    scheduler = SchedulerConfig(
        beta_schedule=SCHEDULES[given["schedule"]],
        prediction_type=given["prediction"],
        variance_type=given["variance"],
        timestep_spacing="trailing",
    )
    run = Run(
        given["data"], str(given["data_root"]), unet, scheduler, Recipe(**recipe),
        bf16=has_bf16(pick_device(args.device)), compile=shutil.which("c++") is not None,
    )  # fmt: skip
    return run, images


def old_run(args: argparse.Namespace, directory: RunDirectory) -> tuple[Run, data.ImageSet]:
    """The run in a directory, with what a command line changes of it, and its images."""
    refused = sorted(f"--{name.replace('_', '-')}" for name in vars(args).keys() - MAY_CHANGE)
    if refused:
        raise ValueError(f"{', '.join(refused)} cannot change in a run that is resumed: start another in another --out")
    run = directory.read()
    length = {k: vars(args)[k] for k in ("steps", "time_budget_s") if k in args}
    if length:
        recipe = dataclasses.replace(run.recipe, **{"steps": 0, "time_budget_s": 0.0, **length})
        run = dataclasses.replace(run, recipe=recipe)
    if "data_root" in args:
        run = dataclasses.replace(run, data_root=str(args.data_root))
    return run, data.load(run.data, Path(run.data_root), train=True, download=args.download)


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 itself, so that it is faster than float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))


def announce(run: Run, trainer: Trainer, images: data.ImageSet, out: Path) -> None:
    """Says what will be trained, on what, and for about how long; measures a step for that and leaves no trace."""
    r = run.recipe
    parameters = sum(p.numel() for p in trainer.net.parameters())
    print(
        f"net    U-Net {'/'.join(map(str, run.unet.block_out_channels))}, {parameters:,} parameters, "
        f"{run.scheduler.prediction_type}, {run.scheduler.beta_schedule} schedule\n"
        f"data   {run.data}: {len(images.images):,} images {tuple(images.images.shape[1:])}, "
        f"{images.num_classes} classes\n"
        f"on     {trainer.device}, {torch.get_num_threads()} threads, {'bfloat16' if trainer.bf16 else 'float32'}"
        f"{', compiled (the first step takes a minute)' if run.compile else ''}",
        flush=True,
    )
    for _ in range(2):  # the first one warms up
        start = time.monotonic()
        trainer.loss().backward()  # type: ignore[no-untyped-call]
        trainer.optimizer.zero_grad()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
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
    resume = f"resume with: python -m ddpm_core.train --out {args.out} --resume"
    try:
        if not args.resume and directory.state.exists():
            raise FileExistsError(
                f"{args.out} already holds a run: add --resume to go on with it, or name another --out"
            )
        run, images = old_run(args, directory) if args.resume else new_run(args)
        run = dataclasses.replace(run, **{k: vars(args)[k] for k in ("bf16", "compile") if k in args})
        torch.manual_seed(run.recipe.seed)  # the initial weights
        trainer = Trainer(
            UNet(run.unet), run.scheduler.schedule(), run.scheduler.prediction_type, images, run.recipe,
            null_label=run.unet.num_classes, device=pick_device(args.device), compile_net=run.compile, bf16=run.bf16,
        )  # fmt: skip
        log = directory.load(trainer) if args.resume else []
        checkpoint.write_atomically(directory.config, checkpoint.to_json(run.to_dict()))
        announce(run, trainer, images, args.out)
        finished = train(run, trainer, directory, log, args.save_every)
    except TrainingDiverged as error:
        print(f"error: {error}\n{resume}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if directory.state.exists():
            print(f"stopped; what came after the last checkpoint is lost. {resume}", file=sys.stderr)
        return 130
    print(f"{'done' if finished else 'saved'} at step {trainer.step:,}: {args.out}/samples.png, {args.out}/model")
    if not finished:
        print(resume)
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main())
