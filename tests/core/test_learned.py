"""Learned plans: what is fitted comes nearer to the long chain, and what is read is what was written, or refused."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from ddpm_core import checkpoint, fit_plans, learned, plans, samplers, schedules, spacings
from ddpm_core.denoiser import Denoiser
from ddpm_core.learned import Form
from ddpm_core.plans import SamplingPlan
from ddpm_core.sampling import draw_noise, sample

COSINE = schedules.cosine()


def form_of(steps: int) -> Form:
    return Form(plans.dpmpp_2m, COSINE, spacings.timesteps(COSINE, steps, "trailing"))


def two_points(x_t: Tensor, t: Tensor, label: Tensor | None) -> Tensor:
    """The best x_0_hat for data at -0.8 and 0.8, every pixel for itself: far from linear."""
    abar = torch.from_numpy(COSINE.alpha_bar_at(t.double().numpy()))[:, None, None, None]
    return (0.8 * torch.tanh(0.8 * abar.sqrt() / (1 - abar) * x_t)).to(x_t.dtype)


def draw(plan: SamplingPlan, seeds: range = range(40)) -> Tensor:
    denoiser = Denoiser(two_points, "sample", clip=1.0, null_label=None)
    x = draw_noise(seeds, 0, torch.empty(0, 1, 4, 4, dtype=torch.float64))
    *_, last = sample(denoiser, plan, x, seeds)
    return last.x


def test_zeros_are_the_training_free_plan() -> None:
    form = form_of(5)
    plan, base = form.plan(np.zeros(form.size)), samplers.build(COSINE, "dpmpp_2m", 5)
    assert plan.timesteps == pytest.approx(base.timesteps)
    assert plan.b[:, :2] == pytest.approx(base.b, abs=1e-6)
    assert not plan.b[:, 2].any()
    assert plan.a == pytest.approx(base.a, abs=1e-6)


def test_every_parameter_changes_the_plan_and_none_its_ends() -> None:
    form = form_of(4)
    zero = form.plan(np.zeros(form.size))
    for unit in np.eye(form.size):
        plan = form.plan(0.1 * unit)
        assert plan.sha256 != zero.sha256
        assert plan.timesteps[0] == 999
        assert np.all(np.diff(plan.timesteps) < 0)
        assert plan.timesteps[-1] >= 0
        assert not plan.b[0, 1:].any()  # before the first call there is nothing to look back at
        assert not plan.b[1, 2:].any()


def test_a_fit_comes_nearer_to_the_long_chain_on_noise_it_has_not_seen() -> None:
    teacher = samplers.build(COSINE, "unipc", 200, spacing="log_snr")
    steps = list(learned.fit(form_of(4), draw, draw(teacher), iterations=4))
    errors = [step.error for step in steps]
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 0.6 * errors[0]
    unseen = range(1000, 1100)
    wanted = draw(teacher, unseen)
    before, after = ((draw(step.plan, unseen) - wanted).square().mean().sqrt() for step in (steps[0], steps[-1]))
    assert after < 0.8 * before


def test_a_fit_ends_where_nothing_makes_it_better() -> None:
    calls = []

    def tables(plan: SamplingPlan) -> Tensor:
        calls.append(plan)
        return torch.from_numpy(np.concatenate([plan.timesteps / 1000, plan.a.ravel(), plan.b.ravel()]))[None]

    form = form_of(3)
    steps = list(learned.fit(form, tables, tables(form.plan(np.zeros(form.size))), iterations=50))
    assert [step.iteration for step in steps] == [0, 1]
    assert len(calls) < 1 + form.size + 20


def test_what_is_written_is_read_to_the_last_bit(tmp_path: Path) -> None:
    form = form_of(3)
    plan = form.plan(np.linspace(-0.1, 0.1, form.size))
    path = tmp_path / learned.PLANS_NAME
    path.write_bytes(checkpoint.to_json(learned.to_json({3: plan}, "abc", {"images": 1})))
    (found,) = learned.load(path, "abc").values()
    assert found.sha256 == plan.sha256
    assert found.sampler == "learned"
    assert learned.load(tmp_path / "nothing.json", "abc") == {}
    with pytest.raises(learned.StalePlans, match="other weights"):
        learned.load(path, "abd")


def _rows(content: dict[str, Any]) -> Any:
    return content["plans"]["3"]


@pytest.mark.parametrize(
    "damage",
    [
        lambda c: c.pop("weights_sha256"),
        lambda c: c.update(plans=[1]),
        lambda c: _rows(c).pop("d"),
        lambda c: _rows(c).update(a=[1, 2, 3]),
        lambda c: _rows(c)["b"][0].__setitem__(0, float("nan")),
        lambda c: _rows(c)["b"].pop(),
        lambda c: _rows(c).update(b=[1, 2, 3]),
        lambda c: _rows(c).update(b=[[], [], []]),
        lambda c: _rows(c).update(a=[[1.0] * 5] * 3),
        lambda c: _rows(c).update(d=[[0.0]] * 3),
        lambda c: _rows(c).update(timesteps=3),
        lambda c: _rows(c)["timesteps"].reverse(),
        lambda c: _rows(c)["timesteps"].__setitem__(2, -1.0),
        lambda c: _rows(c)["alpha_bars"].__setitem__(1, 1.5),
        lambda c: c["plans"].update({"4": c["plans"].pop("3")}),
        lambda c: c["plans"].update({"x": c["plans"].pop("3")}),
    ],
)
def test_a_damaged_file_is_refused(tmp_path: Path, damage: Callable[[dict[str, Any]], object]) -> None:
    content = learned.to_json({3: form_of(3).plan(np.zeros(form_of(3).size))}, "abc", {})
    damage(content)
    path = tmp_path / learned.PLANS_NAME
    path.write_text(json.dumps(content))
    with pytest.raises(ValueError, match=r"."):
        learned.load(path, "abc")


def without_plans(model_dir: Path, tmp_path: Path) -> Path:
    """A copy of a model directory that has none."""
    shutil.copytree(model_dir, tmp_path / "tiny", ignore=shutil.ignore_patterns(learned.PLANS_NAME))
    return tmp_path / "tiny"


def test_the_command_fits_and_the_model_then_has_the_plans(
    model_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    directory = without_plans(model_dir, tmp_path)
    arguments = ["--model", str(directory), "--steps", "2", "3", "--teacher-steps", "8", "--images", "11"]
    assert fit_plans.main([*arguments, "--iterations", "1", "--device", "cpu"]) == 0
    figures = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(figures) == {"2", "3"}
    model = checkpoint.load_model(directory)
    assert set(model.learned) == {2, 3}
    assert model.plan("learned", 2) is model.learned[2]
    assert len(model.plan("learned")) == 3
    with pytest.raises(ValueError, match="steps=5 must be one of 2, 3 for learned"):
        model.plan("learned", 5)
    with pytest.raises(ValueError, match="pure noise"):
        model.plan("learned", 2, start=500)

    assert fit_plans.main([*arguments[:3], "4", *arguments[5:], "--iterations", "1", "--device", "cpu"]) == 0
    assert set(json.loads(capsys.readouterr().out.splitlines()[-1])) == {"2", "3", "4"}
    assert checkpoint.load_model(directory).learned[2].sha256 == model.learned[2].sha256  # those of before stay

    path = directory / learned.PLANS_NAME
    stale = {**json.loads(path.read_text()), "weights_sha256": "0" * 64}
    path.write_text(json.dumps(stale))
    with caplog.at_level(logging.WARNING):
        assert not checkpoint.load_model(directory).learned
    assert "fitted to other weights" in caplog.text
    path.write_text("{")
    with pytest.raises(checkpoint.CheckpointError, match=r"learned\.json.*fit it anew"):
        checkpoint.load_model(directory)


def test_a_model_without_plans_does_not_know_the_sampler(model_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="sampler='learned' is not known"):
        checkpoint.load_model(without_plans(model_dir, tmp_path)).plan("learned")


@pytest.mark.parametrize("arguments", [["--images", "0"], ["--steps", "1"], ["--steps", "9", "--teacher-steps", "9"]])
def test_the_command_refuses_in_one_line(
    arguments: list[str], model_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert fit_plans.main(["--model", str(model_dir), *arguments]) == 2
    assert capsys.readouterr().err.startswith("error: images and iterations must be")
