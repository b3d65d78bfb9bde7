"""python -m ddpm_core.average: weights between two models, and whose they were."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
import torch

from ddpm_core import average, card, checkpoint
from ddpm_core.unet import UNet
from tests.networks import eight


def written(path: Path, seed: int, **fields: object) -> Path:
    """A random network of 8x8 images in a model directory."""
    model = eight()
    torch.manual_seed(seed)
    net = UNet(model.config)
    for parameter in net.parameters():
        torch.nn.init.normal_(parameter)
    checkpoint.save_model(path, net.state_dict(), model.config, dataclasses.replace(model.scheduler, **fields))
    checkpoint.write_atomically(path / "training.json", checkpoint.to_json({"steps_done": seed}))
    return path


def test_the_average_lies_between_and_says_of_what_it_is(tmp_path: Path) -> None:
    a, b, out = written(tmp_path / "a", 1), written(tmp_path / "b", 2), tmp_path / "out"
    assert average.main([str(a), str(b), "--share", "0.25", "--out", str(out)]) == 0
    first, second, found = (checkpoint.load_model(path).net.state_dict() for path in (a, b, out))
    for name, tensor in found.items():
        torch.testing.assert_close(tensor, 0.75 * first[name] + 0.25 * second[name])
    sha256s = [checkpoint.load_model(path).sha256[:12] for path in (a, b)]
    lines = card.history(json.loads((out / "training.json").read_text()))
    assert lines == [
        "steps_done 1",
        "steps_done 2",
        f"the average of weights: 0.75 of {sha256s[0]} and 0.25 of {sha256s[1]}",
    ]


def test_what_does_not_go_together_is_refused_in_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, other = written(tmp_path / "a", 1), written(tmp_path / "b", 2), written(tmp_path / "c", 3, beta_end=0.5)
    for arguments, message in [
        ([a, other, "--share", 0.5, "--out", tmp_path / "out"], "not of one network and schedule"),
        ([a, b, "--share", 1.5, "--out", tmp_path / "out"], "must be 0 .. 1"),
        ([a, b, "--share", "nan", "--out", tmp_path / "out"], "must be 0 .. 1"),
        ([a, b, "--share", 0.5, "--out", a], "already holds a model"),
        ([a, tmp_path / "nowhere", "--share", 0.5, "--out", tmp_path / "out"], "no model directory"),
    ]:
        assert average.main([str(argument) for argument in arguments]) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert line.startswith("error: ")
        assert message in line
    assert not (tmp_path / "out").exists()


def test_a_flat_model_is_not_written_over(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    a, b, flat = written(tmp_path / "a", 1), written(tmp_path / "b", 2), tmp_path / "flat"
    flat.mkdir()
    (flat / "model_index.json").write_text("{}")
    assert average.main([str(a), str(b), "--share", "0.5", "--out", str(flat)]) == 2
    assert "already holds a model" in capsys.readouterr().err
    assert not (flat / "unet").exists()
