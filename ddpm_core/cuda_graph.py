"""The network call on a GPU: its kernels recorded once for every number of rows, and launched together ever after.

A U-Net is hundreds of small kernels. To launch them one by one takes the processor longer than they take a GPU, unless
there are many rows.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddpm_core.network import TorchNetwork
from ddpm_core.unet import UNet

MOST_ROWS = 256  # of a recording; with more the kernels themselves are what takes the time (docs/log.md)
WARM_UP = 2  # calls before a recording, in which libraries choose their kernels and make their workspaces


class CudaGraphNetwork:
    """A U-Net on a CUDA device; calls of up to MOST_ROWS rows replay a recording, of the next power of two of rows.

    For one thread at a time: a recording reads and writes at fixed places.
    """

    def __init__(self, net: UNet, device: torch.device) -> None:
        self.device, self._network = device, TorchNetwork(net, device)
        self._recorded: dict[tuple[tuple[int, ...], bool], _Recording] = {}
        self._pool = torch.cuda.graph_pool_handle()  # one after the other they may use the same memory

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W); all on the device."""
        rows = len(x_t)
        if rows > MOST_ROWS:
            return self._network(x_t, t, label)
        shape = (1 << (rows - 1).bit_length(), *x_t.shape[1:])
        key = (shape, label is not None)
        with torch.cuda.device(self.device):
            if key not in self._recorded:
                self._recorded[key] = _Recording(self._network, *key, self._pool)
            return self._recorded[key](x_t, t, label)


class _Recording:
    """Calls of one shape. What rows are left over hold what they held before: no row sees another."""

    def __init__(self, network: TorchNetwork, shape: tuple[int, ...], labelled: bool, pool: Any) -> None:
        device = network.net.conv_in.weight.device
        self.x_t, self.t = torch.zeros(shape, device=device), torch.zeros(shape[0], device=device)
        self.label = torch.zeros(shape[0], dtype=torch.long, device=device) if labelled else None
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(WARM_UP):
                network(self.x_t, self.t, self.label)
        torch.cuda.current_stream().wait_stream(stream)
        self.graph = torch.cuda.CUDAGraph()
        # Other threads may work on their devices meanwhile.
        with torch.cuda.graph(self.graph, pool, stream, capture_error_mode="thread_local"):
            self.output = network(self.x_t, self.t, self.label)

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        rows = len(x_t)
        self.x_t[:rows], self.t[:rows] = x_t, t
        if self.label is not None and label is not None:
            self.label[:rows] = label
        self.graph.replay()
        return self.output[:rows].clone()
