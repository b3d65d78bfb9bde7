"""Image files in and out, with Pillow. Slow: call it in a thread, never on the event loop."""

from __future__ import annotations

import functools
import io
import json
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import numpy as np
from PIL import Image, PngImagePlugin, UnidentifiedImageError

from ddpm_core.image_files import Pixels, to_pixels, upright_8_bit

Image.preinit()  # the plugins, which the first client would wait for
warnings.filterwarnings("error", category=Image.DecompressionBombWarning)  # here: catch_warnings is not thread-safe

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP")
JPEG_MAGIC, START_OF_SCAN = b"\xff\xd8", b"\xff\xda"  # also of MPO, which Pillow finds in a JPEG
GRID_PAD = 2  # pixels between the images of a grid
MAX_SCANS = 100  # of a progressive JPEG: each is a pass over all pixels and may have twenty bytes; encoders make ten


class BadImage(ValueError):
    """The uploaded bytes are no image that we read; the message tells a person why."""


class TooManyPixels(BadImage):
    """The image is whole, as far as its header tells, and too large."""


def to_pil(pixels: Pixels) -> Image.Image:
    """(C, H, W) -> a picture."""
    return Image.fromarray(pixels[0] if len(pixels) == 1 else np.ascontiguousarray(pixels.transpose(1, 2, 0)))


def encode_png(pixels: Pixels, facts: Mapping[str, object], *, scale: int = 1) -> bytes:
    """A PNG, enlarged `scale` times by nearest neighbour, whose text chunk "ddpm" holds the facts as JSON.

    The same pixels and facts give the same bytes.
    """
    buffer = io.BytesIO()
    _enlarged(pixels, scale).save(buffer, "PNG", pnginfo=_chunk(facts))
    return buffer.getvalue()


def encode_apng(frames: Sequence[Pixels], facts: Mapping[str, object], *, scale: int = 1) -> bytes:
    """The same as an animated PNG, which runs for ever and rests at the last frame."""
    buffer = io.BytesIO()
    first, *more = (_enlarged(pixels, scale) for pixels in frames)
    durations = _durations(len(frames))
    first.save(
        buffer, "PNG", pnginfo=_chunk(facts), save_all=True, append_images=more, duration=durations, loop=0
    )  # fmt: skip
    return buffer.getvalue()


def encode_webp(frames: Sequence[Pixels], *, scale: int = 1) -> bytes:
    """An animated WebP without loss, which runs for ever and rests at the last frame."""
    buffer = io.BytesIO()
    first, *more = (_enlarged(pixels, scale).convert("RGB") for pixels in frames)
    durations = _durations(len(frames))
    first.save(buffer, "WEBP", lossless=True, save_all=True, append_images=more, duration=durations, loop=0)
    return buffer.getvalue()


def _enlarged(pixels: Pixels, scale: int) -> Image.Image:
    picture = to_pil(pixels)
    if scale == 1:
        return picture
    return picture.resize((picture.width * scale, picture.height * scale), Image.Resampling.NEAREST)


def _chunk(facts: Mapping[str, object]) -> PngImagePlugin.PngInfo:
    chunk = PngImagePlugin.PngInfo()
    chunk.add_text("ddpm", json.dumps(facts, sort_keys=True, separators=(",", ":")))
    return chunk


def _durations(frames: int) -> list[int]:
    """Milliseconds of every frame of an animation: two seconds or so in all, and the last one rests."""
    return [max(40, 2000 // frames)] * (frames - 1) + [1500]


def grid(images: Sequence[Pixels], columns: int) -> Pixels:
    """Lays images of one shape out in rows of `columns`, white between them."""
    (c, h, w), pad = images[0].shape, GRID_PAD
    canvas = np.full((c, *grid_shape(len(images), columns, h, w)), 255, np.uint8)
    for i, image in enumerate(images):
        top, left = i // columns * (h + pad), i % columns * (w + pad)
        canvas[:, top : top + h, left : left + w] = image
    return canvas


def grid_shape(number: int, columns: int, height: int, width: int) -> tuple[int, int]:
    """(H, W) of a grid of so many images."""
    rows, pad = -(-number // columns), GRID_PAD
    return rows * (height + pad) - pad, columns * (width + pad) - pad


class Upload:
    """An uploaded image file, its header read and nothing decoded.

    Args:
        content: the file. Its format is read from its bytes, never from its name.
        max_pixels: refused above this, of all frames that are to be looked at.
        formats: that are read.
        all_frames: or the first alone.

    Raises:
        BadImage: no image of a supported format. TooManyPixels: too large.
    """

    def __init__(
        self, content: bytes, max_pixels: int, formats: tuple[str, ...] = FORMATS, *, all_frames: bool = False
    ) -> None:
        self._told = functools.partial(_damage_told, max_pixels, formats)
        with self._told():
            self._file = Image.open(io.BytesIO(content), formats=formats)
            self.n_frames: int = getattr(self._file, "n_frames", 1) if all_frames else 1
        self.size = width, height = self._file.size
        self.pixels = width * height * self.n_frames
        if self.pixels > max_pixels:
            of_frames = f" of {self.n_frames} frames" if self.n_frames > 1 else ""
            what = f"{width} x {height} pixels{of_frames}"
            raise TooManyPixels(f"{what} are over the limit of {max_pixels:,}: send a smaller image")
        if content.startswith(JPEG_MAGIC) and (scans := content.count(START_OF_SCAN)) > MAX_SCANS:
            raise BadImage(f"{scans} scans are over the limit of {MAX_SCANS}: save the image as a baseline JPEG")

    def facts(self) -> str | None:
        """What it says of how it was made: the text chunk "ddpm" of a PNG, before the pixels as ours is."""
        text = self._file.info.get("ddpm")
        return None if text is None else str(text)

    def frame(self, index: int) -> Pixels:
        """The pixels of one frame, as decode() has them. Raises BadImage: damaged."""
        with self._told():
            return to_pixels(upright_8_bit(self._file, index))

    def decode(self, fit: tuple[int, int, int] | None) -> Pixels:
        """The pixels: EXIF rotation applied, first frame, alpha dropped, palette to RGB, 16 to 8 bit.

        Args:
            fit: the (C, H, W) to convert and resize to; None keeps the image's own size and colours.

        Raises:
            BadImage: damaged.
        """
        with self._told():
            picture = upright_8_bit(self._file)
        if fit is not None:
            channels, height, width = fit
            picture = picture.convert("L" if channels == 1 else "RGB")
            picture = picture.resize((width, height), Image.Resampling.LANCZOS)
        return to_pixels(picture)


@contextmanager
def _damage_told(max_pixels: int, formats: tuple[str, ...]) -> Iterator[None]:
    """Whatever Pillow finds wrong with a file is a BadImage."""
    try:
        yield
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise TooManyPixels(f"its pixels are over the limit of {max_pixels:,}: send a smaller image") from error
    except UnidentifiedImageError as error:
        raise BadImage(f"not an image of a supported format ({', '.join(formats)})") from error
    except Exception as error:  # Pillow's decoders raise nearly anything on damaged files
        raise BadImage(f"the image is damaged or truncated and cannot be decoded ({type(error).__name__})") from error
