"""On a GPU, where there is one: the same pictures as on a CPU, each the same in any company, and trainings that resume.

Everywhere else these are skipped; the whole suite runs on a GPU too, as `auto` finds it.
"""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor

from app.engine.request import GenerateParams
from app.engine.runner import Runner, to_pixels
from app.engine.selfcheck import find_exactness
from ddpm_core.checkpoint import load_model
from ddpm_core.cuda_graph import MOST_ROWS, CudaGraphNetwork
from ddpm_core.data import ImageSet
from ddpm_core.losses import DenoisingLoss
from ddpm_core.network import TorchNetwork, pick_device
from ddpm_core.recipe import Recipe
from ddpm_core.training import Trainer
from ddpm_core.unet import UNet
from tests.networks import DIGITS, EIGHT_SCHEDULER

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

GPU = pick_device("auto")


def inputs(rows: int) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(rows)
    x_t, t = torch.randn(rows, 1, 28, 28, generator=generator), torch.rand(rows, generator=generator) * 999
    return x_t.to(GPU), t.to(GPU).double(), torch.arange(rows, device=GPU) % 11


def test_a_recording_has_the_bits_of_the_network(model_dir: Path) -> None:
    """Calls of every kind of size, each twice, with others between: nothing of one is left in another's answer."""
    network, plain = CudaGraphNetwork(load_model(model_dir).net, GPU), TorchNetwork(load_model(model_dir).net, GPU)
    sizes = (1, 2, 3, 7, 16, 33, MOST_ROWS, MOST_ROWS + 1)
    first, second = ([network(*inputs(rows)) for rows in order] for order in (sizes, sizes[::-1]))
    for rows, one, other in zip(sizes, first, second[::-1], strict=True):
        assert torch.equal(one, other)
        padded = 1 << (rows - 1).bit_length() if rows <= MOST_ROWS else rows
        x_t, t, label = (torch.cat([part, part.new_zeros(padded - rows, *part.shape[1:])]) for part in inputs(rows))
        assert torch.equal(one, plain(x_t, t, label)[:rows])


def test_images_are_their_own_in_any_company(model_dir: Path) -> None:
    """And a second start finds the same."""
    found = [find_exactness(Runner.load(str(model_dir), "cuda"), most=64, pin=32) for _ in range(2)]
    assert found[0].exact
    assert found[0] == found[1]


def test_a_gpu_draws_what_a_cpu_draws(model_dir: Path) -> None:
    """But for the last digits, which may round to the next level."""

    def drawn(device: str) -> Tensor:
        runner = Runner.load(str(model_dir), device)
        params = GenerateParams("a", tuple(range(16)), tuple(k % 10 for k in range(16)), "ddpm", 20, 0.0, 1.5)
        rows = [runner.row(params, index) for index in range(16)]
        while not rows[0].finished:
            assert not runner.advance(rows)
        return torch.from_numpy(to_pixels(runner.x(rows))).int()

    difference = (drawn("cuda") - drawn("cpu")).abs()
    assert difference.max() <= 1
    assert (difference > 0).float().mean() < 0.01


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_a_resumed_training_is_bit_for_bit_the_uninterrupted_one(optimizer: str, bf16: bool) -> None:
    recipe = Recipe(steps=12, batch_size=32, lr=1e-3, warmup_steps=3, optimizer=optimizer)  # type: ignore[arg-type]
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (100, 1, 28, 28), generator=generator).to(torch.uint8)
    images = ImageSet("random", pixels, torch.arange(100) % 10, 10)

    def fresh(seed: int) -> Trainer:
        torch.manual_seed(seed)
        loss = DenoisingLoss(
            images, EIGHT_SCHEDULER.schedule(), "v_prediction", recipe, null_label=10, device=GPU
        )  # fmt: skip
        return Trainer(UNet(DIGITS), loss, recipe, device=GPU, bf16=bf16)

    whole, first, second = fresh(0), fresh(0), fresh(1)
    wanted = [(s.step, s.loss, s.grad_norm) for s in whole.train()]
    next(done for done in first.train() if done.step == 5)
    state = {name: tensor.cpu().clone() for name, tensor in first.state_tensors().items()}
    second.load_state_tensors(state, step=first.step, elapsed_s=first.elapsed_s)
    assert [(s.step, s.loss, s.grad_norm) for s in second.train()] == wanted[5:]
    for name, tensor in whole.state_tensors().items():
        assert torch.equal(tensor, second.state_tensors()[name]), name
