"""Muon and AdamW share a network's parameters, and convolutions are trained as the matrices they are."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from ddpm_core import optimizers
from ddpm_core.unet import UNet
from tests.networks import DIGITS

HOW: dict[str, Any] = {"adam_betas": (0.9, 0.99), "weight_decay": 0.0}


def network() -> UNet:
    torch.manual_seed(0)
    return UNet(DIGITS).to(memory_format=torch.channels_last)


def with_gradients(net: nn.Module, lr: float, found: list[torch.optim.Optimizer]) -> dict[str, Tensor]:
    """What one step with random gradients adds to every parameter."""
    before = {k: v.detach().clone() for k, v in net.named_parameters()}
    for parameter in net.parameters():
        parameter.grad = torch.randn_like(parameter)
    for optimizer in found:
        for group in optimizer.param_groups:
            group["lr"] = lr
        optimizer.step()
    return {k: v.detach() - before[k] for k, v in net.named_parameters()}


@pytest.mark.parametrize("name", ["adamw", "muon"])
def test_every_parameter_is_trained_once(name: optimizers.Name) -> None:
    net = network()
    found = optimizers.build(net, name, **HOW)
    assert len(found) == {"adamw": 1, "muon": 2}[name]
    held = sum(p.numel() for optimizer in found for group in optimizer.param_groups for p in group["params"])
    assert held == sum(p.numel() for p in net.parameters())
    assert all(change.any() for change in with_gradients(net, 1e-3, found).values())


def test_muon_moves_a_convolution_by_a_near_orthogonal_matrix_of_adamws_size() -> None:
    """All singular values alike (its five iterations leave them within 0.3 .. 1.5), root mean square 0.2 lr."""
    net, lr = network(), 1e-3
    changes = with_gradients(net, lr, optimizers.build(net, "muon", **HOW))
    for name in ("mid_block.resnets.0.conv1.weight", "down_blocks.0.resnets.0.time_emb_proj.weight"):
        matrix = changes[name].flatten(1)
        singular = torch.linalg.svdvals(matrix) / (0.2 * lr * max(matrix.shape) ** 0.5)
        assert singular.min() > 0.3
        assert singular.max() < 1.5
        assert float(matrix.square().mean().sqrt()) == pytest.approx(0.2 * lr, rel=0.4)


def test_muon_is_torchs_own_on_the_flattened_weight() -> None:
    conv = nn.Conv2d(5, 4, 3, bias=False).to(memory_format=torch.channels_last)
    matrix = nn.Parameter(conv.weight.detach().permute(0, 2, 3, 1).reshape(4, -1).clone())
    ours = optimizers.Muon([conv.weight], weight_decay=0.1)
    theirs = torch.optim.Muon([matrix], lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    ours.param_groups[0]["lr"] = 0.02
    for seed in range(3):
        conv.weight.grad = torch.randn(conv.weight.shape, generator=torch.Generator().manual_seed(seed))
        matrix.grad = conv.weight.grad.permute(0, 2, 3, 1).reshape(4, -1).clone()
        ours.step()
        theirs.step()
    assert torch.equal(conv.weight.detach().permute(0, 2, 3, 1).reshape(4, -1), matrix.detach())


def test_weights_that_would_be_copied_are_refused() -> None:
    with pytest.raises(ValueError, match="channels-last"):
        optimizers.build(UNet(DIGITS), "muon", **HOW)
