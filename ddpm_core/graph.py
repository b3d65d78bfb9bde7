"""The network as an ONNX graph: the same numbers, in the operations that ONNX Runtime is fastest at on a CPU.

Exported as it stands, more time of a call with few rows goes into what lies between the convolutions than into them.
Here every shape but the number of rows is a constant; a group normalisation's gain and shift are a BatchNormalization,
which the runtime's blocked layout takes in; attention works on (channels, positions), so that its projections are
convolutions and features are not transposed. docs/log.md has the figures.
"""

from __future__ import annotations

import copy
import hashlib
import json
import warnings
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core.unet import Attention, ResnetBlock2D, UNet

FORM = "3"  # of the graphs made here, written into each: raise it when what they consist of changes


class _GroupNorm(nn.Module):
    """nn.GroupNorm: groups as channels of an instance normalisation, then gain and shift."""

    def __init__(self, norm: nn.GroupNorm) -> None:
        super().__init__()
        self.groups, self.eps = norm.num_groups, norm.eps
        self.gain = nn.BatchNorm2d(norm.num_channels, eps=0.0)  # of mean 0 and variance 1 it leaves these two
        self.gain.load_state_dict({"weight": norm.weight, "bias": norm.bias}, strict=False)

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        grouped = x.reshape(-1, self.groups, channels // self.groups * height * width)
        out: Tensor = self.gain(F.instance_norm(grouped, eps=self.eps).reshape(-1, channels, height, width))
        return out


def _side_by_side(layers: Sequence[nn.Linear], gains: Sequence[float]) -> tuple[nn.Parameter, nn.Parameter]:
    """Weight (outputs of all, inputs) and bias of linear layers that become one, each times a gain."""
    pairs = [(gain * layer.weight, gain * layer.bias) for layer, gain in zip(layers, gains, strict=True)]
    weight, bias = (nn.Parameter(torch.cat(parts).detach()) for parts in zip(*pairs, strict=True))
    return weight, bias


class _Attention(nn.Module):
    """unet.Attention; q, k and v by one product, the scale of q . k within it."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        norm = attention.group_norm
        self.norm = _GroupNorm(norm) if isinstance(norm, nn.GroupNorm) else norm
        self.heads, self.scale = attention.heads, attention.scale
        q, k, v = attention.to_q, attention.to_k, attention.to_v
        self.inner = v.out_features
        self.in_weight, self.in_bias = _side_by_side((q, k, v), ((q.out_features / self.heads) ** -0.5, 1, 1))
        self.out_weight, self.out_bias = _side_by_side([cast(nn.Linear, attention.to_out[0])], [1])

    def forward(self, x: Tensor) -> Tensor:
        height, width = x.shape[2:]
        qkv = F.conv2d(self.norm(x), self.in_weight[:, :, None, None], self.in_bias)
        qkv = qkv.reshape(-1, 3 * self.heads, self.inner // self.heads, height * width)
        q, k, v = qkv.chunk(3, dim=1)  # (B, heads, inner / heads, positions)
        weights = torch.softmax(torch.matmul(q.transpose(2, 3), k), dim=-1)
        mixed = torch.matmul(v, weights.transpose(2, 3)).reshape(-1, self.inner, height, width)
        out: Tensor = (x + F.conv2d(mixed, self.out_weight[:, :, None, None], self.out_bias)) / self.scale
        return out


class _Part(nn.Module):
    """In the place of a block's projection: its part of what one product made for all of them."""

    def __init__(self, index: int) -> None:
        super().__init__()
        self.index = index

    def forward(self, parts: Sequence[Tensor]) -> Tensor:
        return parts[self.index]


class _Graph(nn.Module):
    """A network with the forms above in the place of its own. Takes it over: the network itself is of no use after."""

    def __init__(self, net: UNet) -> None:
        super().__init__()
        blocks = [module for module in net.modules() if isinstance(module, ResnetBlock2D)]
        projections = [block.time_emb_proj for block in blocks]
        self.widths = [projection.out_features for projection in projections]
        self.weight, self.bias = _side_by_side(projections, [1] * len(projections))
        for index, block in enumerate(blocks):
            block.register_module("time_emb_proj", _Part(index))
        _rewrite(net)
        self.net = net

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        temb = self.net.embed(t, label, x_t.dtype)
        parts = torch.split(F.linear(temb, self.weight, self.bias), self.widths, dim=1)
        return self.net.denoise(x_t, cast(Tensor, parts))  # every block takes its part


def _rewrite(module: nn.Module) -> None:
    for name, child in module.named_children():
        if isinstance(child, nn.GroupNorm):
            module.register_module(name, _GroupNorm(child))
        elif isinstance(child, Attention):
            module.register_module(name, _Attention(child))
        else:
            _rewrite(child)


def facts(net: UNet, weights_sha256: str) -> dict[str, str]:
    """What is written into a network's graph: its form, and of which weights and config it is made."""
    config = json.dumps(net.config.to_dict(), sort_keys=True).encode()
    return {"form": FORM, "weights_sha256": weights_sha256, "config_sha256": hashlib.sha256(config).hexdigest()}


def example(net: UNet, rows: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Inputs of a call, the same each time."""
    generator = torch.Generator().manual_seed(0)
    x_t = torch.randn(rows, *net.config.image_shape, generator=generator)
    classes, last = net.config.num_class_embeds, net.config.num_train_timesteps or 1000
    return x_t, torch.linspace(1.0, 900.0, rows) % last, torch.arange(rows) % classes if classes else None


def export_graph(net: UNet, weights_sha256: str) -> bytes:
    """The network as an ONNX graph with any number of rows, its weights within. Takes 5 to 20 seconds.

    Raises:
        torch.onnx.OnnxExporterError: the network has a part that cannot be exported.
    """
    graph = _Graph(copy.deepcopy(net).to("cpu")).eval()
    inputs = {k: v for k, v in zip(("x_t", "t", "label"), example(net, rows=2), strict=True) if v is not None}
    rows = torch.export.Dim("rows", min=1, max=2**16)
    with warnings.catch_warnings(action="ignore"):  # the exporter's own, about its own internals
        program = torch.onnx.export(
            graph, tuple(inputs.values()), dynamo=True, verbose=False,
            input_names=list(inputs), output_names=["output"], dynamic_shapes=tuple({0: rows} for _ in inputs),
        )  # fmt: skip
    assert program is not None
    program.model.metadata_props.update(facts(net, weights_sha256))
    content: bytes = program.model_proto.SerializeToString()
    return content
