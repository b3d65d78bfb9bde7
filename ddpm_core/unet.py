"""The U-Net: structure, config fields and state-dict keys of the field's UNet2DModel.

So a directory that we write loads in diffusers and the reverse. This file knows tensors and nothing of ours: no
schedule, no sampler, no data range. Every config field of UNet2DModel is honoured or refused by its name.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

NO_LABEL = "_no_label"  # in config.json; as diffusers leaves it alone
_DOWN_BLOCKS = ("DownBlock2D", "AttnDownBlock2D", "ResnetDownsampleBlock2D")
_UP_BLOCKS = ("UpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D")
_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu, "swish": F.silu, "mish": F.mish, "gelu": F.gelu, "relu": F.relu,
}  # fmt: skip
_COUNTS = ("in_channels", "out_channels", "block_out_channels", "layers_per_block", "norm_num_groups")
_LISTS = ("block_out_channels", "down_block_types", "up_block_types")
_OPTIONAL_COUNTS = (
    "sample_size", "time_embedding_dim", "attention_head_dim", "attn_norm_num_groups", "num_class_embeds",
    "num_train_timesteps",
)  # fmt: skip


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The fields of UNet2DModel's config.json, with its defaults.

    Raises:
        ValueError: a field has a value that this implementation does not support, or two fields disagree.
    """

    sample_size: int | tuple[int, int] | None = None  # H = W, or (H, W), of the images it was trained on
    in_channels: int = 3
    out_channels: int = 3
    center_input_sample: bool = False  # True: the net wants [0, 1] and maps it to [-1, 1] itself
    time_embedding_type: str = "positional"
    time_embedding_dim: int | None = None  # None: 4 * block_out_channels[0]
    freq_shift: int = 0
    flip_sin_to_cos: bool = True
    down_block_types: tuple[str, ...] = ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D")
    mid_block_type: str | None = "UNetMidBlock2D"  # None: no middle block
    up_block_types: tuple[str, ...] = ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D")
    block_out_channels: tuple[int, ...] = (224, 448, 672, 896)
    layers_per_block: int = 2  # residual blocks a level on the way down; one more on the way up
    mid_block_scale_factor: float = 1.0
    downsample_padding: int = 1
    downsample_type: str | None = "conv"  # of levels with attention; None: conv; resnet: by a residual block
    upsample_type: str | None = "conv"
    dropout: float = 0.0
    act_fn: str = "silu"
    attention_head_dim: int | None = 8  # of as many heads as fit into the level; None: one as wide as it
    norm_num_groups: int = 32
    attn_norm_num_groups: int | None = None  # of the middle attention; None: norm_num_groups, no norm with scale_shift
    norm_eps: float = 1e-5
    resnet_time_scale_shift: str = "default"
    add_attention: bool = True  # in the middle block
    class_embed_type: str | None = None
    num_class_embeds: int | None = None  # labels are 0 .. num_class_embeds - 1
    num_train_timesteps: int | None = None  # of a learned time embedding
    no_label: bool = False  # our own: the last of num_class_embeds means "no label"

    def __post_init__(self) -> None:
        self._check_numbers()
        levels = len(self.block_out_channels)
        self._require("time_embedding_type", ("positional", "learned"), "fourier is of variance-exploding processes")
        self._require("mid_block_type", ("UNetMidBlock2D", None))
        self._require("downsample_type", ("conv", "resnet", None))
        self._require("upsample_type", ("conv", "resnet", None))
        self._require("resnet_time_scale_shift", ("default", "scale_shift"))
        self._require("class_embed_type", (None,), "what it embeds is no label of a known number")
        self._require("downsample_padding", (0, 1))
        self._require("freq_shift", (0, 1))
        for field in ("center_input_sample", "flip_sin_to_cos", "add_attention", "no_label"):
            self._require(field, (False, True))
        if str(self.act_fn).lower() not in _ACTIVATIONS:
            raise ValueError(f"act_fn={self.act_fn!r} is not supported; supported: {', '.join(_ACTIVATIONS)}")
        if self.time_embedding_type == "learned" and self.num_train_timesteps is None:
            raise ValueError("time_embedding_type='learned' needs num_train_timesteps")
        if self.no_label and (self.num_class_embeds or 0) < 2:
            raise ValueError(f'{NO_LABEL}=true needs num_class_embeds, of one class or more and "no label"')
        for field, allowed in (("down_block_types", _DOWN_BLOCKS), ("up_block_types", _UP_BLOCKS)):
            types = getattr(self, field)
            if len(types) != levels:
                raise ValueError(f"{field} has {len(types)} entries, block_out_channels has {levels}: they must agree")
            for name in types:
                if name not in allowed:
                    raise ValueError(f"{field}: {name!r} is not supported; supported: {', '.join(allowed)}")
        for channels in self.block_out_channels:
            if channels % self.norm_num_groups:
                raise ValueError(f"norm_num_groups={self.norm_num_groups} must divide block_out_channels ({channels})")
        for channels in self._attention_widths():
            if self.attention_head_dim and self.attention_head_dim > channels:
                raise ValueError(
                    f"attention_head_dim={self.attention_head_dim} must be at most block_out_channels ({channels}) "
                    "where there is attention"
                )
        if self.attn_norm_num_groups and self.block_out_channels[-1] % self.attn_norm_num_groups:
            raise ValueError(
                f"attn_norm_num_groups={self.attn_norm_num_groups} must divide the last of block_out_channels "
                f"({self.block_out_channels[-1]})"
            )

    def _check_numbers(self) -> None:
        for field in _LISTS:
            if not isinstance(value := getattr(self, field), tuple) or not value:
                raise ValueError(f"{field}={value!r} must be a list, an entry for each level")
        if isinstance(self.sample_size, tuple) and len(self.sample_size) != 2:
            raise ValueError(f"sample_size={self.sample_size!r} must be one number, or two: [H, W]")
        for field in (*_COUNTS, *_OPTIONAL_COUNTS):
            value = getattr(self, field)
            if value is None and field in _OPTIONAL_COUNTS:
                continue
            values = value if field in ("block_out_channels", "sample_size") and isinstance(value, tuple) else (value,)
            if not all(type(v) is int and v >= 1 for v in values):
                raise ValueError(f"{field}={value!r} must be whole numbers from 1 up")
        for field, low, high in (("dropout", 0, 1), ("mid_block_scale_factor", 1e-9, 1e9), ("norm_eps", 0, 1)):
            value = getattr(self, field)
            if type(value) not in (int, float) or not low <= value <= high:
                raise ValueError(f"{field}={value!r} must be a number of {low} .. {high}")

    def _require(self, field: str, allowed: Sequence[object], why: str = "") -> None:
        value = getattr(self, field)
        if value not in allowed:
            names = ", ".join(repr(a) for a in allowed)
            raise ValueError(f"{field}={value!r} is not supported{why and f' ({why})'}; supported: {names}")

    def _attention_widths(self) -> Iterator[int]:
        """Channels of every feature map that attention works on."""
        widths = self.block_out_channels
        for types, channels in ((self.down_block_types, widths), (self.up_block_types, widths[::-1])):
            yield from (c for name, c in zip(types, channels, strict=True) if name.startswith("Attn"))
        if self.mid_block_type and self.add_attention:
            yield widths[-1]

    @classmethod
    def from_dict(cls, config: Mapping[str, Any]) -> UNetConfig:
        """Reads a config.json; but for NO_LABEL, keys that start with an underscore are notes of its writer."""
        known = {f.name for f in dataclasses.fields(cls)}
        given: dict[str, Any] = {
            k: tuple(v) if isinstance(v, list) else v for k, v in config.items() if not k.startswith("_")
        }
        if NO_LABEL in config:
            given["no_label"] = config[NO_LABEL]
        for key in given:
            if key not in known:
                raise ValueError(f"unknown field {key!r} in the U-Net's config; known: {', '.join(sorted(known))}")
        return cls(**given)

    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that diffusers reads."""
        content = {"_class_name": "UNet2DModel", **dataclasses.asdict(self)}
        return {**content, NO_LABEL: True} if content.pop("no_label") else content

    @property
    def image_shape(self) -> tuple[int, int, int]:
        """(C, H, W) of one image. Raises ValueError where the config names no sample_size."""
        if self.sample_size is None:
            raise ValueError("sample_size is missing in the U-Net's config: the image size is not known")
        height, width = (self.sample_size,) * 2 if isinstance(self.sample_size, int) else self.sample_size
        factor = 2 ** (len(self.block_out_channels) - 1)
        if height % factor or width % factor:
            raise ValueError(f"sample_size={self.sample_size!r} must be a multiple of {factor}, 2^(levels - 1)")
        return self.in_channels, height, width

    @property
    def num_classes(self) -> int:
        """Labels a caller may ask for: 0 .. num_classes - 1. 0 = the network is unconditional."""
        return (self.num_class_embeds or 0) - self.no_label

    @property
    def null_label(self) -> int | None:
        """The label that means "no label"; None where there is none, be it that the network takes no labels at all."""
        return self.num_classes if self.no_label else None

    @property
    def temb_channels(self) -> int:
        """Width of the time embedding that every residual block sees."""
        return self.time_embedding_dim or 4 * self.block_out_channels[0]


def sinusoidal_embedding(t: Tensor, dim: int, *, flip_sin_to_cos: bool, freq_shift: int) -> Tensor:
    """Transformer position embedding of t (Ho et al. 2020, appendix B). t (B,), any real -> (B, dim) float32."""
    half = dim // 2
    exponent = -math.log(10000) * torch.arange(half, dtype=torch.float32, device=t.device) / (half - freq_shift)
    angles = t[:, None].float() * torch.exp(exponent)[None, :]
    parts = (angles.cos(), angles.sin()) if flip_sin_to_cos else (angles.sin(), angles.cos())
    return F.pad(torch.cat(parts, dim=-1), (0, dim % 2))


def _zero(layer: nn.Module) -> None:
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)


class TimestepEmbedding(nn.Module):
    """Two linear layers over the sinusoidal embedding."""

    def __init__(self, dim_in: int, dim: int) -> None:
        super().__init__()
        self.linear_1 = nn.Linear(dim_in, dim)
        self.linear_2 = nn.Linear(dim, dim)

    def forward(self, emb: Tensor) -> Tensor:
        out: Tensor = self.linear_2(F.silu(self.linear_1(emb)))
        return out


_halve = functools.partial(F.avg_pool2d, kernel_size=2)
_double = functools.partial(F.interpolate, scale_factor=2.0, mode="nearest")


class ResnetBlock2D(nn.Module):
    """norm, SiLU, conv, + time, norm, SiLU, conv, + shortcut (Ho et al. 2020, appendix B).

    As a resampler it resizes its input and what it makes of it before the first convolution; the net of Dhariwal and
    Nichol 2021, section 3.
    """

    def __init__(
        self,
        c: UNetConfig,
        channels_in: int,
        channels: int,
        *,
        scale: float = 1.0,
        resize: Callable[[Tensor], Tensor] | None = None,
    ) -> None:
        super().__init__()
        self.scale, self.resize = scale, resize
        self.act = _ACTIVATIONS[c.act_fn.lower()]
        self.scale_shift = c.resnet_time_scale_shift == "scale_shift"
        self.norm1 = nn.GroupNorm(c.norm_num_groups, channels_in, eps=c.norm_eps)
        self.conv1 = nn.Conv2d(channels_in, channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(c.temb_channels, channels * (2 if self.scale_shift else 1))
        self.norm2 = nn.GroupNorm(c.norm_num_groups, channels, eps=c.norm_eps)
        self.dropout = nn.Dropout(c.dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(channels_in, channels, 1) if channels_in != channels else nn.Identity()
        _zero(self.conv2)  # every block starts as its shortcut

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        h = self.act(self.norm1(x))
        if self.resize is not None:
            x, h = self.resize(x), self.resize(h)
        h = self.conv1(h)
        time = self.time_emb_proj(temb)[:, :, None, None]
        if self.scale_shift:
            gain, shift = time.chunk(2, dim=1)
            h = self.norm2(h) * (1 + gain) + shift
        else:
            h = self.norm2(h + time)
        h = self.conv2(self.dropout(self.act(h)))
        out: Tensor = (self.conv_shortcut(x) + h) / self.scale
        return out


class Attention(nn.Module):
    """Self-attention over the H*W positions of a feature map, with a residual."""

    def __init__(self, c: UNetConfig, channels: int, *, groups: int | None, scale: float = 1.0) -> None:
        super().__init__()
        dim = c.attention_head_dim or channels
        self.heads = channels // dim
        inner = self.heads * dim  # less than channels where dim does not divide them
        self.scale = scale
        self.group_norm = nn.GroupNorm(groups, channels, eps=c.norm_eps) if groups else nn.Identity()
        self.to_q = nn.Linear(channels, inner)
        self.to_k = nn.Linear(channels, inner)
        self.to_v = nn.Linear(channels, inner)
        out = nn.Linear(inner, channels)
        _zero(out)
        self.to_out = nn.ModuleList([out])

    def forward(self, x: Tensor) -> Tensor:
        b, ch, h, w = x.shape
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, H*W, C)
        q, k, v = (
            proj(tokens).view(b, h * w, self.heads, -1).transpose(1, 2) for proj in (self.to_q, self.to_k, self.to_v)
        )
        out = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        out = self.to_out[0](out).transpose(1, 2).reshape(b, ch, h, w)
        result: Tensor = (x + out) / self.scale
        return result


class Downsample2D(nn.Module):
    """Halves H and W by a strided convolution."""

    def __init__(self, channels: int, padding: int) -> None:
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(F.pad(x, (0, 1, 0, 1)) if self.padding == 0 else x)
        return out


class Upsample2D(nn.Module):
    """Doubles H and W: nearest neighbour, then a convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv(_double(x))
        return out


