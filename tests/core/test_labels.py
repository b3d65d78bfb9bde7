"""Networks that take labels and know no "no label", as diffusers trains them; dynamic thresholding."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from ddpm_core import (
    card,
    checkpoint,
    classifier,
    data,
    evaluate,
    evaluation,
    fit_plans,
    protocols,
    sampling,
    train,
    trajectories,
)
from ddpm_core.checkpoint import Model
from ddpm_core.denoiser import Denoiser, Thresholding
from ddpm_core.likelihood import bits_per_dimension
from ddpm_core.protocols import Protocol
from tests.networks import eight

CPU = torch.device("cpu")
ALL = 'knows no "no label"'


@pytest.fixture
def needy() -> Model:
    """Ten classes, each of them real."""
    return eight(10, no_label=False)


def one_label(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    assert label is not None
    return label[:, None, None, None].expand_as(x_t).to(x_t) / 10


def test_a_denoiser_passes_the_labels_on_and_refuses_to_do_without() -> None:
    denoiser = Denoiser(one_label, "sample", None, None, needs_label=True)
    x, t, abar = torch.zeros(2, 1, 2, 2), torch.zeros(2), torch.full((2,), 0.5, dtype=torch.float64)
    labels, off = torch.tensor([3, 9]), torch.ones(2)
    for guidance in (None, off):
        assert denoiser(x, t, abar, labels, guidance).flatten(1).mean(1).tolist() == pytest.approx([0.3, 0.9])
    with pytest.raises(ValueError, match=f"{ALL}: every row needs one"):
        denoiser(x, t, abar)
    with pytest.raises(ValueError, match=f"{ALL}: it takes no guidance"):
        denoiser(x, t, abar, labels, torch.tensor([1.0, 2.0]))


def test_images_of_every_class_are_drawn_the_last_too(needy: Model) -> None:
    labels = list(range(10))
    images = sampling.generate(needy, CPU, [0] * 10, labels, sampler="fast")
    assert len({image.numpy().tobytes() for image in images}) == 10
    alone = sampling.generate(needy, CPU, [0], [9], sampler="fast")
    assert (alone[0].int() - images[9].int()).abs().max() <= 1  # rounding of another batch size
    picture, columns = sampling.one_row_a_class(needy, CPU, columns=2, sampler="fast")
    assert (len(picture), columns) == (20, 2)
    assert torch.equal(picture[18], sampling.generate(needy, CPU, [18], [9], sampler="fast")[0])


@pytest.mark.parametrize("how", [{"labels": [1, None]}, {"labels": [1, 2], "guidance_scale": 2.0}])
def test_an_image_without_a_label_and_guidance_are_refused(needy: Model, how: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{ALL}: every image needs a label, and there is no guidance"):
        sampling.generate(needy, CPU, [0, 1], **how, sampler="fast")


def test_a_label_beyond_the_classes_is_refused(needy: Model) -> None:
    with pytest.raises(ValueError, match=r"label=10 must be 0 \.\. 9"):
        sampling.generate(needy, CPU, [0], [10], sampler="fast")


def test_its_evaluation_asks_for_labels_everywhere(needy: Model, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where other models draw without a label it gets those of training images: the same marginal distribution."""
    train_images, test_images = (data.load("digits", Path(), train=part) for part in (True, False))
    asked: list[list[int | None]] = []
    generate = protocols.generate

    def listen(model: Model, device: torch.device, seeds: range, labels: Any, **how: Any) -> Tensor:
        asked.append(list(labels))
        return generate(model, device, seeds, labels, **how)

    monkeypatch.setattr(protocols, "generate", listen)
    torch.manual_seed(0)
    net, protocol = classifier.Classifier(1, 10).eval(), Protocol(100, "dpmpp_2m", 2, repeats=2)
    found = evaluation.evaluate(needy, net, train_images, test_images, protocol, CPU)
    assert [len(labels) for labels in asked] == [100, 20, 100, 20]
    assert not any(None in labels for labels in asked)
    assert asked[1] != asked[3]
    assert "label_accuracy" in found.generated
    assert found.test_bound is not None
    with pytest.raises(ValueError, match=f"{ALL}: it takes no guidance"):
        evaluation.evaluate(needy, net, train_images, test_images, Protocol(100, guidance_scale=2.0, steps=2), CPU)
    with pytest.raises(ValueError, match="tiny has 9 classes, digits 10"):
        evaluation.check_fit(eight(9, no_label=False), net, test_images)


