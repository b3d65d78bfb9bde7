"""Data sets, and the only place that knows pixel ranges: uint8 0..255 outside, float32 [-1, 1] inside.

The torchvision of the library is here, imported when a data set is asked for.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import math
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddpm_core import image_files, pictures

LEVEL = 2 / 255  # from one grey level to the next in [-1, 1]


def to_unit(images: Tensor) -> Tensor:
    """uint8 0..255 -> float32 [-1, 1]."""
    return images.to(torch.float32) / 127.5 - 1


def to_uint8(x: Tensor) -> Tensor:
    """[-1, 1] -> uint8 0..255, clamped, rounded half to even; the inverse of to_unit."""
    return ((x.clamp(-1, 1) + 1) * 127.5).round().to(torch.uint8)


@dataclasses.dataclass(frozen=True)
class Options:
    """The shape that the images of a data set are given.

    Raises:
        ValueError: a size or a number of channels that cannot be.
    """

    size: int | None = None  # pixels a side: short side resized to it, the middle kept; None: as they are
    channels: int | None = None  # 1: grey, 3: RGB; None: the data set's own, and RGB of a folder

    def __post_init__(self) -> None:
        if self.size is not None and self.size < 1:
            raise ValueError(f"image size {self.size} must be 1 pixel or more")
        if self.channels not in (None, 1, 3):
            raise ValueError(f"image channels {self.channels} must be 1 (grey) or 3 (RGB)")


@dataclasses.dataclass(frozen=True)
class ImageSet:
    """A whole data set in memory: images (N, C, H, W) uint8, labels (N,) long, and how many classes it has."""

    name: str
    images: Tensor
    labels: Tensor
    num_classes: int  # 0: without labels, all of which are then 0
    class_names: tuple[str, ...] = ()  # of a folder: its subfolders' names, in the order of the labels

    def __post_init__(self) -> None:
        if self.images.ndim != 4 or self.images.dtype != torch.uint8 or not len(self.images):
            raise ValueError(f"{self.name}: images must be (N, C, H, W) uint8 with N > 0")
        if len(self.labels) != len(self.images):
            raise ValueError(f"{self.name}: {len(self.images)} images but {len(self.labels)} labels")

    def facts(self) -> dict[str, Any]:
        """What tells this data set from any other, as JSON."""
        digest = hashlib.sha256(self.images.contiguous().numpy().data)
        digest.update(self.labels.contiguous().numpy().data)
        names = {"class_names": list(self.class_names)} if self.class_names else {}
        return {"images": len(self.images), "sha256": digest.hexdigest(), **names}


def _fetch(title: str, kind: Any, files: Path, root: Path) -> None:
    """One of torchvision's data sets, downloaded and unpacked where that is not done yet."""
    try:
        kind(str(root), download=True)
    except Exception as error:  # torchvision reads what it unpacked, and has no common error where that is damaged
        reason = " ".join(str(error).split())
        raise FileNotFoundError(
            f"{title} could not be fetched into {files} ({reason}): take away what is there and try again"
        ) from error


def _absent(title: str, path: Path, root: Path) -> FileNotFoundError:
    return FileNotFoundError(
        f"{title} is not under {root}, {path} is missing: name another folder with --data-root, or fetch it with "
        "--download"
    )


def _damaged(path: Path, reason: str, away: str = "it") -> ValueError:
    return ValueError(f"{path} is damaged ({reason}): take {away} away, then fetch it anew with --download")


