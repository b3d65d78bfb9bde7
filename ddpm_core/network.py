"""One forward of the raw network on a device, behind the call that sample() and the service share."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_core.unet import UNet


def pick_device(name: str) -> torch.device:
    """A device by name; auto is CUDA where there is one, else the CPU.

    Raises:
        ValueError: no such device on this machine.
    """
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    return device


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
