"""One forward of the raw network, behind the call that sample(), the evaluation and the service share.

torch runs it anywhere; on a CPU ONNX Runtime runs it about twice as fast, from a graph exported once from the weights.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable

os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")  # before its import: it would report to its makers, unasked

import numpy as np
import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ddpm_core.graph import example, facts
from ddpm_core.unet import Attention, UNet

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""One call of the raw network: x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W)."""

THREADS = torch.get_num_threads()  # as the process began: whoever uses a graph may want torch to have fewer later
onnxruntime.set_global_thread_pool_sizes(THREADS, 1)  # pools of several graphs would spin on the same cores
MOST_ROWS = 32  # of one run of a graph: with more a row takes longer, 1.1 times at 64 and 1.2 at 250 (docs/log.md)
OTHERWISE = {  # what a graph is where a fact of graph.facts is not its network's
    "weights_sha256": "was made of other weights",
    "config_sha256": "was made by another config.json",
    "form": "is of another version's form",
}
CLOSE = 1e-4  # how far a graph's output may be from torch's, relative to the largest; a right one is 1e-5 away


class GraphError(ValueError):
    """A graph that is not the network: of other weights, another config or version, damaged, or computing another."""


def pick_device(name: str) -> torch.device:
    """A device by name; auto is CUDA where there is one, else the CPU.

    For the whole process it settles that convolutions on CUDA are the same at every start, and float32 where they are
    not asked to be less. With TF32, torch's default, a row's bits hang on the rows beside it, and are further from a
    CPU's (docs/decisions/005).

    Raises:
        ValueError: no such device on this machine.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"device {name!r} cannot be used: {str(error).splitlines()[0]}") from error
    cudnn = torch.backends.cudnn
    cudnn.deterministic, cudnn.benchmark, cudnn.allow_tf32 = True, False, False
    return device


def devices_of(names: str) -> list[str]:
    """Devices by their names, comma-separated, each as pick_device takes it; `all` is every CUDA device, or the CPU."""
    if names == "all":
        return [f"cuda:{index}" for index in range(torch.cuda.device_count())] or ["cpu"]
    return [name.strip() for name in names.split(",")]


@torch.no_grad()
def flops(net: UNet) -> int:
    """Floating-point operations of one row of a call: a multiply-add is two, and what has none is not counted.

    torch's own counter finds the same, but loads the compiler: 2.4 s that every start of a service would take longer.
    """
    found = 0

    def count(module: nn.Module, _: object, out: Tensor) -> None:
        nonlocal found
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            found += 2 * out.numel() * module.weight[0].numel()
        elif isinstance(module, Attention):
            per_pair = 2 * 2 * module.to_v.out_features  # q with every k, and that with every v
            found += len(out) * out[0, 0].numel() ** 2 * per_pair

    hooks = [module.register_forward_hook(count) for module in net.modules()]
    try:
        device = net.conv_in.weight.device
        net(*(part if part is None else part.to(device) for part in example(net, rows=1)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


class TorchNetwork:
    """A U-Net on a device, evaluated without gradients."""

    def __init__(self, net: UNet, device: torch.device) -> None:
        self.net = net.to(device).to(memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W)."""
        out: Tensor = self.net(x_t.contiguous(memory_format=torch.channels_last), t, label)
        return out


def cpu_session(graph: bytes) -> onnxruntime.InferenceSession:
    """A graph on the CPU, with as many threads as torch has by itself: those of all graphs of the process."""
    options = onnxruntime.SessionOptions()
    options.use_per_session_threads = False
    options.log_severity_level = 3
    return onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])


class OnnxNetwork:
    """The same U-Net as a graph, run by ONNX Runtime on the CPU, with as many threads as torch would have.

    Raises:
        GraphError: the graph is damaged, was made of other weights or by another config, or does not compute what the
            network does.
    """

    def __init__(self, graph: bytes, net: UNet, weights_sha256: str) -> None:
        try:
            self.session = cpu_session(graph)
        except Exception as error:  # its errors have no common base of their own
            raise GraphError(f"is damaged: {str(error).splitlines()[0]}") from error
        found = self.session.get_modelmeta().custom_metadata_map
        for fact, wanted in facts(net, weights_sha256).items():
            if found.get(fact) != wanted:
                raise GraphError(OTHERWISE[fact])
        self._check(net)

    def _check(self, net: UNet) -> None:
        """Compares one call with torch's."""
        inputs = example(net, rows=3)
        try:
            ours = self(*inputs)
        except Exception as error:  # as above
            raise GraphError(f"cannot be run: {str(error).splitlines()[0]}") from error
        torchs = TorchNetwork(net, torch.device("cpu"))(*inputs)
        if not torch.allclose(ours, torchs, rtol=0, atol=CLOSE * float(torchs.abs().max())):
            raise GraphError(f"differs from the network by {float((ours - torchs).abs().max()):.2g}")

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W); all on the CPU."""
        inputs = {"x_t": x_t.contiguous().numpy(), "t": t.float().numpy()}
        if label is not None:
            inputs["label"] = label.numpy()
        parts = [
            self.session.run(None, {name: array[first : first + MOST_ROWS] for name, array in inputs.items()})[0]
            for first in range(0, len(x_t), MOST_ROWS)
        ]
        return torch.from_numpy(parts[0] if len(parts) == 1 else np.concatenate(parts))


@dataclasses.dataclass(frozen=True)
class Padded:
    """A network whose calls have a multiple of so many rows: those that are missing are added and dropped again."""

    network: Network
    multiple: int

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W)."""
        rows = len(x_t)
        missing = -rows % self.multiple
        if not missing:
            return self.network(x_t, t, label)
        x_t, t = F.pad(x_t, (0, 0) * 3 + (0, missing)), F.pad(t, (0, missing))
        return self.network(x_t, t, None if label is None else F.pad(label, (0, missing)))[:rows]
