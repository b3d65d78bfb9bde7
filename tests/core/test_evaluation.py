"""ddpm_core.evaluation: what is drawn and held against what; its command line end to end on real images."""

from __future__ import annotations

import contextlib
import io
import json
import math
import shutil
import statistics
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddpm_core import card, checkpoint, classifier, data, evaluate, evaluation, metrics, protocols, sampling
from ddpm_core.checkpoint import Model
from ddpm_core.noise import MAX_SEED
from ddpm_core.protocols import Protocol
from tests.networks import call_distilled, eight

CPU = torch.device("cpu")


def test_features_are_the_classifiers_own_whatever_the_batch() -> None:
    torch.manual_seed(0)
    net = classifier.Classifier(1, 10).eval()
    images = data.load("digits", Path(), train=True).images[:600]
    found, predicted = evaluation.features(net, images)
    assert found.dtype == torch.float64
    assert found.shape == (600, classifier.FEATURES)
    with torch.inference_mode():
        x = data.to_unit(images[495:505])
        torch.testing.assert_close(found[495:505], net.features(x).double(), atol=1e-5, rtol=1e-4)
        assert torch.equal(predicted[495:505], net(x).argmax(1))


def test_generate_draws_image_i_from_seed_i_alone() -> None:
    model, finished = eight(), list[int]()
    together = sampling.generate(
        model,
        CPU,
        [5, 6, 7],
        [1, None, 3],
        sampler="dpmpp_2m",
        steps=3,
        guidance_scale=2.0,
        batch_size=2,
        on_batch=finished.append,
    )
    alone = sampling.generate(model, CPU, [7], [3], sampler="dpmpp_2m", steps=3, guidance_scale=2.0)
    assert together.shape == (3, 1, 8, 8)
    assert together.dtype == torch.uint8
    assert finished == [2, 1]
    assert (together[2].int() - alone[0].int()).abs().max() <= 1  # rounding of another batch size
    other_label = sampling.generate(model, CPU, [7], [4], sampler="dpmpp_2m", steps=3, guidance_scale=2.0)
    assert not torch.equal(alone, other_label)
    unguided = sampling.generate(model, CPU, [6], [None], sampler="dpmpp_2m", steps=3)
    assert (together[1].int() - unguided[0].int()).abs().max() <= 1  # guidance is for images with a label


