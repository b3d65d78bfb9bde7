"""Pictures of what a model does: grids of images, and the curves of a training run (matplotlib, extra `train`)."""

from __future__ import annotations

import io
import itertools
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image
from torch import Tensor


def grid(images: Tensor, columns: int, *, pad: int = 2) -> Tensor:
    """Lays images (N, C, H, W) uint8 out in rows of `columns`, white between them -> (C, H', W') uint8."""
    n, c, h, w = images.shape
    rows = -(-n // columns)
    canvas = images.new_full((c, rows * (h + pad) - pad, columns * (w + pad) - pad), 255)
    for i, image in enumerate(images):
        top, left = i // columns * (h + pad), i % columns * (w + pad)
        canvas[:, top : top + h, left : left + w] = image
    return canvas


def to_pil(image: Tensor) -> Image.Image:
    """(C, H, W) uint8 with one or three channels -> a picture."""
    array = image.permute(1, 2, 0).contiguous().cpu().numpy()
    return Image.fromarray(array[..., 0] if array.shape[2] == 1 else array)


def samples_png(images: Tensor, columns: int, *, scale: int = 2) -> bytes:
    """Images (N, C, H, W) uint8 as one PNG."""
    picture, buffer = to_pil(grid(images, columns)), io.BytesIO()
    picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST).save(buffer, "PNG")
    return buffer.getvalue()


def _figure_png(figure: Any) -> bytes:
    from matplotlib import pyplot as plt

    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=110)
    plt.close(figure)
    return buffer.getvalue()


def loss_curve_png(steps: Sequence[int], losses: Sequence[float]) -> bytes:
    """The loss over the steps, raw and smoothed, as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    axes.plot(steps, losses, linewidth=0.6, alpha=0.4, label="loss")
    width = max(1, len(losses) // 25)
    if len(losses) > 2 * width:
        smooth = np.convolve(losses, np.ones(width) / width, mode="valid")
        axes.plot(steps[width - 1 :], smooth, label=f"mean of {width} points")
    axes.set(xlabel="optimizer step", ylabel="training loss", yscale="log")
    axes.legend()
    return _figure_png(figure)


def fid_curves_png(lines: Mapping[str, Sequence[tuple[int, float]]], floor: float, title: str) -> bytes:
    """FID over network calls as a PNG: a line of (NFE, FID) points a sampler, the floor dashed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt
    from matplotlib.ticker import LogLocator

    figure, axes = plt.subplots(figsize=(9, 5), layout="constrained")
    for (name, points), marker in zip(lines.items(), itertools.cycle("osD^vPX*"), strict=False):
        axes.plot(*zip(*points, strict=True), marker=marker, markersize=5, linewidth=1.4, label=name)
    axes.axhline(floor, color="black", linestyle="--", linewidth=1, label="real images (the floor)")
    ticks = sorted({nfe for points in lines.values() for nfe, _ in points})
    axes.set(xlabel="network calls an image (NFE)", ylabel="FID", xscale="log", yscale="log", title=title)
    axes.set_xticks(ticks, [str(nfe) for nfe in ticks])
    axes.minorticks_off()
    axes.yaxis.set_major_locator(LogLocator(subs=(1, 1.2, 1.5, 2, 3, 5, 7)))
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    figure.legend(loc="outside right upper")
    return _figure_png(figure)
