"""ddpm_core.evaluation against closed forms, and its command line end to end on real images."""

from __future__ import annotations

import contextlib
import io
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from ddpm_core import card, checkpoint, classifier, data, evaluate, evaluation, sampling
from ddpm_core.checkpoint import Model, SchedulerConfig
from ddpm_core.unet import UNet, UNetConfig

CPU = torch.device("cpu")


def with_moments(mean: torch.Tensor, variances: torch.Tensor) -> torch.Tensor:
    """2 F points whose mean and diagonal covariance (N - 1) are exactly these."""
    f = len(mean)
    offsets = torch.diag((variances * (2 * f - 1) / 2).sqrt())
    return mean + torch.cat([offsets, -offsets])


def test_frechet_distance_of_diagonal_covariances_is_the_hand_computed_one() -> None:
    a = with_moments(torch.tensor([0.0, 1, 2]).double(), torch.tensor([1.0, 4, 9]).double())
    b = with_moments(torch.tensor([3.0, 1, -2]).double(), torch.tensor([16.0, 1, 9]).double())
    by_hand = (9 + 0 + 16) + (1 - 4) ** 2 + (2 - 1) ** 2 + (3 - 3) ** 2  # means, then roots of the variances
    assert evaluation.frechet_distance(a, b) == pytest.approx(by_hand, abs=1e-9)


def test_frechet_distance_of_rotated_sets_is_the_same() -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.randn(50, 6, generator=generator, dtype=torch.float64) @ torch.randn(6, 6, generator=generator).double()
    b = torch.randn(60, 6, generator=generator, dtype=torch.float64) + 1
    rotation, _ = torch.linalg.qr(torch.randn(6, 6, generator=generator, dtype=torch.float64))
    distance = evaluation.frechet_distance(a, b)
    assert evaluation.frechet_distance(a @ rotation, b @ rotation) == pytest.approx(distance, rel=1e-10)


def test_frechet_distance_of_gaussian_samples_approaches_the_closed_form() -> None:
    """Correlated Gaussians that commute: the same eigenvectors, other eigenvalues, so the roots subtract."""
    generator = torch.Generator().manual_seed(1)
    vectors, _ = torch.linalg.qr(torch.randn(5, 5, generator=generator, dtype=torch.float64))
    std_a, std_b = torch.tensor([1.0, 2, 3, 0.5, 1]).double(), torch.tensor([2.0, 1, 3, 1, 4]).double()
    mean = torch.tensor([1.0, 0, -1, 0, 2]).double()
    exact = float(mean.square().sum() + (std_a - std_b).square().sum())

    def error(n: int) -> float:
        z_a, z_b = torch.randn(2, n, 5, generator=generator, dtype=torch.float64)
        found = evaluation.frechet_distance((z_a * std_a) @ vectors.T, (z_b * std_b) @ vectors.T + mean)
        return abs(found - exact)

    assert error(200_000) < 0.15
    assert error(200_000) < error(200)


def test_frechet_distance_is_symmetric_and_zero_of_equal_sets() -> None:
    generator = torch.Generator().manual_seed(2)
    a, b = torch.randn(2, 300, 20, generator=generator, dtype=torch.float64)
    assert evaluation.frechet_distance(a, b) == pytest.approx(evaluation.frechet_distance(b, a), rel=1e-9)
    assert 0 <= evaluation.frechet_distance(a, a) < 1e-9
    assert 0 <= evaluation.frechet_distance(a[:5], a[:5]) < 1e-4  # fewer images than features: singular


