"""The command line of train.py: what its options say, and the run that they ask for."""

from __future__ import annotations

import argparse
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any, get_args

from ddpm_core import checkpoint, data, data_arguments, record
from ddpm_core.diffusion import Prediction
from ddpm_core.plans import Variance
from ddpm_core.recipe import Recipe
from ddpm_core.run_options import add_recipe_arguments, add_run_arguments, hardware, recipe_of, resumed
from ddpm_core.runs import RunDirectory, TrainingRun
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.unet import UNetConfig

PROG = "python -m ddpm_core.train"

SCHEDULES = {"linear": "linear", "cosine": "squaredcos_cap_v2"}

PRESETS: dict[str, dict[str, Any]] = {
    "reference": {"prediction": "epsilon", "schedule": "linear"},  # Ho et al. 2020; the rest is Recipe's defaults
    "fast": {  # the most quality for little time on a CPU; docs/log.md
        "prediction": "v_prediction", "schedule": "cosine", "timesteps": "stratified", "min_snr_gamma": 5.0,
        "batch_size": 64, "lr": 2e-3, "warmup_steps": 200, "decay": 0.6, "adam_betas": (0.9, 0.99),
    },
}  # fmt: skip


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=prog,
        description="Train a DDPM. Ctrl-C saves and says how to resume.",
        argument_default=argparse.SUPPRESS,
    )
    where = p.add_argument_group("run")
    add_run_arguments(where, Path("runs/mnist"))
    where.add_argument(
        "--init", type=Path, metavar="DIR", help="start from the weights of this model directory, and its network"
    )
    data_arguments.add_data_arguments(p.add_argument_group("data"))
    how = p.add_argument_group("recipe (each option overrides the preset)")
    how.add_argument("--recipe", choices=sorted(PRESETS), help="preset (default: reference, Ho et al. 2020)")
    how.add_argument("--prediction", choices=get_args(Prediction))
    how.add_argument("--schedule", choices=sorted(SCHEDULES))
    how.add_argument("--variance", choices=get_args(Variance), help="default: fixed_small")
    add_recipe_arguments(how, (f.name for f in dataclasses.fields(Recipe) if f.name not in ("steps", "time_budget_s")))
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
MAY_CHANGE = {"data_root", "download"}  # with --resume, besides what every run may


def new_run(args: argparse.Namespace) -> tuple[TrainingRun, data.ImageSet]:
    """The run that a command line asks for, and its images."""
    given = {**DEFAULTS, **PRESETS[getattr(args, "recipe", DEFAULTS["recipe"])], **vars(args)}
    images = data_arguments.load(given, train=True)
    recipe = recipe_of(given, len(images.images), epochs=40)
    unet, scheduler, started_from = of_model(args, images) if "init" in args else (*of_options(given, images), {})
    run = TrainingRun(
        unet, scheduler, recipe, **hardware(args), started_from=started_from,
        data=given["data"], data_root=str(given["data_root"]),
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
        no_label=images.num_classes > 0,
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
    if model.distilled_steps is not None:
        raise ValueError(f"{args.init} is distilled, and knows few timesteps: start from its teacher")
    wanted, found = model.config.image_shape, tuple(images.images.shape[1:])
    if model.needs_label:
        raise ValueError(f'{args.init} knows no "no label", which training teaches too: start from another model')
    if wanted != found or (model.takes_labels and model.num_classes != images.num_classes):
        raise ValueError(
            f"{args.init} is of {model.num_classes} classes of {wanted} images, "
            f"{images.name} has {images.num_classes} of {found}: they must agree"
        )
    return model.config, model.scheduler, record.origin(args.init, model)


def old_run(args: argparse.Namespace, directory: RunDirectory) -> tuple[TrainingRun, data.ImageSet]:
    """The run in a directory, with what a command line changes of it, and its images."""
    run = resumed(args, directory, TrainingRun, MAY_CHANGE)
    if "data_root" in args:
        run = dataclasses.replace(run, data_root=str(args.data_root))
    images = data.load(run.data, Path(run.data_root), train=True, download=args.download, options=run.data_options)
    if run.data_facts != images.facts():
        raise ValueError(
            f"the images of {run.data} under {run.data_root} are not those that this run began with: "
            "bring them back, or start another run from its weights with --init"
        )
    return run, images
