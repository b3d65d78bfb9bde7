"""One forward of the raw network, behind the call that sample(), the evaluation and the service share.

torch runs it anywhere; on a CPU ONNX Runtime runs it about twice as fast, from a graph exported once from the weights.
"""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Callable

import onnxruntime
import torch
import torch.nn.functional as F
from torch import Tensor

from ddpm_core.unet import UNet

Network = Callable[[Tensor, Tensor, Tensor | None], Tensor]
"""One call of the raw network: x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W)."""

THREADS = torch.get_num_threads()  # as the process began: whoever uses a graph may want torch to have fewer later
CLOSE = 1e-4  # how far a graph's output may be from torch's, relative to the largest; a right one is 1e-5 away


class GraphError(ValueError):
    """A graph that is not the network: of other weights, damaged, or computing something else."""


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
        self.net = net.to(device).to(memory_format=torch.channels_last).eval()

    @torch.inference_mode()
    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W)."""
        out: Tensor = self.net(x_t.contiguous(memory_format=torch.channels_last), t, label)
        return out


class OnnxNetwork:
    """The same U-Net as a graph, run by ONNX Runtime on the CPU, with as many threads as torch would have.

    Raises:
        GraphError: the graph is damaged, was made of other weights, or does not compute what the network does.
    """

    def __init__(self, graph: bytes, net: UNet, weights_sha256: str) -> None:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = THREADS
        options.log_severity_level = 3
        try:
            self.session = onnxruntime.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        except Exception as error:  # its errors have no common base of their own
            raise GraphError(f"is damaged: {str(error).splitlines()[0]}") from error
        if self.session.get_modelmeta().custom_metadata_map.get("weights_sha256") != weights_sha256:
            raise GraphError("was made of other weights")
        self._check(net)

    def _check(self, net: UNet) -> None:
        """Compares one call with torch's."""
        inputs = _example(net, rows=3)
        ours, torchs = self(*inputs), TorchNetwork(net, torch.device("cpu"))(*inputs)
        if not torch.allclose(ours, torchs, rtol=0, atol=CLOSE * float(torchs.abs().max())):
            raise GraphError(f"differs from the network by {float((ours - torchs).abs().max()):.2g}")

    def __call__(self, x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
        """x_t (B, C, H, W), t (B,), label (B,) long or None -> (B, C, H, W); all on the CPU."""
        inputs = {"x_t": x_t.contiguous().numpy(), "t": t.float().numpy()}
        if label is not None:
            inputs["label"] = label.numpy()
        (out,) = self.session.run(None, inputs)
        return torch.from_numpy(out)


def _example(net: UNet, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs of a call, the same each time."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(rows, *net.config.image_shape, generator=generator)
    classes = net.config.num_class_embeds
    return x_t, torch.linspace(1.0, 900.0, rows), torch.arange(rows) % classes if classes else None


def export_graph(net: UNet, weights_sha256: str) -> bytes:
    """The network as an ONNX graph with any number of rows, its weights within. Takes 5 to 20 seconds.

    Raises:
        torch.onnx.OnnxExporterError: the network has a part that cannot be exported.
    """
    inputs = {k: v for k, v in zip(("x_t", "t", "label"), _example(net, rows=2), strict=True) if v is not None}
    rows = torch.export.Dim("rows", min=1, max=2**16)
    with warnings.catch_warnings(action="ignore"):  # the exporter's own, about its own internals
        program = torch.onnx.export(
            net.to("cpu").eval(), tuple(inputs.values()), dynamo=True, verbose=False,
            input_names=list(inputs), output_names=["output"], dynamic_shapes=tuple({0: rows} for _ in inputs),
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props["weights_sha256"] = weights_sha256
    graph: bytes = program.model_proto.SerializeToString()
    return graph


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