def _read_idx(path: Path, ndim: int) -> Tensor:
    """The bytes in an IDX file, the format of MNIST: 0, 0, 8 for bytes, ndim, the dimensions, then the bytes."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    start = 4 + 4 * ndim
    if content[:4].tolist() != [0, 0, 8, ndim] or len(content) < start:
        raise _damaged(path, f"no IDX file of bytes in {ndim} dimensions")
    shape = content[4:start].view(">u4").tolist()
    if len(content) - start != math.prod(shape):
        raise _damaged(path, f"{len(content):,} bytes where {shape} needs {start + math.prod(shape):,}")
    return torch.from_numpy(content[start:].reshape(shape).copy())


def _idx_set(name: str, title: str, kind: Any, root: Path, train: bool, download: bool) -> ImageSet:
    files = root / kind.__name__ / "raw"
    paths = [files / f"{'train' if train else 't10k'}-{which}" for which in ("images-idx3-ubyte", "labels-idx1-ubyte")]
    if download and not all(path.is_file() for path in paths):
        _fetch(title, kind, files, root)
    for path in paths:
        if not path.is_file():
            raise _absent(title, path, root)
    images, labels = _read_idx(paths[0], 3), _read_idx(paths[1], 1)
    if len(images) != len(labels):
        raise _damaged(paths[1], f"{len(labels):,} labels of {len(images):,} images")
    if bool((labels > 9).any()):
        raise _damaged(paths[1], "labels above 9")
    return ImageSet(name, images[:, None], labels.long(), 10)


def _mnist(root: Path, train: bool, download: bool, options: Options) -> ImageSet:
    from torchvision.datasets import MNIST

    return _idx_set("mnist", "MNIST", MNIST, root, train, download)


def _fashion_mnist(root: Path, train: bool, download: bool, options: Options) -> ImageSet:
    from torchvision.datasets import FashionMNIST

    return _idx_set("fashion-mnist", "Fashion-MNIST", FashionMNIST, root, train, download)


def _cifar10(root: Path, train: bool, download: bool, options: Options) -> ImageSet:
    from torchvision.datasets import CIFAR10
    from torchvision.datasets.utils import check_integrity

    files = root / CIFAR10.base_folder
    if download:
        _fetch("CIFAR-10", CIFAR10, files, root)
    for name, md5 in [*CIFAR10.train_list, *CIFAR10.test_list, (CIFAR10.meta["filename"], CIFAR10.meta["md5"])]:
        if not (files / name).is_file():
            raise _absent("CIFAR-10", files / name, root)
        if not check_integrity(str(files / name), md5):
            raise _damaged(files / name, "its MD5 is another", "its folder")
    found = CIFAR10(str(root), train=train)
    images = torch.from_numpy(found.data).permute(0, 3, 1, 2).contiguous()
    return ImageSet("cifar10", images, torch.tensor(found.targets), 10)


def _digits(root: Path, train: bool, download: bool, options: Options) -> ImageSet:
    """scikit-learn's bundled 8x8 digits: real images for tests and first tries, no download, four in five to train."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ValueError("the data set digits comes with scikit-learn, which is not installed here") from None

    data = load_digits()
    images = torch.from_numpy(np.round(data.images * 255 / 16).astype(np.uint8))[:, None]
    chosen = (torch.arange(len(images)) % 5 != 0) == train
    return ImageSet("digits", images[chosen], torch.from_numpy(data.target).long()[chosen], 10)


def _folder(root: Path, train: bool, download: bool, options: Options) -> ImageSet:
    """Images in class folders, sorted by name (torchvision's ImageFolder), or in one folder, without labels."""
    from torchvision.datasets.folder import IMG_EXTENSIONS, ImageFolder

    root = _part(root, train)
    classes = _class_folders(root)
    loose = sorted(p.name for p in root.iterdir() if p.suffix.lower() in IMG_EXTENSIONS and p.name[0] != ".")
    if classes and loose:
        raise ValueError(
            f"{root} holds images ({loose[0]}{', ...' if loose[1:] else ''}) beside folders ({', '.join(classes)}): "
            "put every image into the folder of its class, or leave no folder there"
        )
    label_of = {name: label for label, name in enumerate(classes)} or {".": 0}
    found = [
        (Path(path), label) for path, label in ImageFolder.make_dataset(root, label_of, IMG_EXTENSIONS, None, True)
    ]
    found = [(path, label) for path, label in found if not any(p[0] == "." for p in path.relative_to(root).parts)]
    paths, labels = [path for path, _ in found], [label for _, label in found]
    seen = set(labels)
    if empty := [str(root / name) for name, label in label_of.items() if label not in seen]:
        raise FileNotFoundError(f"no image in {', '.join(empty)}; its name ends in one of {', '.join(IMG_EXTENSIONS)}")
    read = functools.partial(image_files.read, size=options.size, channels=options.channels or 3)
    pool = ThreadPoolExecutor()
    try:
        images = _stack(paths, pool.map(read, paths))
    finally:
        pool.shutdown(cancel_futures=True)  # after a bad image the others are not read
    return ImageSet(str(root), images, torch.tensor(labels), len(classes), tuple(classes))


