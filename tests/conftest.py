"""A small real model on disk, made once: random weights, the real layout, loaded by the real code."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch: on busy cores two spinning threads wait for each other

from pathlib import Path

import numpy as np
import pytest
import torch

from ddpm_core import learned, plans, spacings
from ddpm_core.checkpoint import load_model, save_model, to_json
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.unet import UNet
from tests.networks import DIGITS


@pytest.fixture(scope="session")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A conditional 28x28 network of ten classes with random weights, its graph, and a learned plan of 3 steps."""
    torch.manual_seed(0)
    net = UNet(DIGITS)
    for parameter in net.parameters():  # no layer stays at its zero initialisation
        torch.nn.init.normal_(parameter, std=0.1)
    directory = tmp_path_factory.mktemp("models") / "tiny"
    scheduler = SchedulerConfig(
        beta_schedule="squaredcos_cap_v2", prediction_type="v_prediction", timestep_spacing="trailing"
    )
    save_model(directory, net.state_dict(), DIGITS, scheduler)
    model = load_model(directory)
    form = learned.Form(plans.dpmpp_2m, model.schedule, spacings.timesteps(model.schedule, 3, "quadratic"))
    fitted = learned.to_json({3: form.plan(np.linspace(-0.1, 0.1, form.size))}, model.sha256, {})
    (directory / learned.PLANS_NAME).write_bytes(to_json(fitted))
    model.network(torch.device("cpu"), export=True)
    return directory