class Level(nn.Module):
    """One resolution, on the way down or up: residual blocks, attention after each if asked, then a resampler."""

    def __init__(self, c: UNetConfig, inputs: Sequence[int], channels: int, kind: str, resampler: str | None) -> None:
        super().__init__()
        self.depth = len(inputs)
        self.resampler = resampler
        self.resnets = nn.ModuleList(ResnetBlock2D(c, channels_in, channels) for channels_in in inputs)
        attends, residual = kind.startswith("Attn"), kind.startswith("Resnet")
        self.attentions = nn.ModuleList(Attention(c, channels, groups=c.norm_num_groups) for _ in inputs if attends)
        if resampler == "down":
            if residual or (attends and c.downsample_type == "resnet"):
                down: nn.Module = ResnetBlock2D(c, channels, channels, resize=_halve)
            else:
                down = Downsample2D(channels, c.downsample_padding)
            self.downsamplers = nn.ModuleList([down])
        elif resampler == "up":
            if residual or (attends and c.upsample_type == "resnet"):
                up: nn.Module = ResnetBlock2D(c, channels, channels, resize=_double)
            else:
                up = Upsample2D(channels)
            self.upsamplers = nn.ModuleList([up])

    def block(self, i: int, x: Tensor, temb: Tensor) -> Tensor:
        """The i-th residual block, and its attention where the level has any."""
        x = self.resnets[i](x, temb)
        return self.attentions[i](x) if len(self.attentions) else x

    def resample(self, x: Tensor, temb: Tensor) -> Tensor:
        """To the next resolution; only where there is one."""
        resampler = (self.downsamplers if self.resampler == "down" else self.upsamplers)[0]
        out: Tensor = resampler(x, temb) if isinstance(resampler, ResnetBlock2D) else resampler(x)
        return out


