"""One forward of the raw network on a device, behind the call that sample() and the service share."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_core.unet import UNet


class TorchNetwork:
    """A U-Net on a device, evaluated without gradients."""

    def __init__(self, net: UNet, device: torch.device) -> None:
        self.device = device
        self.net = net.to(device).to(memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W)."""
        out: Tensor = self.net(x_t.contiguous(memory_format=torch.channels_last), t, label)
        return out