def test_generate_refuses() -> None:
    with pytest.raises(ValueError, match="2 seeds but 1 labels"):
        sampling.generate(eight(), CPU, [0, 1], [0], sampler="fast")
    with pytest.raises(ValueError, match=r"must be 0 \.\. 9"):
        sampling.generate(eight(), CPU, [0], [10], sampler="fast")
    with pytest.raises(ValueError, match="unconditional"):
        sampling.generate(eight(None), CPU, [0], [1], sampler="fast")
    with pytest.raises(ValueError, match="unconditional"):
        sampling.generate(eight(None), CPU, [0], [None], sampler="fast", guidance_scale=2.0)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights/tiny (untrained) and weights/digits-classifier (one epoch)."""
    root = tmp_path_factory.mktemp("evaluation")
    for name, embeds in (("tiny", 11), ("unconditional", None)):
        model = eight(embeds)
        checkpoint.save_model(root / "weights" / name, model.net.state_dict(), model.config, model.scheduler)
    training = {"recipe": {"lr": 0.002}, "images_seen": 0}
    checkpoint.write_atomically(root / "weights" / "tiny" / "training.json", checkpoint.to_json(training))
    out = str(root / "weights" / "digits-classifier")
    with contextlib.redirect_stdout(io.StringIO()):
        assert classifier.main(["--data", "digits", "--epochs", "1", "--out", out]) == 0
    return root


@pytest.fixture
def inside(workplace: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(workplace)
    return workplace


def run_cli(capsys: pytest.CaptureFixture[str], *options: str, name: str = "tiny") -> dict[str, Any]:
    arguments = [
        "--model",
        f"weights/{name}",
        "--data",
        "digits",
        "--samples",
        "100",
        "--sampler",
        "fast",
        "--repeats",
        "2",
    ]
    assert evaluate.main([*arguments, "--device", "cpu", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_a_distilled_model_is_measured_in_its_own_way_and_has_no_likelihood(
    inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    directory = inside / "weights" / "student"
    shutil.copytree(inside / "weights" / "tiny", directory)
    call_distilled(directory)
    found = run_cli(capsys, "--card", "--sampler", "balanced", name="student")
    assert found["sampling"] == {
        "sampler": "balanced",
        "method": "ddim",
        "steps": 2,
        "nfe": 2,
        "guidance_scale": 1.0,
        "seed": 0,
    }
    assert not any("bits_per_dimension" in found[part] for part in ("metrics", "floor"))
    text = (directory / "README.md").read_text()
    assert "distilled: trained to draw by DDIM with 2 steps" in text
    assert "scheduler.set_timesteps(2)" in text
    assert "its per dimension" not in text
    assert evaluate.main(["--model", "weights/student", "--data", "digits", "--samples", "100", "--steps", "10"]) == 2
    assert "steps=10 must be 2" in capsys.readouterr().err


def test_command_line_end_to_end(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_cli(capsys, "--card")
    model_dir = inside / "weights" / "tiny"
    assert found == json.loads((model_dir / "card.json").read_text())
    assert found["model"]["sha256"] == checkpoint.sha256_of(model_dir / "unet" / checkpoint.WEIGHTS_NAME)
    classifier_path = inside / "weights" / "digits-classifier" / "classifier.safetensors"
    assert found["classifier_sha256"] == checkpoint.sha256_of(classifier_path)
    assert found["reference"] == {"train_images": 1437, "test_images": 360}
    for entries in (found["metrics"], found["floor"]):
        assert all(entry["samples"] > 0 for entry in entries.values())
        assert all(0 <= entries[share]["value"] <= 1 for share in ("label_accuracy", "precision", "recall"))
    assert found["metrics"]["fid"]["value"] > found["floor"]["fid"]["value"] > 0  # an untrained network draws noise
    for name in ("fid", "kid", "precision", "recall", "label_accuracy", "nearest_train_distance", "near_copies"):
        drawn, real = found["metrics"][name], found["floor"][name]
        assert (drawn["seeds"], drawn["samples"]) == (2, 100)
        assert drawn["spread"] >= 0
        near = name in ("nearest_train_distance", "near_copies")
        assert (real["sets"], real["samples"]) == ((1, 360) if near else (5, 100)), name
        assert (real["spread"] is None) == near
    assert found["metrics"]["kid"]["value"] > 10 * abs(found["floor"]["kid"]["value"])
    assert found["floor"]["near_copies"]["value"] == pytest.approx(0.01, abs=0.002)
    for bound in (found["metrics"]["bits_per_dimension"], found["floor"]["bits_per_dimension"]):
        assert (bound["samples"], bound["calls"]) == (20, 10)
        assert bound["value"] > bound["standard_error"] > 0
    ratio = found["metrics"]["fid"]["value"] / found["floor"]["fid"]["value"]
    assert found["metrics"]["fid_over_floor"]["value"] == pytest.approx(ratio)
    assert found["metrics"]["class_balance"]["samples"] == sum(found["metrics"]["class_balance"]["counts"]) == 40
    assert found["sampling"] == {
        "sampler": "fast", "method": "unipc", "steps": 3, "nfe": 3, "guidance_scale": 1.0, "seed": 0,
    }  # fmt: skip
    with Image.open(model_dir / "samples.png") as picture:
        picture.load()
        assert picture.size == (2 * (10 * 10 - 2), 2 * (10 * 10 - 2))  # ten rows, ten columns, scaled by 2
    assert found["training"] == {"recipe": {"lr": 0.002}, "images_seen": 0}
    readme = (model_dir / "README.md").read_text()
    assert readme == card.readme(found)
    assert "1. lr 0.002" in readme
    assert "the floor" in readme


def test_command_line_repeats_its_figures_and_counts_guidance(capsys: pytest.CaptureFixture[str], inside: Path) -> None:
    first, again = (run_cli(capsys, "--steps", "2", "--guidance-scale", "1.5") for _ in range(2))
    assert first["sampling"]["nfe"] == 4
    assert (first["metrics"], first["floor"]) == (again["metrics"], again["floor"])
    assert "--card" not in first["command"]
    assert "--steps 2 --guidance-scale 1.5" in first["command"]


def test_command_line_measures_an_unconditional_model(capsys: pytest.CaptureFixture[str], inside: Path) -> None:
    found = run_cli(capsys, "--card", name="unconditional")
    assert "label_accuracy" not in found["metrics"]
    assert "label_accuracy" in found["floor"]
    readme = (inside / "weights" / "unconditional" / "README.md").read_text()
    assert "Not recorded." in readme
    assert "unconditional, prediction" in " ".join(readme.split())


@pytest.mark.parametrize("block", [0, 1])
def test_the_cards_own_examples_run(block: int, inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    if block == 0:
        pytest.importorskip("diffusers")
    run_cli(capsys, "--card")
    parts = (inside / "weights" / "tiny" / "README.md").read_text().split("```python\n")[1:]
    names: dict[str, Any] = {}
    exec(parts[block].split("```")[0], names)
    images = names["x" if block == 0 else "images"]
    assert images.shape == (10, 1, 8, 8)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "weights/none"], "no model directory"),
        (["--classifier", "weights/none"], "cannot be read"),
        (["--data", "mnist", "--data-root", "nowhere", "--classifier", "weights/digits-classifier"], "MNIST is not"),
        (["--samples", "99"], "100 or more"),
        (["--repeats", "0"], "1 or more"),
        (["--sampler", "magic"], "not known"),
        (["--steps", "1001"], "must be 1 .. 1000"),
        (["--device", "no-such"], "no-such"),
        (["--model", "weights/unconditional", "--guidance-scale", "2"], "unconditional"),
    ],
)
def test_command_line_refuses_in_one_line(
    options: list[str], message: str, inside: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", "weights/tiny", "--data", "digits", "--samples", "100", "--device", "cpu"]
    assert evaluate.main([*arguments, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line


def test_damaged_classifier_is_refused_by_its_sha256(
    inside: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source = inside / "weights" / "digits-classifier"
    content = bytearray((source / "classifier.safetensors").read_bytes())
    content[-1] ^= 1
    (tmp_path / "classifier.safetensors").write_bytes(content)
    (tmp_path / "card.json").write_bytes((source / "card.json").read_bytes())
    assert evaluate.main(["--model", "weights/tiny", "--data", "digits", "--classifier", str(tmp_path)]) == 2
    assert "sha256" in capsys.readouterr().err


def test_what_is_drawn_and_what_the_floor_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each repeat has seeds of its own and the labels of another floor set; no training image is in two of those."""
    train, test = (data.load("digits", Path(), train=part) for part in (True, False))
    measured: list[torch.Tensor] = []
    features = evaluation.features

    def watch(net: classifier.Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        measured.append(images)
        return features(net, images)

    drawn: list[tuple[range, list[int | None]]] = []
    generate = protocols.generate

    def listen(model: Model, device: torch.device, seeds: range, labels: Any, **how: Any) -> torch.Tensor:
        drawn.append((seeds, labels))
        return generate(model, device, seeds, labels, **how)

    monkeypatch.setattr(evaluation, "features", watch)
    monkeypatch.setattr(protocols, "generate", listen)
    torch.manual_seed(0)
    net = classifier.Classifier(1, 10).eval()
    protocol = Protocol(250, "dpmpp_2m", 2, seed=7, repeats=2)
    found = evaluation.evaluate(eight(), net, train, test, protocol, CPU)
    seeds = [seed for some, _ in drawn for seed in some]
    assert seeds == list(range(7, 7 + 2 * (250 + 50)))
    by_content = {image.numpy().tobytes(): int(label) for image, label in zip(train.images, train.labels, strict=True)}
    assert len(by_content) == len(train.images)
    floor = [images for images in measured if len(images) == 250 and images[0].numpy().tobytes() in by_content]
    contents = [image.numpy().tobytes() for images in floor for image in images]
    assert len(contents) == len(set(contents)) == 1250
    assert (found.floor["fid"].sets, found.floor["fid"].samples) == (5, 250)
    labels = [by_content[content] for content in contents]
    assert [asked for _, asked in drawn] == [labels[:250], [None] * 50, labels[250:500], [None] * 50]
    reference, _ = features(net, test.images)
    fids = [metrics.frechet_distance(features(net, images)[0], reference) for images in floor]
    assert found.floor["fid"].value == pytest.approx(statistics.fmean(fids))
    assert found.floor["fid"].spread == pytest.approx(statistics.stdev(fids))
    assert (found.generated["fid"].sets, found.balance.samples) == (2, 100)


def test_a_model_that_hands_out_its_training_images_is_found_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its FID is the floor's: only the nearness to training images, and that of every image, gives it away."""
    train, test = (data.load("digits", Path(), train=part) for part in (True, False))

    def recite(_: Model, device: torch.device, seeds: range, labels: Any, **how: Any) -> torch.Tensor:
        return train.images[torch.arange(seeds.start, seeds.stop) % len(train.images)]

    monkeypatch.setattr(protocols, "generate", recite)
    torch.manual_seed(0)
    net = classifier.Classifier(1, 10).eval()
    found = evaluation.evaluate(eight(), net, train, test, Protocol(200), CPU)
    assert found.fid_over_floor < 2
    assert found.generated["near_copies"].value == 1
    assert found.generated["nearest_train_distance"].value == 0 < found.floor["nearest_train_distance"].value


def test_classifier_of_another_data_set_is_refused() -> None:
    digits = data.load("digits", Path(), train=False)
    protocol = Protocol(samples=100)
    with pytest.raises(ValueError, match="3 channels"):
        evaluation.evaluate(eight(), classifier.Classifier(3, 10).eval(), digits, digits, protocol, CPU)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"repeats": 0}, "repeats=0 must be 1 or more"),
        ({"guidance_scale": math.nan}, "must be a finite number"),
        ({"seed": -1}, "seed=-1 must be 0 or more"),
        ({"seed": MAX_SEED - 100}, "at most"),
    ],
)
def test_a_protocol_refuses_what_would_fail_after_minutes(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Protocol(samples=100, **fields)


def test_a_picture_of_many_classes_shows_the_first_of_them() -> None:
    model = eight()
    images, columns = sampling.one_row_a_class(model, CPU, columns=2, sampler="fast")
    assert (len(images), columns) == (20, 2)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "MOST_CLASSES", 3)
        assert len(sampling.one_row_a_class(model, CPU, columns=2, sampler="fast")[0]) == 6