def test_its_card_does_not_speak_of_no_label(needy: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    checkpoint.save_model(Path("weights/needy"), needy.net.state_dict(), needy.config, needy.scheduler)
    assert checkpoint.load_model(Path("weights/needy")).needs_label
    classifier.main(["--data", "digits", "--epochs", "1", "--out", "weights/digits-classifier"])
    arguments = ["--model", "weights/needy", "--data", "digits", "--samples", "100", "--sampler", "fast"]
    assert evaluate.main([*arguments, "--repeats", "2", "--device", "cpu", "--card"]) == 0
    text = Path("weights/needy/README.md").read_text()
    assert "class-conditional, 10 classes, prediction type" in text
    assert "no label" not in text
    assert "images drawn with labels of training images" in text
    assert card.readme(json.loads(Path("weights/needy/card.json").read_text())) == text


def test_chains_and_plans_are_fitted_to_its_real_labels_alone(needy: Model) -> None:
    labels = trajectories.labels_of(needy, range(8, 13))
    assert labels is not None
    assert labels.tolist() == [8, 9, 0, 1, 2]
    network, seeds = needy.network(CPU), range(12)
    plan = needy.plan("ddim", 2)
    images = fit_plans.draw(needy, network, CPU, seeds, plan)
    wanted = sampling.generate(needy, CPU, seeds, [i % 10 for i in seeds], plan=plan)
    assert torch.equal(data.to_uint8(images), wanted)


def test_its_likelihood_is_of_images_with_labels(needy: Model) -> None:
    images = data.load("digits", Path(), train=False)
    assert bits_per_dimension(needy, CPU, images.images[:4], images.labels[:4], calls=2).samples == 4
    with pytest.raises(ValueError, match=f"{ALL}: every row needs one"):
        bits_per_dimension(needy, CPU, images.images[:4], None, calls=2)


def test_training_does_not_start_from_it(needy: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What is trained here knows "no label", which it would have to learn from nothing."""
    checkpoint.save_model(tmp_path / "needy", needy.net.state_dict(), needy.config, needy.scheduler)
    arguments = ["--data", "digits", "--init", str(tmp_path / "needy"), "--out", str(tmp_path / "out"), "--steps", "1"]
    assert train.main([*arguments, "--device", "cpu"]) != 0
    assert f"{tmp_path / 'needy'} {ALL}" in capsys.readouterr().err


# Thresholding


def test_thresholding_brings_the_quantile_of_each_image_to_one() -> None:
    """Saharia et al. 2022: s is that quantile of |x_0_hat|, at least 1; +-s becomes +-1 and the rest is in between."""
    x = torch.linspace(-4, 4, 101, dtype=torch.float64).reshape(1, 1, 1, 101)
    got = Thresholding(0.5, 10.0)(torch.cat([x, x / 8]))
    assert got[0].flatten().tolist() == pytest.approx((x / 2).clamp(-1, 1).flatten().tolist())
    assert torch.equal(got[1], x[0] / 8)
    assert torch.equal(Thresholding(0.5, 1.5)(x), x.clamp(-1.5, 1.5) / 1.5)


def test_a_row_is_thresholded_the_same_whatever_its_neighbours_are() -> None:
    x = 3 * torch.randn(5, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    x[3] = torch.nan
    threshold = Thresholding(0.995, 2.0)
    together = threshold(x)
    for row in (0, 1, 2, 4):
        assert torch.equal(together[row], threshold(x[row : row + 1])[0])
    assert together[3].isnan().all()
