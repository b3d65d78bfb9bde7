"""The small networks of the tests: one of the layout that we ship, two levels, attention on the lower, a label; and one
of a single level, for scikit-learn's 8x8 digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import torch

from ddpm_core import learned, plans, spacings
from ddpm_core.checkpoint import Model, load_model, save_model, to_json
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.unet import UNet, UNetConfig

DIGITS = UNetConfig(
    sample_size=28,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
    attention_head_dim=None,
    num_class_embeds=11,
    no_label=True,
)

EIGHT = UNetConfig(
    sample_size=8,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8,),
    layers_per_block=1,
    down_block_types=("DownBlock2D",),
    up_block_types=("UpBlock2D",),
    norm_num_groups=4,
    add_attention=False,
    num_class_embeds=11,
    no_label=True,
)
EIGHT_SCHEDULER = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing")


def eight(
    num_class_embeds: int | None = 11, scheduler: SchedulerConfig = EIGHT_SCHEDULER, *, no_label: bool = True
) -> Model:
    """EIGHT with random weights, in memory."""
    torch.manual_seed(0)
    config = dataclasses.replace(
        EIGHT, num_class_embeds=num_class_embeds, no_label=no_label and num_class_embeds is not None
    )
    net = UNet(config).eval().requires_grad_(False)
    for parameter in net.parameters():
        if not parameter.any():  # layers that start at zero would hide the label
            parameter.normal_(std=0.2)
    return Model("tiny", "-", net, scheduler, scheduler.schedule())


def save_tiny(directory: Path, num_train_timesteps: int = 1000) -> Path:
    """A model directory of DIGITS with random weights, its graph, and a learned plan of 3 steps."""
    torch.manual_seed(0)
    net = UNet(DIGITS)
    for parameter in net.parameters():  # no layer stays at its zero initialisation
        torch.nn.init.normal_(parameter, std=0.1)
    scheduler = SchedulerConfig(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing",
        num_train_timesteps=num_train_timesteps,
    )  # fmt: skip
    save_model(directory, net.state_dict(), DIGITS, scheduler)
    model = load_model(directory)
    form = learned.Form(plans.dpmpp_2m, model.schedule, spacings.timesteps(model.schedule, 3, "quadratic"))
    fitted = learned.to_json({3: form.plan(np.linspace(-0.1, 0.1, form.size))}, model.sha256, {})
    (directory / learned.PLANS_NAME).write_bytes(to_json(fitted))
    model.network(torch.device("cpu"), export=True)
    return directory


def call_distilled(directory: Path) -> None:
    """Makes a model directory say that its network was distilled for 2 calls."""
    model = load_model(directory)
    scheduler = dataclasses.replace(model.scheduler, distilled_steps=2)
    save_model(directory, model.net.state_dict(), model.config, scheduler)
