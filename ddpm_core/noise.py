"""The noise stream: every normal number of an image is a function of its seed and its place in the chain.

Counter-based (Philox, Salmon et al. 2011), drawn by numpy on the CPU: no image's noise depends on its batch, its order
or its device, and anyone can rebuild it elsewhere from two integers.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

MAX_SEED = 2**53 - 1  # the largest integer that every JSON reader keeps exact


def noise(seed: int, k: int, shape: tuple[int, ...]) -> Tensor:
    """Standard normal noise number k of an image.

    Args:
        seed: the image's seed, 0 .. 2^53 - 1.
        k: 0 = x_T, and the eps of the forward process; i + 1 = the z of plan row i.
        shape: (C, H, W).

    Returns:
        float32 on the CPU.

    Raises:
        ValueError: the seed is outside its range.
    """
    if not 0 <= seed <= MAX_SEED:
        raise ValueError(f"seed={seed} must be 0 .. 2^53 - 1 ({MAX_SEED})")
    generator = np.random.Generator(np.random.Philox(key=np.array([seed, k], dtype=np.uint64)))
    return torch.from_numpy(generator.standard_normal(shape, dtype=np.float32))
