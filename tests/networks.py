"""The small network of the tests: two levels, attention on the lower, a label; the layout that we ship."""

from __future__ import annotations

from ddpm_core.unet import UNetConfig

DIGITS = UNetConfig(
    sample_size=28,
    in_channels=1,
    out_channels=1,
    block_out_channels=(8, 16),
    layers_per_block=1,
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    norm_num_groups=8,
    attention_head_dim=None,
    num_class_embeds=11,
)
