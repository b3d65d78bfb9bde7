"""A folder of images as a data set: classes, shapes, what a file may hold, and what is refused, by name."""

from __future__ import annotations

import functools
import struct
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from ddpm_core import data, image_files
from ddpm_core.data import ImageSet, Options
from tests.pictures import BLUE, RED, draw, write_folder


def load(root: Path, size: int | None = None, channels: int | None = None, *, train: bool = True) -> ImageSet:
    return data.load("folder", root, train=train, options=Options(size, channels))


def read_one(picture: Image.Image, path: Path, size: int | None = None, channels: int | None = None) -> torch.Tensor:
    """(C, H, W) of a picture that is the only one in its folder."""
    path.parent.mkdir(exist_ok=True)
    picture.save(path)
    return load(path.parent, size, channels).images[0]


def test_subfolders_are_classes_in_the_order_of_their_names(tmp_path: Path) -> None:
    images = load(write_folder(tmp_path))
    assert (images.num_classes, images.class_names) == (2, ("discs", "squares"))
    assert images.labels.tolist() == [0] * 16 + [1] * 16
    assert images.images.shape == (32, 3, 16, 16)
    for index, kind in ((3, "disc"), (16 + 5, "square")):
        expected = np.asarray(draw(kind, index % 16)).transpose(2, 0, 1)
        assert np.array_equal(images.images[index].numpy(), expected)


def test_a_folder_without_subfolders_has_no_labels(tmp_path: Path) -> None:
    images = load(write_folder(tmp_path, classes=False))
    assert (len(images.images), images.num_classes, images.class_names) == (32, 0, ())
    assert images.labels.unique().tolist() == [0]


def test_hidden_files_and_folders_and_other_files_are_no_images(tmp_path: Path) -> None:
    write_folder(tmp_path, count=2)
    (tmp_path / ".cache").mkdir()
    draw("disc", 0).save(tmp_path / ".cache" / "thumbnail.png")
    (tmp_path / "discs" / "._disc00.png").write_bytes(b"resource fork")
    (tmp_path / "discs" / "notes.txt").write_text("discs")
    assert len(load(tmp_path).images) == 4


def test_train_and_test_folders_are_the_two_parts(tmp_path: Path) -> None:
    write_folder(tmp_path / "train", count=3)
    write_folder(tmp_path / "test", count=1)
    assert (len(load(tmp_path).images), len(load(tmp_path, train=False).images)) == (6, 2)
    (tmp_path / "test" / "discs").rename(tmp_path / "test" / "circles")
    with pytest.raises(ValueError, match=r"discs, squares.*circles, squares.*must be the same"):
        load(tmp_path)


def test_channels_are_converted(tmp_path: Path) -> None:
    """Red, green, blue of equal strength, and the weights by which they are seen (ITU-R 601)."""
    picture = Image.fromarray(200 * np.eye(3, dtype=np.uint8)[None])
    rgb = read_one(picture, tmp_path / "colour" / "a.png")
    assert np.array_equal(rgb.numpy()[:, 0], 200 * np.eye(3))
    grey = read_one(picture, tmp_path / "colour" / "a.png", channels=1)
    assert grey[0, 0].tolist() == pytest.approx([0.299 * 200, 0.587 * 200, 0.114 * 200], abs=1)
    both = read_one(Image.new("L", (4, 4), 77), tmp_path / "grey" / "a.png")
    assert both.shape == (3, 4, 4)
    assert both.unique().tolist() == [77]


def test_images_of_any_size_become_squares_of_their_middle(tmp_path: Path) -> None:
    """60 x 20 with a third of each colour: the middle third stays, but for what the filter sees of its neighbours."""
    wide = Image.fromarray(np.repeat(np.array([[RED, BLUE, RED]], np.uint8), 20, 0).repeat(20, 1))
    for name, picture in (
        ("wide", wide),
        ("tall", wide.transpose(Image.Transpose.ROTATE_90)),
        ("small", wide.crop((20, 0, 26, 6))),
    ):
        picture.save(tmp_path / f"{name}.png")
    images = load(tmp_path, size=10).images
    assert images.shape == (3, 3, 10, 10)
    assert int((images.permute(0, 2, 3, 1).int() - torch.tensor(BLUE)).abs().max()) < 15