def _levels(blocks: nn.ModuleList) -> Iterator[Level]:
    return iter(cast(Iterable[Level], blocks))


class MidBlock(nn.Module):
    """Residual block, attention, residual block at the lowest resolution."""

    def __init__(self, c: UNetConfig, channels: int) -> None:
        super().__init__()
        scale = c.mid_block_scale_factor
        self.resnets = nn.ModuleList(ResnetBlock2D(c, channels, channels, scale=scale) for _ in range(2))
        groups = c.attn_norm_num_groups or (c.norm_num_groups if c.resnet_time_scale_shift == "default" else None)
        self.attentions = nn.ModuleList([Attention(c, channels, groups=groups, scale=scale)] if c.add_attention else [])

    def forward(self, x: Tensor, temb: Tensor) -> Tensor:
        x = self.resnets[0](x, temb)
        for attention in self.attentions:
            x = attention(x)
        out: Tensor = self.resnets[1](x, temb)
        return out


class UNet(nn.Module):
    """Predicts eps, x_0 or v (whatever it was trained for) from x_t, t and a label."""

    def __init__(self, config: UNetConfig) -> None:
        super().__init__()
        self.config = c = config
        widths = c.block_out_channels
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(c.in_channels, widths[0], 3, padding=1)
        if c.time_embedding_type == "learned":
            self.time_proj = nn.Embedding(cast(int, c.num_train_timesteps), widths[0])
        self.time_embedding = TimestepEmbedding(widths[0], c.temb_channels)
        if c.num_class_embeds:
            self.class_embedding = nn.Embedding(c.num_class_embeds, c.temb_channels)

        # What the way down leaves for the way up, channel count by channel count.
        skips = [widths[0]]
        self.down_blocks = nn.ModuleList()
        for i, (kind, width) in enumerate(zip(c.down_block_types, widths, strict=True)):
            inputs = [skips[-1]] + [width] * (c.layers_per_block - 1)
            self.down_blocks.append(Level(c, inputs, width, kind, "down" if i < last else None))
            skips += [width] * (c.layers_per_block + (i < last))
        self.mid_block = MidBlock(c, widths[-1]) if c.mid_block_type else None
        self.up_blocks = nn.ModuleList()
        width_in = widths[-1]
        for i, (kind, width) in enumerate(zip(c.up_block_types, reversed(widths), strict=True)):
            inputs = []
            for _ in range(c.layers_per_block + 1):
                inputs.append(width_in + skips.pop())
                width_in = width
            self.up_blocks.append(Level(c, inputs, width, kind, "up" if i < last else None))

        self.conv_norm_out = nn.GroupNorm(c.norm_num_groups, widths[0], eps=c.norm_eps)
        self.conv_out = nn.Conv2d(widths[0], c.out_channels, 3, padding=1)
        _zero(self.conv_out)

    def forward(self, x_t: Tensor, t: Tensor, label: Tensor | None = None) -> Tensor:
        """One network call.

        Args:
            x_t: (B, C, H, W) in the float type of the weights.
            t: (B,), 0 .. T-1, integer or fractional; a learned time embedding takes the nearest whole one.
            label: (B,) long, 0 .. num_class_embeds - 1; needed exactly when the network has class embeddings.

        Returns:
            (B, C, H, W): what the network was trained to predict.

        Raises:
            ValueError: a label is missing, or the network takes none.
        """
        return self.denoise(x_t, self.embed(t, label, x_t.dtype))

    def embed(self, t: Tensor, label: Tensor | None, dtype: torch.dtype) -> Tensor:
        """What every residual block projects for itself: act_fn of the sum of embeddings. (B, temb_channels)."""
        c = self.config
        if (label is None) == bool(c.num_class_embeds):
            raise ValueError("this network needs labels" if c.num_class_embeds else "this network takes no labels")
        if c.time_embedding_type == "learned":
            emb = self.time_proj(t.round().long())
        else:
            emb = sinusoidal_embedding(
                t, c.block_out_channels[0], flip_sin_to_cos=c.flip_sin_to_cos, freq_shift=c.freq_shift
            )
        temb: Tensor = self.time_embedding(emb.to(dtype))
        return _ACTIVATIONS[c.act_fn.lower()](temb if label is None else temb + self.class_embedding(label))

    def denoise(self, x_t: Tensor, temb: Tensor) -> Tensor:
        """The network behind its embeddings: x_t (B, C, H, W), temb of embed() -> (B, C, H, W)."""
        x = self.conv_in(2 * x_t - 1 if self.config.center_input_sample else x_t)
        skips = [x]
        for level in _levels(self.down_blocks):
            for i in range(level.depth):
                x = level.block(i, x, temb)
                skips.append(x)
            if level.resampler:
                x = level.resample(x, temb)
                skips.append(x)
        if self.mid_block is not None:
            x = self.mid_block(x, temb)
        for level in _levels(self.up_blocks):
            for i in range(level.depth):
                x = level.block(i, torch.cat([x, skips.pop()], dim=1), temb)
            if level.resampler:
                x = level.resample(x, temb)
        out: Tensor = self.conv_out(F.silu(self.conv_norm_out(x)))
        return out
