"""The training command line on a folder of images: what is recorded, resumed and refused."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

import ddpm_core
from ddpm_core import classifier, data_arguments, evaluate, sweep, train
from ddpm_core.checkpoint import WEIGHTS_NAME, load_model
from tests.pictures import draw, write_folder

COMMON = [
    "--data",
    "folder",
    "--channels",
    "8",
    "16",
    "--batch-size",
    "8",
    "--device",
    "cpu",
    "--no-compile",
    "--no-bf16",
]
WEIGHTS = Path("model/unet") / WEIGHTS_NAME


def arguments(pictures: Path, out: Path, *more: str) -> list[str]:
    return [*COMMON, "--data-root", str(pictures), "--out", str(out), *more]


def one_line(capsys: pytest.CaptureFixture[str]) -> str:
    message = capsys.readouterr().err
    assert message.startswith("error: ")
    assert message.count("\n") == 1
    return message


def test_data_options_and_augmentation_are_recorded_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Stopped and resumed, an augmented run ends in the same bytes; its images cannot become others meanwhile."""
    pictures = write_folder(tmp_path / "pictures", count=6)
    options = ["--image-size", "8", "--image-channels", "1", "--flip", "--shift", "1"]
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    assert train.main(arguments(pictures, whole, *options, "--steps", "4")) == 0
    assert "0: discs, 1: squares" in capsys.readouterr().out
    model = load_model(whole / "model")
    assert (model.config.image_shape, model.config.num_classes) == ((1, 8, 8), 2)
    facts = json.loads((whole / "model" / "training.json").read_text())
    assert facts["data_options"] == {"size": 8, "channels": 1}
    assert (facts["data_facts"]["images"], facts["data_facts"]["class_names"]) == (12, ["discs", "squares"])
    assert (facts["recipe"]["flip"], facts["recipe"]["shift"]) == (True, 1)

    assert train.main(arguments(pictures, halved, *options, "--steps", "2")) == 0
    resume = ["--out", str(halved), "--resume", "--device", "cpu"]
    assert train.main([*resume, "--image-size", "16", "--no-flip"]) == 2
    assert "--flip, --image-size cannot change" in capsys.readouterr().err
    other = tmp_path / "other"
    pictures.rename(other)
    draw("disc", 15).save(other / "discs" / "more.png")
    assert train.main([*resume, "--steps", "4", "--data-root", str(other)]) == 2
    assert f"under {other} are not those that this run began with" in capsys.readouterr().err
    (other / "discs" / "more.png").unlink()
    assert train.main([*resume, "--steps", "4", "--data-root", str(other)]) == 0
    assert (halved / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_folder_without_classes_makes_an_unconditional_model(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "pictures", count=4, classes=False)
    assert train.main(arguments(pictures, tmp_path / "run", "--steps", "1")) == 0
    model = load_model(tmp_path / "run" / "model")
    assert (model.config.image_shape, model.null_label) == ((3, 16, 16), None)
    assert json.loads((tmp_path / "run" / "run.json").read_text())["unet"]["num_class_embeds"] is None


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (
            ["--image-size", "18", "--channels", "8", "8", "8"],
            "a multiple of 4, 2^(levels - 1): choose another --image-s",
        ),
        (["--image-size", "0"], "image size 0 must be 1 pixel or more"),
        (["--shift", "16"], "shift=16 must be less than the images' 16 x 16 pixels"),
        (["--data-root", "nowhere"], "nowhere is no folder: name the one that holds your images with --data-root"),
    ],
)
def test_what_cannot_be_trained_on_is_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    pictures = write_folder(tmp_path / "pictures", count=2)
    assert train.main(arguments(pictures, tmp_path / "run", "--steps", "1", *options)) == 2
    assert reason in one_line(capsys)
    assert not (tmp_path / "run").exists()


