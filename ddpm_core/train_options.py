"""The command line of train.py: what its options say, and the run that they ask for."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ddpm_core import checkpoint, data, data_arguments
from ddpm_core.diffusion import Prediction
from ddpm_core.network import pick_device
from ddpm_core.plans import Variance
from ddpm_core.recipe import Recipe
from ddpm_core.runs import Run, RunDirectory
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.unet import UNetConfig

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}

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
    where.add_argument(
        "--init", type=Path, metavar="DIR", help="start from the weights of this model directory, and its network"
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
    data_arguments.add_data_arguments(p.add_argument_group("data"))
    how = p.add_argument_group("recipe (each option overrides the preset)")
    how.add_argument("--recipe", choices=sorted(PRESETS), help="preset (default: reference, Ho et al. 2020)")
    how.add_argument("--prediction", choices=get_args(Prediction))
    how.add_argument("--schedule", choices=sorted(SCHEDULES))
    how.add_argument("--variance", choices=get_args(Variance), help="default: fixed_small")
    hints = get_type_hints(Recipe)
    for field in dataclasses.fields(Recipe):
        if field.name in ("steps", "time_budget_s"):
            continue
        flag = "--" + field.name.replace("_", "-")
        if choices := get_args(hints[field.name]) if get_origin(hints[field.name]) is Literal else ():
            how.add_argument(flag, choices=choices)
        elif field.name == "adam_betas":
            how.add_argument(flag, type=float, nargs=2, metavar=("B1", "B2"))
        elif hints[field.name] is bool:
            how.add_argument(flag, action=argparse.BooleanOptionalAction)
        else:
            how.add_argument(flag, type=type(field.default))
    net = p.add_argument_group("network")
    net.add_argument("--channels", type=int, nargs="+", help="one width a resolution (default: 32 64 64)")
    net.add_argument("--layers", type=int, help="residual blocks a resolution (default: 1)")
    net.add_argument("--dropout", type=float, help="default: 0")
    return p


DEFAULTS: dict[str, Any] = {
    **data_arguments.DEFAULTS, "recipe": "reference", "variance": "fixed_small",
    "channels": [32, 64, 64], "layers": 1, "dropout": 0.0,
}  # fmt: skip
OF_MODEL = {"prediction", "schedule", "variance", "channels", "layers", "dropout"}  # what --init brings along
MAY_CHANGE = {  # what --resume takes besides its own option
    "out", "resume", "steps", "time_budget_s", "save_every", "device", "compile", "bf16", "data_root", "download",
}  # fmt: skip


def new_run(args: argparse.Namespace) -> tuple[Run, data.ImageSet]:
    """The run that a command line asks for, and its images."""
    given = {**DEFAULTS, **PRESETS[getattr(args, "recipe", DEFAULTS["recipe"])], **vars(args)}
    images = data_arguments.load(given, train=True)
    recipe = {f.name: given[f.name] for f in dataclasses.fields(Recipe) if f.name in given}
    if "adam_betas" in recipe:
        recipe["adam_betas"] = tuple(recipe["adam_betas"])
    if "steps" not in recipe and "time_budget_s" not in recipe:
        batch_size = recipe.get("batch_size", Recipe(steps=1).batch_size)
        recipe["steps"] = math.ceil(40 * len(images.images) / max(batch_size, 1))
    unet, scheduler, started_from = of_model(args, images) if "init" in args else (*of_options(given, images), {})
    run = Run(
        given["data"], str(given["data_root"]), unet, scheduler, Recipe(**recipe),
        bf16=has_bf16(pick_device(args.device)), compile=shutil.which("c++") is not None, started_from=started_from,
        data_options=data_arguments.options_of(given), data_facts=images.facts(),
    )  # fmt: skip
    return run, images


def of_options(given: Mapping[str, Any], images: data.ImageSet) -> tuple[UNetConfig, SchedulerConfig]:
    """The network and the process that a command line asks for, for these images."""
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
        num_class_embeds=images.num_classes + 1 if images.num_classes else None,
    )
    try:
        _ = unet.image_shape
    except ValueError as error:
        raise ValueError(f"{error}: choose another --image-size, or fewer --channels") from error
    scheduler = SchedulerConfig(
        beta_schedule=SCHEDULES[given["schedule"]],
        prediction_type=given["prediction"],
        variance_type=given["variance"],
        timestep_spacing="trailing",
    )
    return unet, scheduler


def of_model(args: argparse.Namespace, images: data.ImageSet) -> tuple[UNetConfig, SchedulerConfig, dict[str, Any]]:
    """The network and the process of the model directory in --init, and where it comes from, for the run's records."""
    refused = sorted(f"--{name}" for name in vars(args).keys() & OF_MODEL)
    if refused:
        raise ValueError(f"{', '.join(refused)} cannot be given with --init: the model that it names has its own")
    model = checkpoint.load_model(args.init)
    wanted, found = model.config.image_shape, tuple(images.images.shape[1:])
    if wanted != found or (model.null_label is not None and model.config.num_classes != images.num_classes):
        raise ValueError(
            f"{args.init} is of {model.config.num_classes} classes of {wanted} images, "
            f"{images.name} has {images.num_classes} of {found}: they must agree"
        )
    path = args.init / "training.json"
    training = checkpoint.read_json(path) if path.is_file() else {}
    return model.config, model.scheduler, {"sha256": model.sha256, "training": training}


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
    images = data.load(run.data, Path(run.data_root), train=True, download=args.download, options=run.data_options)
    if run.data_facts != images.facts():
        raise ValueError(
            f"the images of {run.data} under {run.data_root} are not those that this run began with: "
            "bring them back, or start another run from its weights with --init"
        )
    return run, images


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 itself, so that it is faster than float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
