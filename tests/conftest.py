"""A small real model on disk, made once: random weights, the real layout, loaded by the real code."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from ddpm_core.checkpoint import SchedulerConfig, save_model
from ddpm_core.unet import UNet, UNetConfig


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional 28x28 network of ten classes with random weights."""
    config = UNetConfig(
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
    torch.manual_seed(0)
    net = UNet(config)
    for parameter in net.parameters():  # no layer stays at its zero initialisation
        torch.nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("models") / "tiny"
    scheduler = SchedulerConfig(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    save_model(directory, net.state_dict(), config, scheduler)
    return directory
