"""What the command lines of all trainings share: how long, where, on what, and the fields of the recipe."""

from __future__ import annotations

import argparse
import dataclasses
import math
import re
import shutil
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any, Literal, get_args, get_origin, get_type_hints

import torch

from ddpm_core.network import pick_device
from ddpm_core.recipe import Recipe
from ddpm_core.runs import AnyRun, RunDirectory

MAY_CHANGE = {"out", "resume", "steps", "time_budget_s", "save_every", "device", "compile", "bf16"}  # with --resume


def duration(text: str) -> float:
    """'90s', '40m' or '2.5h' -> seconds."""
    match = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not match or not float(match[1]):
        raise argparse.ArgumentTypeError(f"{text!r} is no duration; write 90s, 40m or 2.5h")
    return float(match[1]) * {"s": 1, "m": 60, "h": 3600}[match[2]]


def add_run_arguments(p: argparse._ArgumentGroup, out: Path) -> None:
    """Where a training happens and how long it goes on: the same for every kind."""
    p.add_argument("--out", type=Path, default=out, help="run directory (default: %(default)s)")
    p.add_argument("--resume", action="store_true", default=False, help="go on with the run in --out; its recipe stays")
    p.add_argument("--steps", type=int, help="optimizer steps in all")
    p.add_argument(
        "--time-budget", type=duration, dest="time_budget_s", metavar="DURATION", help="such as 40m; instead of --steps"
    )
    p.add_argument(
        "--save-every", type=duration, default=300.0, metavar="DURATION", help="between checkpoints (default: 5m)"
    )
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    p.add_argument(
        "--compile",
        action=argparse.BooleanOptionalAction,
        help="torch.compile the step; takes a minute, gains half (default: where there is a compiler)",
    )
    p.add_argument(
        "--bf16",
        action=argparse.BooleanOptionalAction,
        help="bfloat16 autocast (default: where the hardware has it)",
    )


def add_recipe_arguments(p: argparse._ArgumentGroup, names: Iterable[str]) -> None:
    """Options for fields of Recipe."""
    hints = get_type_hints(Recipe)
    fields = {field.name: field for field in dataclasses.fields(Recipe)}
    for name in names:
        flag = "--" + name.replace("_", "-")
        if choices := get_args(hints[name]) if get_origin(hints[name]) is Literal else ():
            p.add_argument(flag, choices=choices)
        elif name == "adam_betas":
            p.add_argument(flag, type=float, nargs=2, metavar=("B1", "B2"))
        elif hints[name] is bool:
            p.add_argument(flag, action=argparse.BooleanOptionalAction)
        else:
            p.add_argument(flag, type=type(fields[name].default))


def recipe_of(given: Mapping[str, Any], images: int, epochs: int) -> Recipe:
    """The recipe that options ask for: where they name no length, so many epochs of so many images."""
    found = {f.name: given[f.name] for f in dataclasses.fields(Recipe) if f.name in given}
    if "adam_betas" in found:
        found["adam_betas"] = tuple(found["adam_betas"])
    if "steps" not in found and "time_budget_s" not in found:
        batch_size = found.get("batch_size", Recipe(steps=1).batch_size)
        found["steps"] = math.ceil(epochs * images / max(batch_size, 1))
    return Recipe(**found)


def resumed(args: argparse.Namespace, directory: RunDirectory, kind: type[AnyRun], more: Collection[str]) -> AnyRun:
    """The run in a directory, of the length that a command line gives it.

    Args:
        more: the options that may be given besides MAY_CHANGE.

    Raises:
        ValueError: an option that cannot change. FileNotFoundError, CheckpointError: as RunDirectory.read has them.
    """
    refused = sorted(f"--{name.replace('_', '-')}" for name in vars(args).keys() - MAY_CHANGE - set(more))
    if refused:
        raise ValueError(f"{', '.join(refused)} cannot change in a run that is resumed: start another in another --out")
    run = directory.read(kind)
    length = {k: vars(args)[k] for k in ("steps", "time_budget_s") if k in args}
    recipe = dataclasses.replace(run.recipe, **{"steps": 0, "time_budget_s": 0.0, **length} if length else {})
    changes: dict[str, Any] = hardware(args, {"bf16": run.bf16, "compile": run.compile})
    return dataclasses.replace(run, recipe=recipe, **changes)


def hardware(args: argparse.Namespace, otherwise: Mapping[str, bool] | None = None) -> dict[str, Any]:
    """bf16 and compile as asked for; else those of a run, or what the device and the machine have."""
    if otherwise is None:
        otherwise = {"bf16": has_bf16(pick_device(args.device)), "compile": shutil.which("c++") is not None}
    return {name: getattr(args, name, value) for name, value in otherwise.items()}


def has_bf16(device: torch.device) -> bool:
    """Whether the hardware computes in bfloat16 itself, so that it is faster than float32 there."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    capabilities = torch.cpu.get_capabilities() if hasattr(torch.cpu, "get_capabilities") else {}
    return device.type == "cpu" and bool(capabilities.get("avx512_bf16") or capabilities.get("amx_bf16"))
