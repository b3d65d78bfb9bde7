"""Folders of small colour pictures, for the tests of training on one's own."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, ImageDraw

BLUE, RED = (30, 60, 230), (230, 40, 30)


def draw(kind: str, index: int, size: int = 16) -> Image.Image:
    """A red disc or a blue square on white, its place by index."""
    picture = Image.new("RGB", (size, size), "white")
    left, top = 1 + index % 4, 1 + index // 4 % 4
    box = (left, top, left + size // 2 + 1, top + size // 2 + 1)
    if kind == "disc":
        ImageDraw.Draw(picture).ellipse(box, fill=RED)
    else:
        ImageDraw.Draw(picture).rectangle(box, fill=BLUE)
    return picture


def write_folder(root: Path, count: int = 16, *, classes: bool = True) -> Path:
    """`count` discs and as many squares, in class folders or in one without any."""
    for kind in ("square", "disc"):
        folder = root / f"{kind}s" if classes else root
        folder.mkdir(parents=True, exist_ok=True)
        for index in range(count):
            draw(kind, index).save(folder / f"{kind}{index:02}.png")
    return root