def test_resizing_does_not_alias(tmp_path: Path) -> None:
    """A chessboard of single pixels, which every eighth pixel would make black or white, becomes its mean."""
    board = Image.fromarray((255 * (np.indices((64, 64)).sum(0) % 2)).astype(np.uint8))
    image = read_one(board, tmp_path / "board" / "a.png", size=8, channels=1)
    assert float((image[:, 1:-1, 1:-1].double() - 127.5).abs().max()) <= 4


def test_a_file_is_read_as_people_see_it(tmp_path: Path) -> None:
    """EXIF rotation, alpha, palettes, 16 bit."""
    upright = Image.new("RGB", (4, 2), "white")
    upright.putpixel((3, 0), RED)
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned 90 degrees clockwise
    turned = tmp_path / "turned" / "a.png"
    turned.parent.mkdir()
    upright.save(turned, exif=exif)
    image = load(turned.parent).images[0]
    assert image.shape == (3, 4, 2)
    assert image[:, 3, 1].tolist() == list(RED)

    translucent = Image.new("RGBA", (2, 2), (*BLUE, 10))
    assert read_one(translucent, tmp_path / "alpha" / "a.png")[:, 0, 0].tolist() == list(BLUE)
    palette = Image.new("RGB", (2, 2), RED).convert("P", palette=Image.Palette.ADAPTIVE)
    assert read_one(palette, tmp_path / "palette" / "a.png")[:, 0, 0].tolist() == list(RED)
    deep = Image.fromarray(np.full((2, 2), 0x7F80, np.uint16))
    assert read_one(deep, tmp_path / "deep" / "a.png", channels=1).unique().tolist() == [0x7F]


def cut_short(whole: bytes) -> bytes:
    return whole[: len(whole) // 2]


def bad_checksum(whole: bytes) -> bytes:
    at = whole.index(b"IDAT")
    return whole[: at + 6] + struct.pack("B", whole[at + 6] ^ 255) + whole[at + 7 :]


@pytest.mark.parametrize(
    "damage", [cut_short, bad_checksum, lambda whole: b"", lambda whole: b"<html>not found</html>"]
)
def test_a_damaged_file_is_named(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write_folder(tmp_path) / "squares" / "square07.png"
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=f"{path} cannot be read as an image"):
        load(tmp_path, size=16)


def test_images_of_different_sizes_need_one(tmp_path: Path) -> None:
    write_folder(tmp_path)
    draw("disc", 0, size=24).crop((0, 0, 24, 20)).save(tmp_path / "discs" / "other.png")
    with pytest.raises(ValueError, match=r"disc00.png has 16 x 16 pixels, .*other.png 24 x 20: .*--image-size"):
        load(tmp_path)
    assert load(tmp_path, size=16).images.shape == (33, 3, 16, 16)


def test_after_a_bad_image_the_others_are_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    read = []

    def second_differs(path: Path, size: int | None, channels: int) -> image_files.Pixels:
        read.append(path)
        time.sleep(0.02)
        return np.zeros((3, 4, 5 if len(read) == 2 else 4), np.uint8)

    monkeypatch.setattr(image_files, "read", second_differs)
    monkeypatch.setattr(data, "ThreadPoolExecutor", functools.partial(ThreadPoolExecutor, 1))
    with pytest.raises(ValueError, match="make all images one size"):
        load(tmp_path)
    assert len(read) < 32


def test_more_pixels_than_memory_end_in_advice(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_folder(tmp_path)
    vast = np.lib.stride_tricks.as_strided(np.zeros(1, np.uint8), (3, 2**22, 2**22), (0, 0, 0))
    monkeypatch.setattr(image_files, "read", lambda path, size, channels: vast)
    with pytest.raises(ValueError, match="do not fit into memory: make them smaller with --image-size"):
        load(tmp_path)


def test_a_folder_cannot_be_downloaded(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="--download"):
        data.load("folder", tmp_path, train=True, download=True)


def test_a_folder_that_is_no_data_set_says_why(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"nowhere is no folder.*--data-root"):
        load(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match=rf"no image in {tmp_path}; .*\.png"):
        load(tmp_path)
    write_folder(tmp_path)
    with pytest.raises(FileNotFoundError, match="no test part"):
        load(tmp_path, train=False)
    (tmp_path / "triangles").mkdir()
    with pytest.raises(FileNotFoundError, match=f"no image in {tmp_path / 'triangles'};"):
        load(tmp_path)
    draw("disc", 0).save(tmp_path / "triangles" / "a.png")
    draw("disc", 0).save(tmp_path / "stray.png")
    with pytest.raises(ValueError, match=r"stray.png\) beside folders \(discs, squares, triangles\)"):
        load(tmp_path)
