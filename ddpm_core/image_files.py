"""Image files to pixels, with Pillow: the rules that training data and the pictures sent to the service share."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageOps

Pixels = NDArray[np.uint8]  # (C, H, W), C = 1 or 3


def upright_8_bit(file: Image.Image, frame: int = 0) -> Image.Image:
    """A frame of an open image file -> L or RGB: EXIF rotation applied, alpha dropped, palette to RGB, 16 to 8 bit.

    Raises nearly anything where the file is damaged: Pillow's decoders have no common error.
    """
    file.seek(frame)
    file.load()
    picture = ImageOps.exif_transpose(file)
    if picture.mode.startswith("I") or picture.mode == "F":  # 16 bit grey
        return Image.fromarray((np.asarray(picture, np.int64).clip(0, 65535) >> 8).astype(np.uint8))
    if picture.mode in ("L", "LA", "La", "1"):
        return picture.convert("L")
    if picture.mode in ("P", "PA") and "transparency" in picture.info:
        picture = picture.convert("RGBA")  # Pillow wants this step; alpha goes in the next
    return picture.convert("RGB")


def to_pixels(picture: Image.Image) -> Pixels:
    """L or RGB -> (1, H, W) or (3, H, W)."""
    array = np.array(picture, np.uint8)
    return np.ascontiguousarray(array[None] if array.ndim == 2 else array.transpose(2, 0, 1))


def fitted(picture: Image.Image, size: int | None, channels: int) -> Pixels:
    """A picture as (channels, H, W).

    Args:
        picture: L or RGB.
        size: the short side is resized to it, antialiased (Lanczos), and the middle of the long one kept; None: as is.
        channels: 1: grey (ITU-R 601 luma); 3: RGB.
    """
    picture = picture.convert("L" if channels == 1 else "RGB")
    if size is not None:
        picture = ImageOps.fit(picture, (size, size), Image.Resampling.LANCZOS)
    return to_pixels(picture)


def read(path: Path, size: int | None, channels: int) -> Pixels:
    """An image file as fitted() makes it. Raises ValueError, which names the file, where it cannot be decoded."""
    try:
        with Image.open(path) as file:
            picture = upright_8_bit(file)
    except Exception as error:
        raise ValueError(
            f"{path} cannot be read as an image ({type(error).__name__}: {error}): mend it or take it out of the folder"
        ) from error
    return fitted(picture, size, channels)
