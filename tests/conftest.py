"""A small real model on disk, made once: random weights, the real layout, loaded by the real code."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on busy cores two spinning threads wait for each other

from pathlib import Path

import pytest
import torch

from ddpm_core.checkpoint import SchedulerConfig, load_model, save_model
from ddpm_core.unet import UNet
from tests.networks import DIGITS


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional 28x28 network of ten classes with random weights, and its graph."""
    torch.manual_seed(0)
    net = UNet(DIGITS)
    for parameter in net.parameters():  # no layer stays at its zero initialisation
        torch.nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("models") / "tiny"
    scheduler = SchedulerConfig(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    save_model(directory, net.state_dict(), DIGITS, scheduler)
    load_model(directory).network(torch.device("cpu"), export=True)
    return directory
