"""The network as an ONNX graph: the same numbers, in the operations that ONNX Runtime is fastest at on a CPU.

Decomposed as the exporter does it, more time of a call with few rows goes into what lies between the convolutions than
into them. Here shapes are constants but for the number of rows, and a group normalisation's gain and shift are one
BatchNormalization, which the runtime's blocked layout takes in. docs/log.md has the figures.
"""

from __future__ import annotations

import copy
import warnings

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core.unet import Attention, UNet


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


class _Attention(nn.Module):
    """unet.Attention, q, k and v by one product; one head."""

    def __init__(self, attention: Attention) -> None:
        super().__init__()
        self.norm, self.out, self.scale = _GroupNorm(attention.group_norm), attention.to_out[0], attention.scale
        projections = (attention.to_q, attention.to_k, attention.to_v)
        channels = attention.to_q.in_features
        self.qkv = nn.Linear(channels, 3 * channels)
        with torch.no_grad():
            self.qkv.weight.copy_(torch.cat([p.weight for p in projections]))
            self.qkv.bias.copy_(torch.cat([p.bias for p in projections]))
            for parameter in (self.qkv.weight, self.qkv.bias):
                parameter[:channels] *= channels**-0.5

    def forward(self, x: Tensor) -> Tensor:
        _, channels, height, width = x.shape
        tokens = self.norm(x).reshape(-1, channels, height * width).transpose(1, 2)
        q, k, v = self.qkv(tokens).split(channels, dim=-1)
        mixed = self.out(torch.matmul(torch.softmax(torch.matmul(q, k.transpose(1, 2)), dim=-1), v))
        out: Tensor = (x + mixed.transpose(1, 2).reshape(-1, channels, height, width)) / self.scale
        return out
