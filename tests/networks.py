"""The small networks of the tests: one of the layout that we ship, two levels, attention on the lower, a label; and one
of a single level, for scikit-learn's 8x8 digits."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch

from ddpm_core.checkpoint import Model, load_model, save_model
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
)
EIGHT_SCHEDULER = SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing")


def eight(num_class_embeds: int | None = 11, scheduler: SchedulerConfig = EIGHT_SCHEDULER) -> Model:
    """EIGHT with random weights, in memory."""
    torch.manual_seed(0)
    net = UNet(dataclasses.replace(EIGHT, num_class_embeds=num_class_embeds)).eval().requires_grad_(False)
    for parameter in net.parameters():
        if not parameter.any():  # layers that start at zero would hide the label
            parameter.normal_(std=0.2)
    return Model("tiny", "-", net, scheduler, scheduler.schedule())


def call_distilled(directory: Path) -> None:
    """Makes a model directory say that its network was distilled for 2 calls."""
    model = load_model(directory)
    scheduler = dataclasses.replace(model.scheduler, distilled_steps=2)
    save_model(directory, model.net.state_dict(), model.config, scheduler)
