"""Data sets and pixel ranges."""

from __future__ import annotations

import gzip
import hashlib
import io
import pickle
import shutil
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torchvision.datasets import CIFAR10, MNIST, FashionMNIST

from ddpm_core import data
from ddpm_core.data import ImageSet, Options


def test_pixels_map_to_minus_1_and_1_and_back_without_loss() -> None:
    pixels = torch.arange(256, dtype=torch.uint8)
    unit = data.to_unit(pixels)
    assert unit.dtype == torch.float32
    assert (float(unit[0]), float(unit[255])) == (-1, 1)
    assert torch.allclose(unit.diff(), torch.tensor(2 / 255))
    assert torch.equal(data.to_uint8(unit), pixels)


def test_what_lies_outside_is_clamped() -> None:
    x = torch.tensor([-7.0, -1.001, 0.0, 1.001, 7.0])
    assert data.to_uint8(x).tolist() == [0, 0, 128, 255, 255]


def test_digits_without_scikit_learn_name_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn.datasets", None)
    with pytest.raises(ValueError, match="comes with scikit-learn, which is not installed"):
        data.load("digits", Path(), train=True)


def test_the_digits_parts_are_disjoint_and_whole() -> None:
    train, test = (data.load("digits", Path(), train=part) for part in (True, False))
    assert len(train.images) + len(test.images) == 1797
    assert train.images.shape[1:] == (1, 8, 8)
    assert (int(train.images.min()), int(train.images.max())) == (0, 255)
    assert train.labels.unique().tolist() == list(range(10))


def test_an_unknown_data_set_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match="no data set 'imagenet'; known: mnist, fashion-mnist, cifar10, digits, folder"
    ):
        data.load("imagenet", Path(), train=True)


def test_a_download_that_fails_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(self: MNIST) -> None:
        raise RuntimeError("Error downloading train-images-idx3-ubyte.gz: no route to host")

    monkeypatch.setattr(MNIST, "download", fail)
    with pytest.raises(FileNotFoundError, match="no route to host"):
        data.load("mnist", tmp_path, train=True, download=True)
    with pytest.raises(FileNotFoundError, match="--download"):
        data.load("mnist", tmp_path, train=True)


def idx_file(array: np.ndarray) -> bytes:
    """The format of MNIST: two zeros, 8 for bytes, the number of dimensions, the dimensions, the bytes."""
    return bytes([0, 0, 8, array.ndim]) + np.array(array.shape, ">i4").tobytes() + array.astype(np.uint8).tobytes()


@pytest.fixture
def fashion(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, np.ndarray]:
    """Fashion-MNIST of five and three images, as downloaded: torchvision's own code checks, unpacks and reads it."""
    rng = np.random.default_rng(0)
    arrays = {
        "train-images-idx3-ubyte": rng.integers(0, 256, (5, 28, 28)), "train-labels-idx1-ubyte": np.arange(5),
        "t10k-images-idx3-ubyte": rng.integers(0, 256, (3, 28, 28)), "t10k-labels-idx1-ubyte": np.array([9, 0, 4]),
    }  # fmt: skip
    files = {f"{name}.gz": gzip.compress(idx_file(array)) for name, array in arrays.items()}
    raw = tmp_path / "FashionMNIST" / "raw"
    raw.mkdir(parents=True)
    for name, content in files.items():
        (raw / name).write_bytes(content)
    monkeypatch.setattr(FashionMNIST, "resources", [(k, hashlib.md5(v).hexdigest()) for k, v in files.items()])
    return arrays


def test_fashion_mnist_is_unpacked_and_read(fashion: dict[str, np.ndarray], tmp_path: Path) -> None:
    train = data.load("fashion-mnist", tmp_path, train=True, download=True)
    test = data.load("fashion-mnist", tmp_path, train=False)
    for part, prefix in ((train, "train"), (test, "t10k")):
        assert np.array_equal(part.images[:, 0].numpy(), fashion[f"{prefix}-images-idx3-ubyte"])
        assert part.labels.tolist() == fashion[f"{prefix}-labels-idx1-ubyte"].tolist()
        assert (part.name, part.num_classes, part.labels.dtype) == ("fashion-mnist", 10, torch.long)


