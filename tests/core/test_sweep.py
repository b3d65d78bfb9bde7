"""ddpm_core.sweep end to end on a random network: its points are evaluation's, and none is measured twice."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save

from ddpm_core import card, checkpoint, classifier, data, evaluation, sampling, sweep
from ddpm_core.protocols import asked_labels
from tests.networks import eight

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def judge(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random classifier of 8x8 digits."""
    root = tmp_path_factory.mktemp("judge")
    torch.manual_seed(0)
    content = save({k: v.contiguous() for k, v in classifier.Classifier(1, 10).state_dict().items()})
    checkpoint.write_atomically(root / "classifier.safetensors", content)
    facts = {"channels": 1, "num_classes": 10, "sha256": checkpoint.sha256_of(root / "classifier.safetensors")}
    checkpoint.write_atomically(root / "card.json", checkpoint.to_json(facts))
    return root


@pytest.fixture
def arguments(judge: Path, tmp_path: Path) -> list[str]:
    """A command line on a model directory of the test's own."""
    model = tmp_path / "tiny"
    checkpoint.save_model(model, (tiny := eight()).net.state_dict(), tiny.config, tiny.scheduler)
    common = ["--model", str(model), "--classifier", str(judge), "--data", "digits", "--device", "cpu"]
    return [*common, "--samples", "100", "--seed", "5"]