IMAGE = Path("discs/disc01.png")


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-40])


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (lambda root: (root / IMAGE).write_bytes(b"\x89PNG\r\n\x1a\n"), f"{IMAGE} cannot be read as an image"),
        (lambda root: (root / IMAGE).write_bytes(b""), f"{IMAGE} cannot be read as an image"),
        (lambda root: (root / IMAGE).write_text("a text"), f"{IMAGE} cannot be read as an image"),
        (lambda root: cut(root / IMAGE), f"{IMAGE} cannot be read as an image"),
        (lambda root: (root / IMAGE).rename(root / "disc.png"), "holds images (disc.png) beside folders"),
        (lambda root: [path.unlink() for path in root.glob("discs/*")], "no image in {root}/discs; its name ends in"),
        (lambda root: [shutil.rmtree(path) for path in root.iterdir()], "no image in {root}; its name ends in one of"),
        (shutil.rmtree, "{root} is no folder"),
        (lambda root: root.rename(root.with_name("file")) and root.write_bytes(b""), "{root} is no folder"),
    ],
    ids=["header", "empty_file", "text", "cut", "astray", "empty_class", "empty_folder", "no_folder", "file"],
)
def test_a_folder_that_is_damaged_names_what_is_wrong_in_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], damage: Callable[[Path], object], reason: str
) -> None:
    pictures = write_folder(tmp_path / "pictures", count=2)
    damage(pictures)
    assert train.main(arguments(pictures, tmp_path / "run", "--steps", "1")) == 2
    assert reason.format(root=pictures) in one_line(capsys)
    assert not (tmp_path / "run").exists()


def test_the_process_itself_says_one_line_of_a_damaged_image_and_exits_2(tmp_path: Path) -> None:
    pictures = write_folder(tmp_path / "pictures", count=2)
    cut(pictures / IMAGE)
    process = subprocess.run(
        [sys.executable, "-m", "ddpm_core.train", *arguments(pictures, tmp_path / "run", "--steps", "1")],
        cwd=Path(ddpm_core.__file__).parent.parent, capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert (process.returncode, process.stdout) == (2, "")
    assert process.stderr.startswith(f"error: {pictures / IMAGE} cannot be read as an image (")
    assert process.stderr.count("\n") == 1


def test_a_classifier_learns_from_a_folder_and_refuses_one_without_classes(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part, count in (("train", 16), ("test", 4)):
        write_folder(tmp_path / "pictures" / part, count=count)
    common = ["--data", "folder", "--image-size", "8", "--epochs", "15", "--out", str(tmp_path / "classifier")]
    assert classifier.main([*common, "--data-root", str(tmp_path / "pictures")]) == 0
    card = json.loads((tmp_path / "classifier" / "card.json").read_text())
    assert (card["channels"], card["num_classes"], card["train_images"], card["test_images"]) == (3, 2, 32, 8)
    assert card["test_accuracy"] == 1

    flat = tmp_path / "flat"
    for part in ("train", "test"):
        write_folder(flat / part, count=2, classes=False)
    capsys.readouterr()
    assert classifier.main([*common, "--data-root", str(flat)]) == 2
    assert "has 0 classes; a classifier needs 2 or more" in capsys.readouterr().err


@pytest.mark.parametrize("command", [classifier, evaluate, sweep])
def test_every_folder_has_a_feature_space_of_its_own(command: ModuleType, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--data", "folder", "--data-root", "nowhere"]) == 2
    assert "name the folder of these images' feature space" in capsys.readouterr().err


def test_the_words_for_a_data_set_read_back_to_it() -> None:
    """What the model card prints as its command names the same images, less where they lie."""
    for options in ([], ["--image-size", "8"], ["--image-size", "8", "--image-channels", "1"]):
        given = vars(evaluate.build_parser().parse_args(["--data", "folder", "--data-root", "pictures", *options]))
        words = data_arguments.words(given)
        assert words == ["--data", "folder", *options]
        again = vars(evaluate.build_parser().parse_args(words))
        assert data_arguments.options_of(again) == data_arguments.options_of(given)