IMAGES, LABELS = "train-images-idx3-ubyte", "train-labels-idx1-ubyte"


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        (IMAGES, lambda b: b"", "no IDX file of bytes in 3 dimensions"),
        (IMAGES, lambda b: b[:3], "no IDX file"),
        (IMAGES, lambda b: b[:15], "no IDX file"),
        (IMAGES, lambda b: b[:16], r"16 bytes where \[5, 28, 28\] needs 3,936"),
        (IMAGES, lambda b: b[:-1], "3,935 bytes where"),
        (IMAGES, lambda b: b + b"\0", "3,937 bytes where"),
        (IMAGES, lambda b: b[:4] + b"\xff" * 12 + b[16:], "3,936 bytes where"),
        (IMAGES, lambda b: bytes([0, 0, 9]) + b[3:], "no IDX file"),  # signed
        (IMAGES, lambda b: bytes([0, 0, 10]) + b[3:], "no IDX file"),  # of no kind that there is
        (IMAGES, lambda b: b[:3] + bytes([1]) + b[4:], "no IDX file"),
        (IMAGES, gzip.compress, "no IDX file"),
        (LABELS, lambda b: b[:8], r"8 bytes where \[5\] needs 13"),
        (LABELS, lambda b: idx_file(np.arange(4)), "4 labels of 5 images"),
        (LABELS, lambda b: b[:-1] + bytes([10]), "labels above 9"),
    ],
)
@pytest.mark.parametrize("download", [False, True])
def test_a_damaged_file_of_fashion_mnist_is_named(
    fashion: dict[str, np.ndarray],
    tmp_path: Path,
    name: str,
    damage: Callable[[bytes], bytes],
    reason: str,
    download: bool,
) -> None:
    data.load("fashion-mnist", tmp_path, train=True, download=True)
    path = tmp_path / "FashionMNIST" / "raw" / name
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=rf"^{path} is damaged \({reason}.*: take it away.*--download"):
        data.load("fashion-mnist", tmp_path, train=True, download=download)
    path.unlink()
    assert len(data.load("fashion-mnist", tmp_path, train=True, download=True).images) == 5  # as the message says


