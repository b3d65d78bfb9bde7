"""The network call on a GPU: kernels recorded once for every power of two of rows, and launched together ever after.

A U-Net is hundreds of small kernels. To launch them one by one takes the processor longer than they take a GPU, unless
there is much to compute in each.
"""

from __future__ import annotations

import threading

import torch
from torch import Tensor

from ddpm_core.network import TorchNetwork, flops
from ddpm_core.unet import UNet

MOST_ROWS = 256  # of a recording; more were not measured
MOST_FLOPS = 1e11  # of a recording: large kernels hide their launches, and a recording keeps its memory
WARM_UP = 2  # calls before a recording, in which libraries choose their kernels and make their workspaces

_recording = threading.Lock()  # torch allows one at a time in a process, whatever the device


class CudaGraphNetwork:
    """A U-Net on a CUDA device; calls of few rows replay a recording, of the next power of two of rows.

    For one thread at a time, and as long as the network stays on its device: a recording reads and writes at fixed
    places. The rows that it computes in vain are not counted as padding.
    """

    def __init__(self, net: UNet, device: torch.device) -> None:
        self.device, self._network = device, TorchNetwork(net, device)
        self._most_rows = min(MOST_ROWS, int(MOST_FLOPS / flops(net)))
        self._recorded: dict[tuple[tuple[int, ...], bool], _Recording] = {}
        with torch.cuda.device(device):
            self._stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W); all on the device."""
        size = 1 << (len(x_t) - 1).bit_length()
        if size > self._most_rows:
            return self._network(x_t, t, label)
        key = ((size, *x_t.shape[1:]), label is not None)
        with torch.cuda.device(self.device):
            if key not in self._recorded:
                self._recorded[key] = _Recording(self._network, *key, self._stream)
            return self._recorded[key](x_t, t, label)


class _Recording:
    """Calls of one shape. What rows are left over hold what they held before: no row sees another."""

    def __init__(
        self, network: TorchNetwork, shape: tuple[int, ...], labelled: bool, stream: torch.cuda.Stream
    ) -> None:
        device = network.net.conv_in.weight.device
        self.x_t, self.t = torch.zeros(shape, device=device), torch.zeros(shape[0], device=device)
        self.label = torch.zeros(shape[0], dtype=torch.long, device=device) if labelled else None
        self.graph = torch.cuda.CUDAGraph()
        with _recording:
            stream.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(stream):
                for _ in range(WARM_UP):
                    network(self.x_t, self.t, self.label)
            torch.cuda.current_stream().wait_stream(stream)
            # Other threads may work on their devices meanwhile.
            with torch.cuda.graph(self.graph, stream=stream, capture_error_mode="thread_local"):
                self.output = network(self.x_t, self.t, self.label)

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        rows = len(x_t)
        self.x_t[:rows], self.t[:rows] = x_t, t
        if self.label is not None and label is not None:
            self.label[:rows] = label
        self.graph.replay()
        return self.output[:rows].clone()