def _part(root: Path, train: bool) -> Path:
    """The folder of a part: root/train or root/test where there are both, else root, which is for training alone."""
    if not root.is_dir():
        raise FileNotFoundError(f"{root} is no folder: name the one that holds your images with --data-root")
    parts = [root / "train", root / "test"]
    if not all(part.is_dir() for part in parts):
        if train:
            return root
        raise FileNotFoundError(f"{root} has no test part: divide its images between {parts[0]} and {parts[1]}")
    names = [", ".join(_class_folders(part)) or "none" for part in parts]
    if names[0] != names[1]:
        raise ValueError(f"the classes of {parts[0]} ({names[0]}) and of {parts[1]} ({names[1]}) must be the same")
    return parts[0] if train else parts[1]


def _class_folders(root: Path) -> list[str]:
    return sorted(p.name for p in root.iterdir() if p.is_dir() and p.name[0] != ".")


def _stack(names: Sequence[object], images: Iterable[image_files.Pixels]) -> Tensor:
    """Images (C, H, W), one a name, as one tensor (N, C, H, W), filled as they come: there is never a second copy."""
    whole = torch.empty(0)
    for index, image in enumerate(images):
        if index == 0:
            try:
                whole = torch.empty(len(names), *image.shape, dtype=torch.uint8)
            except RuntimeError as error:  # torch's lack of memory
                raise ValueError(
                    f"{len(names):,} images of {tuple(image.shape)} do not fit into memory: "
                    "make them smaller with --image-size"
                ) from error
        if image.shape != whole.shape[1:]:
            (_, h, w), (_, height, width) = whole.shape[1:], image.shape
            raise ValueError(
                f"{names[0]} has {w} x {h} pixels, {names[index]} {width} x {height}: "
                "make all images one size with --image-size"
            )
        whole[index] = torch.from_numpy(image)
    return whole


def _reshaped(images: ImageSet, options: Options) -> ImageSet:
    """The same images in the shape that the options ask for."""
    channels, height, width = images.images.shape[1:]
    channels_asked, size = options.channels or channels, options.size
    if channels_asked == channels and size in (None, height) and size in (None, width):
        return images
    fitted = (image_files.fitted(pictures.to_pil(image), size, channels_asked) for image in images.images)
    return dataclasses.replace(images, images=_stack(range(len(images.images)), fitted))


DATASETS: dict[str, Callable[[Path, bool, bool, Options], ImageSet]] = {
    "mnist": _mnist, "fashion-mnist": _fashion_mnist, "cifar10": _cifar10, "digits": _digits, "folder": _folder,
}  # fmt: skip


def load(name: str, root: Path, *, train: bool, download: bool = False, options: Options | None = None) -> ImageSet:
    """A data set by its name.

    Args:
        name: a key of DATASETS.
        root: the folder that holds data sets, in torchvision's layout; of "folder", the folder of images itself:
            subfolders are classes, labelled in the order of their names; without any the set has no labels. Two
            subfolders train and test are its parts; without them all of it is the training part.
        train: the training part, else the test part.
        download: fetch it into root where it is missing.
        options: the shape of its images; None: as they are.

    Raises:
        ValueError: no such data set, a file that is damaged, or an image that has another shape than the others.
        FileNotFoundError: its files are not there, and could not be fetched.
    """
    if name not in DATASETS:
        raise ValueError(f"no data set {name!r}; known: {', '.join(DATASETS)}")
    if download and name == "folder":
        raise ValueError("--download fetches known data sets; a folder holds your own images")
    options = options or Options()
    return _reshaped(DATASETS[name](root, train, download, options), options)