def content(arguments: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((Path(arguments[1]) / card.SWEEP).read_text())
    return found


def test_every_sampler_is_measured_at_every_nfe(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert sweep.main([*arguments, "--nfe", "2", "3", "40", "--max-nfe", "3"]) == 0
    found = content(arguments)
    names = [name for name in sweep.LINES if name != "learned"]  # this model has no learned plans
    assert [(p["nfe"], card.line_of(p)) for p in found["points"]] == [(n, name) for n in (2, 3) for name in names]
    assert found["sha256"] == checkpoint.load_model(Path(arguments[1])).sha256
    table = capsys.readouterr().out
    assert table.splitlines()[0].split() == ["|", "sampler", "|", "2", "NFE", "|", "3", "NFE", "|"]
    assert table.count("\n") == 2 + len(names)
    with Image.open(Path(arguments[1]) / card.SWEEP_PLOT) as picture:
        picture.load()
        assert min(picture.size) > 400


def test_a_point_is_what_the_evaluation_measures_of_those_images(arguments: list[str]) -> None:
    assert sweep.main([*arguments, "--nfe", "3", "--samplers", "ddim eta 0.5", "--spacing", "quadratic"]) == 0
    found = content(arguments)
    (point,) = found["points"]
    train, test = (data.load("digits", Path(), train=part) for part in (True, False))
    model, net = checkpoint.load_model(Path(arguments[1])), classifier.load(Path(arguments[3])).net
    labels = asked_labels(model, train, 100, 5)
    assert (point["sampler"], point["eta"], point["spacing"]) == ("ddim", 0.5, "quadratic")
    plan = sweep.Point("ddim", 0.5, 3, "quadratic").plan(model)
    assert plan.d[0] > 0
    images = sampling.generate(model, CPU, range(5, 105), labels, plan=plan)
    reference, _ = evaluation.features(net, test.images)
    figures = evaluation.quality(net, images, labels, reference)
    assert {key: point[key] for key in figures} == pytest.approx(figures, rel=1e-6)
    floor = evaluation.floor(net, train, 100, 5, reference)
    assert found["floor"]["fid"]["value"] == pytest.approx(floor["fid"].value)
    assert card.line_of(point) == "ddim eta 0.5, quadratic"


def test_a_stopped_sweep_goes_on_and_measures_nothing_twice(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    generate, calls = sampling.generate, list[int]()

    def stop_at_the_third(*given: Any, plan: Any, **how: Any) -> torch.Tensor:
        calls.append(len(plan))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*given, plan=plan, **how)

    monkeypatch.setattr(sampling, "generate", stop_at_the_third)
    asked = [*arguments, "--nfe", "3", "2", "--samplers", "ddim", "dpmpp_2m"]
    assert sweep.main(asked) == 130
    assert "the same command goes on" in capsys.readouterr().err
    first = content(arguments)
    assert [(p["sampler"], p["nfe"]) for p in first["points"]] == [("ddim", 2), ("dpmpp_2m", 2)]
    assert (Path(arguments[1]) / card.SWEEP_PLOT).is_file()
    assert sweep.main(asked) == 0
    assert calls == [2, 2, 3, 3, 3]
    assert content(arguments)["points"][:2] == first["points"]
    assert sweep.main(asked) == 0
    assert len(calls) == 5


def test_points_of_other_images_or_weights_are_not_mixed(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*arguments, "--nfe", "2", "--samplers", "ddim"]
    assert sweep.main(asked) == 0
    kept = content(arguments)
    assert sweep.main([*asked, "--seed", "6"]) == 2
    assert "was measured with seed 5, this sweep has 6" in capsys.readouterr().err
    model = checkpoint.load_model(Path(arguments[1]))
    weights = {name: value + 1e-3 for name, value in model.net.state_dict().items()}
    checkpoint.save_model(Path(arguments[1]), weights, model.config, model.scheduler)
    assert sweep.main(asked) == 2
    assert "measured with sha256" in capsys.readouterr().err
    assert content(arguments) == kept
    assert card.read_sweep(Path(arguments[1]), kept["sha256"]) == kept
    assert card.read_sweep(Path(arguments[1]), checkpoint.load_model(Path(arguments[1])).sha256) is None
    assert card.read_sweep(Path(arguments[3]), kept["sha256"]) is None


def test_other_data_of_the_same_name_are_noticed(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*arguments, "--nfe", "2", "--samplers", "ddim"]
    assert sweep.main(asked) == 0
    facts = data.ImageSet.facts
    monkeypatch.setattr(data.ImageSet, "facts", lambda images: {**facts(images), "sha256": "0"})
    assert sweep.main(asked) == 2
    assert "was measured with data_sha256" in capsys.readouterr().err


def test_a_sweep_that_measured_nothing_is_none(
    arguments: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    asked = [*arguments, "--nfe", "2", "--samplers", "ddim"]

    def stop(*given: Any, **how: Any) -> torch.Tensor:
        raise KeyboardInterrupt

    with monkeypatch.context() as stopped:
        stopped.setattr(sampling, "generate", stop)
        assert sweep.main(asked) == 130
    found = content(arguments)
    assert found["floor"] is not None
    assert not found["points"]
    assert card.read_sweep(Path(arguments[1]), found["sha256"]) is None
    assert sweep.main([*asked, "--seed", "6"]) == 0
    assert content(arguments)["seed"] == 6


def test_points_that_a_schedule_does_not_allow_are_left_out(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    """A chain that begins at alpha_bar = 0 has no eps there, which iPNDM wants."""
    model = checkpoint.load_model(Path(arguments[1]))
    betas = (*np.linspace(1e-3, 0.2, model.schedule.num_train_steps - 1), 1.0)
    scheduler = dataclasses.replace(model.scheduler, trained_betas=betas, prediction_type="v_prediction")
    checkpoint.save_model(Path(arguments[1]), model.net.state_dict(), model.config, scheduler)
    assert sweep.main([*arguments, "--nfe", "2", "--samplers", "ipndm", "ddim"]) == 0
    assert [p["sampler"] for p in content(arguments)["points"]] == ["ddim"]
    assert "left out: ipndm, 2 NFE" in capsys.readouterr().err
    assert sweep.main([*arguments, "--nfe", "2", "--samplers", "ipndm"]) == 2


def test_the_spacing_is_the_models_own_where_none_is_asked(arguments: list[str]) -> None:
    model = checkpoint.load_model(Path(arguments[1]))
    scheduler = dataclasses.replace(model.scheduler, timestep_spacing="leading", steps_offset=1)
    checkpoint.save_model(Path(arguments[1]), model.net.state_dict(), model.config, scheduler)
    model = checkpoint.load_model(Path(arguments[1]))
    total = str(model.schedule.num_train_steps)
    assert sweep.main([*arguments, "--nfe", "3", total, "--samplers", "ddim"]) == 0
    point, whole = content(arguments)["points"]
    assert point["spacing"] == whole["spacing"] == "leading"
    assert card.line_of(point) == card.line_of(whole)  # one curve
    assert point["plan_sha256"] == model.plan("ddim", 3).sha256


def test_a_card_of_another_format_costs_no_points(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    (Path(arguments[1]) / "card.json").write_text('{"model": {"sha256": "-"}}')
    assert sweep.main([*arguments, "--nfe", "2", "--samplers", "ddim"]) == 2
    assert "renew it with" in capsys.readouterr().err
    assert len(content(arguments)["points"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--samples", "99"], "100 or more"),
        (["--nfe", "0"], "must be 1"),
        (["--nfe", "2000"], "nothing to measure"),
        (["--nfe", "3", "--samplers", "learned"], "learned plans have no steps here"),
        (["--seed", "-1"], "must be 0"),
        (["--data", "digits", "--model", "nowhere"], "no model directory"),
    ],
)
def test_command_line_refuses_in_one_line(
    options: list[str], message: str, arguments: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    assert sweep.main([*arguments, *options]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert message in line