@pytest.mark.parametrize(
    ("a", "b"), [((1, 3), (5, 3)), ((5, 3), (1, 3)), ((5, 3), (5, 4)), ((5,), (5, 1)), ((0, 3), (5, 3))]
)
def test_frechet_distance_refuses(a: tuple[int, ...], b: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must be|at least 2"):
        evaluation.frechet_distance(torch.ones(a), torch.ones(b))


def test_class_balance_of_known_counts() -> None:
    balance = evaluation.class_balance(torch.tensor([0, 0, 0, 1, 1, 2]), 4)
    assert balance.counts == (3, 2, 1, 0)
    assert balance.samples == 6
    assert (balance.rarest_share, balance.commonest_share) == (0, 0.5)
    assert balance.chi_square == pytest.approx((1.5**2 + 0.5**2 + 0.5**2 + 1.5**2) / 1.5)
    assert balance.degrees_of_freedom == 3


def test_class_balance_against_other_shares() -> None:
    balance = evaluation.class_balance(torch.tensor([0, 0, 0, 1]), 2, torch.tensor([30, 10]))
    assert balance.chi_square == pytest.approx(0)
    assert math.isclose(balance.commonest_share, 0.75)


@pytest.mark.parametrize(
    ("labels", "classes", "shares"), [([], 3, None), ([3], 3, None), ([-1], 3, None), ([0], 1, None), ([0], 2, [1, 0])]
)
def test_class_balance_refuses(labels: list[int], classes: int, shares: list[int] | None) -> None:
    with pytest.raises(ValueError, match=r"labels|shares"):
        evaluation.class_balance(
            torch.tensor(labels, dtype=torch.long), classes, None if shares is None else torch.tensor(shares)
        )


def tiny(num_class_embeds: int | None = 11) -> tuple[UNetConfig, SchedulerConfig]:
    unet = UNetConfig(
        sample_size=8, in_channels=1, out_channels=1, block_out_channels=(8,), layers_per_block=1,
        down_block_types=("DownBlock2D",), up_block_types=("UpBlock2D",), norm_num_groups=4, add_attention=False,
        num_class_embeds=num_class_embeds,
    )  # fmt: skip
    return unet, SchedulerConfig(prediction_type="v_prediction", timestep_spacing="trailing")


def tiny_model(num_class_embeds: int | None = 11) -> Model:
    unet, scheduler = tiny(num_class_embeds)
    torch.manual_seed(0)
    net = UNet(unet).eval().requires_grad_(False)
    for parameter in net.parameters():
        if not parameter.any():  # layers that start at zero would hide the label
            parameter.normal_(std=0.2)
    return Model("tiny", "-", net, scheduler, scheduler.schedule())


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
    model, finished = tiny_model(), list[int]()
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
        sampling.generate(tiny_model(), CPU, [0, 1], [0], sampler="fast")
    with pytest.raises(ValueError, match=r"must be 0 \.\. 9"):
        sampling.generate(tiny_model(), CPU, [0], [10], sampler="fast")
    with pytest.raises(ValueError, match="unconditional"):
        sampling.generate(tiny_model(None), CPU, [0], [1], sampler="fast")
    with pytest.raises(ValueError, match="unconditional"):
        sampling.generate(tiny_model(None), CPU, [0], [None], sampler="fast", guidance_scale=2.0)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with weights/tiny (untrained) and weights/digits-classifier (one epoch)."""
    root = tmp_path_factory.mktemp("evaluation")
    for name, embeds in (("tiny", 11), ("unconditional", None)):
        checkpoint.save_model(root / "weights" / name, tiny_model(embeds).net.state_dict(), *tiny(embeds))
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
    arguments = ["--model", f"weights/{name}", "--data", "digits", "--samples", "100", "--sampler", "fast"]
    assert evaluate.main([*arguments, "--device", "cpu", *options]) == 0
    found: dict[str, Any] = json.loads(capsys.readouterr().out.splitlines()[-1])
    return found


def test_command_line_end_to_end(inside: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = run_cli(capsys, "--card")
    model_dir = inside / "weights" / "tiny"
    assert found == json.loads((model_dir / "card.json").read_text())
    assert found["model"]["sha256"] == checkpoint.sha256_of(model_dir / "unet" / checkpoint.WEIGHTS_NAME)
    classifier_path = inside / "weights" / "digits-classifier" / "classifier.safetensors"
    assert found["classifier_sha256"] == checkpoint.sha256_of(classifier_path)
    for entries in (found["metrics"], found["floor"]):
        assert all(entry["samples"] > 0 for entry in entries.values())
        assert 0 <= entries["label_accuracy"]["value"] <= 1
    assert found["metrics"]["fid"]["value"] > found["floor"]["fid"]["value"] > 0  # an untrained network draws noise
    ratio = found["metrics"]["fid"]["value"] / found["floor"]["fid"]["value"]
    assert found["metrics"]["fid_over_floor"]["value"] == pytest.approx(ratio)
    assert found["metrics"]["class_balance"]["samples"] == sum(found["metrics"]["class_balance"]["counts"]) == 20
    assert found["sampling"] == {
        "sampler": "fast", "method": "dpmpp_2m", "steps": 5, "nfe": 5, "guidance_scale": 1.0, "seed": 0,
    }  # fmt: skip
    with Image.open(model_dir / "samples.png") as picture:
        picture.load()
        assert picture.size == (2 * (10 * 10 - 2), 2 * (10 * 10 - 2))  # ten rows, ten columns, scaled by 2
    assert found["training"] == {"recipe": {"lr": 0.002}, "images_seen": 0}
    readme = (model_dir / "README.md").read_text()
    assert readme == card.readme(found)
    assert "- recipe.lr: 0.002" in readme
    assert "the floor" in readme


def test_command_line_repeats_its_figures_and_counts_guidance(capsys: pytest.CaptureFixture[str], inside: Path) -> None:
    first, again = (run_cli(capsys, "--steps", "2", "--guidance-scale", "1.5") for _ in range(2))
    assert first["sampling"]["nfe"] == 4
    assert (first["metrics"], first["floor"]) == (again["metrics"], again["floor"])
    assert "--card" not in first["command"]
    assert "--steps 2 --guidance-scale 1.5" in first["command"]


def test_command_line_measures_an_unconditional_model(capsys: pytest.CaptureFixture[str], inside: Path) -> None:
    found = run_cli(capsys, "--card", name="unconditional")
    assert found["metrics"]["label_accuracy"]["value"] is None
    assert found["floor"]["label_accuracy"]["value"] is not None
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


def test_labels_follow_the_data_and_the_floor_is_a_mean_over_disjoint_sets(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is measured: the samples' labels are those of the floor's first set, and no training image is used twice."""
    train, test = (data.load("digits", Path(), train=part) for part in (True, False))
    seen: list[torch.Tensor] = []
    features = evaluation.features

    def watch(net: classifier.Classifier, images: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        seen.append(images)
        return features(net, images)

    asked: list[int | None] = []
    generate = evaluation.generate

    def listen(model: Model, device: torch.device, seeds: Any, labels: Any, **how: Any) -> torch.Tensor:
        asked.extend(labels)
        return generate(model, device, seeds, labels, **how)

    monkeypatch.setattr(evaluation, "features", watch)
    monkeypatch.setattr(evaluation, "generate", listen)
    torch.manual_seed(0)
    net = classifier.Classifier(1, 10).eval()
    found = evaluation.evaluate(tiny_model(), net, train, test, evaluation.Protocol(250, "fast"), CPU)
    floor = [images for images in seen if len(images) == 250 and any(torch.equal(images[0], i) for i in train.images)]
    assert (found.floor.sets, found.floor.samples) == (len(floor), 250) == (5, 250)
    by_content = {image.numpy().tobytes(): int(label) for image, label in zip(train.images, train.labels, strict=True)}
    contents = [image.numpy().tobytes() for images in floor for image in images]
    assert len(by_content) == len(train.images)
    assert len(set(contents)) == 1250
    assert asked == [by_content[content] for content in contents[:250]] + [None] * 50
    reference, _ = features(net, test.images)
    fids = [evaluation.frechet_distance(features(net, images)[0], reference) for images in floor]
    assert found.floor.fid == pytest.approx(sum(fids) / 5)


def test_classifier_of_another_data_set_is_refused() -> None:
    digits = data.load("digits", Path(), train=False)
    protocol = evaluation.Protocol(samples=100)
    with pytest.raises(ValueError, match="3 channels"):
        evaluation.evaluate(tiny_model(), classifier.Classifier(3, 10).eval(), digits, digits, protocol, CPU)