def test_a_file_of_fashion_mnist_that_came_cut_short_is_not_unpacked_but_named(
    fashion: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And fetched anew, which fails here."""
    path = tmp_path / "FashionMNIST" / "raw" / f"{IMAGES}.gz"
    whole = path.read_bytes()
    monkeypatch.setattr(FashionMNIST, "mirrors", [f"{(tmp_path / 'nowhere').as_uri()}/"])
    path.write_bytes(whole[:-20])
    with pytest.raises(FileNotFoundError, match=rf"into {path.parent} \(.*{path.name}.*take away what is there"):
        data.load("fashion-mnist", tmp_path, train=True, download=True)
    path.write_bytes(whole)
    assert len(data.load("fashion-mnist", tmp_path, train=True, download=True).images) == 5


@pytest.fixture
def cifar(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> np.ndarray:
    """CIFAR-10's archive of two images a batch, as downloaded: torchvision's own code checks, unpacks and reads it."""
    images = np.random.default_rng(0).integers(0, 256, (12, 3, 32, 32), dtype=np.uint8)
    names = [f"data_batch_{i}" for i in range(1, 6)] + ["test_batch"]
    entries: dict[str, Any] = {
        name: {"data": images[2 * i : 2 * i + 2].reshape(2, -1), "labels": [i, 9 - i]} for i, name in enumerate(names)
    }
    files = {
        name: pickle.dumps(e) for name, e in {**entries, "batches.meta": {"label_names": list("abcdefghij")}}.items()
    }
    archive = tmp_path / "cifar-10-python.tar.gz"
    with tarfile.open(archive, "w:gz") as tar:
        for name, content in files.items():
            info = tarfile.TarInfo(f"cifar-10-batches-py/{name}")
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))
    digests = [[name, hashlib.md5(content).hexdigest()] for name, content in files.items()]
    monkeypatch.setattr(CIFAR10, "tgz_md5", hashlib.md5(archive.read_bytes()).hexdigest())
    monkeypatch.setattr(CIFAR10, "train_list", digests[:5])
    monkeypatch.setattr(CIFAR10, "test_list", digests[5:6])
    monkeypatch.setattr(CIFAR10, "meta", {"filename": "batches.meta", "key": "label_names", "md5": digests[6][1]})
    return images


def test_cifar10_is_unpacked_and_read(cifar: np.ndarray, tmp_path: Path) -> None:
    train = data.load("cifar10", tmp_path, train=True, download=True)
    test = data.load("cifar10", tmp_path, train=False)
    assert np.array_equal(torch.cat([train.images, test.images]).numpy(), cifar)
    assert train.labels.tolist() == [0, 9, 1, 8, 2, 7, 3, 6, 4, 5]
    assert (test.labels.tolist(), test.num_classes) == ([5, 4], 10)
    assert train.images.is_contiguous()


@pytest.mark.parametrize("name", ["data_batch_3", "test_batch", "batches.meta"])
def test_a_damaged_file_of_cifar10_is_named_and_never_unpickled(cifar: np.ndarray, tmp_path: Path, name: str) -> None:
    data.load("cifar10", tmp_path, train=True, download=True)
    path = tmp_path / "cifar-10-batches-py" / name
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(
        ValueError, match=rf"^{path} is damaged \(its MD5 is another\): take its folder away.*--download"
    ):
        data.load("cifar10", tmp_path, train=True)
    path.unlink()
    with pytest.raises(FileNotFoundError, match=rf"{path} is missing.*--download"):
        data.load("cifar10", tmp_path, train=True)
    shutil.rmtree(path.parent)
    assert len(data.load("cifar10", tmp_path, train=True, download=True).images) == 10


@pytest.mark.parametrize(
    ("name", "file"),
    [
        ("mnist", f"MNIST/raw/{IMAGES}"),
        ("fashion-mnist", f"FashionMNIST/raw/{IMAGES}"),
        ("cifar10", "cifar-10-batches-py/data_batch_1"),
    ],
)
def test_a_data_set_that_is_missing_says_where_its_files_belong(tmp_path: Path, name: str, file: str) -> None:
    with pytest.raises(FileNotFoundError, match=rf"{tmp_path / file} is missing.*--data-root.*--download"):
        data.load(name, tmp_path, train=True)


def test_any_data_set_takes_a_size_and_channels() -> None:
    """Enlarged twice, an image has the mean that it had; grey stays grey in RGB, and comes back from it."""
    plain = data.load("digits", Path(), train=True).images.double()
    large = data.load("digits", Path(), train=True, options=Options(16, 3)).images
    assert large.shape == (len(plain), 3, 16, 16)
    assert bool((large == large[:, :1]).all())
    assert float((large[:, 0].double().mean((1, 2)) - plain.mean((1, 2, 3))).abs().max()) < 8
    same = data.load("digits", Path(), train=True, options=Options(8, 1)).images
    assert torch.equal(same.double(), plain)


@pytest.mark.parametrize(("size", "channels"), [(0, None), (-4, 1), (8, 2), (None, 4)])
def test_options_that_cannot_be_are_refused(size: int | None, channels: int | None) -> None:
    with pytest.raises(ValueError, match="must be 1"):
        Options(size, channels)


def test_facts_tell_data_sets_apart() -> None:
    images = torch.zeros(2, 1, 8, 8, dtype=torch.uint8)
    first, again, other_labels, other_pixels = (
        ImageSet("x", images + add, torch.tensor(labels), 2).facts()
        for add, labels in ((0, [0, 1]), (0, [0, 1]), (0, [1, 0]), (1, [0, 1]))
    )
    assert first == again
    assert len({first["sha256"], other_labels["sha256"], other_pixels["sha256"]}) == 3


@pytest.mark.parametrize(
    ("fields", "reason"),
    [
        ({"images": torch.zeros(2, 8, 8, dtype=torch.uint8)}, "must be"),
        ({"images": torch.zeros(2, 1, 8, 8)}, "uint8"),
        ({"images": torch.zeros(0, 1, 8, 8, dtype=torch.uint8)}, "N > 0"),
        ({"labels": torch.zeros(3)}, "2 images but 3 labels"),
    ],
)
def test_images_of_another_form_are_refused(fields: dict[str, Any], reason: str) -> None:
    good = {"name": "x", "images": torch.zeros(2, 1, 8, 8, dtype=torch.uint8), "labels": torch.zeros(2)}
    with pytest.raises(ValueError, match=reason):
        ImageSet(**{**good, **fields}, num_classes=1)
