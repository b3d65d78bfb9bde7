"""Augmentation of training images, a batch at a time."""

from __future__ import annotations

import torch
from torch import Tensor


def flip_and_shift(
    images: Tensor,
    *,
    flip: bool,
    shift: int,
    generator: torch.Generator,
    batch_size: int | None = None,
    part: slice = slice(None),
) -> Tensor:
    """Mirrors and moves every image at random.

    Args:
        images: (B, C, H, W), of any dtype, on the generator's device.
        flip: mirrors half of the images, left to right.
        shift: up to so many pixels, in whole ones, down or up and right or left; all (2 shift + 1)^2 moves are
            equally likely. What comes in at an edge repeats that edge.
        generator: all that is random comes from it.
        batch_size: of the batch that these images are a part of; None: they are all of it.
        part: which one: every image moves as it does in the whole batch.

    Returns:
        (B, C, H, W), a copy.
    """
    (n, channels, height, width), device = images.shape, images.device
    drawn = n if batch_size is None else batch_size
    mirrored = torch.rand(drawn, generator=generator, device=device)[part] < (0.5 if flip else 0)
    down, right = torch.randint(-shift, shift + 1, (2, drawn, 1), generator=generator, device=device)[:, part]
    rows = (torch.arange(height, device=device) - down).clamp(0, height - 1)
    columns = (torch.arange(width, device=device) - right).clamp(0, width - 1)
    columns = torch.where(mirrored[:, None], width - 1 - columns, columns)
    batch, channel = torch.arange(n, device=device), torch.arange(channels, device=device)
    return images[batch[:, None, None, None], channel[:, None, None], rows[:, None, :, None], columns[:, None, None]]
