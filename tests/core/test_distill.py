"""Distillation: the chains, the loss against closed forms, and the command from a teacher to a model that is served."""

from __future__ import annotations

import dataclasses
import errno
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

import ddpm_core
from ddpm_core import (
    average,
    checkpoint,
    data,
    diffusion,
    distill,
    fit_plans,
    sampling,
    schedules,
    sweep,
    train,
    trajectories,
)
from ddpm_core.checkpoint import WEIGHTS_NAME, Model, load_model
from ddpm_core.diffusion import Prediction
from ddpm_core.plans import SamplingPlan
from ddpm_core.recipe import Recipe
from ddpm_core.scheduler_config import SchedulerConfig
from ddpm_core.trajectories import Chains, TrajectoryLoss
from tests.core import disk
from tests.networks import eight

CPU = torch.device("cpu")
SCHEDULE = schedules.cosine(100)
COMMON = ["--chains", "640", "--teacher-nfe", "6", "--device", "cpu", "--no-compile", "--no-bf16"]
WEIGHTS = Path("model/unet") / WEIGHTS_NAME


def nothing(count: int) -> None:
    """Listens to progress."""


def draw(model: Model, which: Chains, folder: Path, on_batch: Callable[[int], object] = nothing) -> Tensor:
    return trajectories.draw(model, model.network(CPU), CPU, which, folder, on_batch)


# The chains


@pytest.mark.parametrize(("nfe", "teacher_nfe"), [(1, 4), (2, 10), (3, 9), (4, 12), (5, 35)])
def test_student_and_teacher_meet_at_the_student_s_timesteps(nfe: int, teacher_nfe: int) -> None:
    student, teacher = Chains(1, nfe, teacher_nfe).plans(schedules.cosine(1000))
    assert (len(student), len(teacher)) == (nfe, teacher_nfe)
    assert set(student.timesteps) <= set(teacher.timesteps)
    assert student.timesteps[0] == teacher.timesteps[0] == 999


@pytest.mark.parametrize(
    ("numbers", "reason"), [((0, 2, 10), "chains=0"), ((1, 0, 10), "nfe=0"), ((1, 2, 5), "multiple"), ((1, 2, 2), "mu")]
)
def test_other_chains_cannot_be(numbers: tuple[int, int, int], reason: str) -> None:
    with pytest.raises(ValueError, match=reason):
        Chains(*numbers)


def test_a_student_that_rounding_keeps_from_its_teacher_s_timesteps_is_refused() -> None:
    with pytest.raises(ValueError, match="has not all timesteps of nfe=16"):
        Chains(1, 16, 48).plans(schedules.cosine(1000))


@pytest.mark.parametrize("num_class_embeds", [11, None])
def test_chains_begin_with_their_noise_pass_where_the_teacher_does_and_end_in_its_images(
    tmp_path: Path, num_class_embeds: int | None
) -> None:
    model = eight(num_class_embeds)
    which = Chains(13, 2, 6)
    chains = draw(model, which, tmp_path)
    assert chains.shape == (13, 3, 1, 8, 8)
    assert len(chains[:, 0].unique(dim=0)) == 13
    seeds = range(trajectories.FIRST_SEED, trajectories.FIRST_SEED + 13)
    labels = trajectories.labels_of(model, range(13))
    asked: list[int | None] = [None] * 13
    if labels is not None:
        assert labels.tolist() == [*range(11), 0, 1]  # 10 is "no label"
        asked = [None if label == 10 else label for label in labels.tolist()]
    images = sampling.generate(model, CPU, seeds, asked, sampler="dpmpp_2m", steps=6)
    assert torch.equal(data.to_uint8(chains[:, 2]), images)
    steps = list(sampling.sample(model.denoiser(model.network(CPU)), model.plan("dpmpp_2m", 6), chains[:, 0], seeds,
                                 labels=labels))  # fmt: skip
    assert torch.allclose(chains[:, 1], steps[2].x, atol=1e-6)


def test_chains_are_drawn_once_a_file_and_anew_where_a_file_is_damaged_or_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trajectories, "FILE_CHAINS", 8)
    model, which, drawn = eight(), Chains(20, 2, 4), list[int]()
    original = trajectories._draw

    def counting(*args: object) -> Tensor:
        drawn.append(len(args[-1]))  # type: ignore[arg-type]
        return original(*args)  # type: ignore[arg-type]

    monkeypatch.setattr(trajectories, "_draw", counting)
    told: list[int] = []
    first = draw(model, which, tmp_path, told.append)
    files = sorted(tmp_path.iterdir())
    assert (len(files), drawn, sum(told)) == (3, [8, 8, 4], 20)
    files[0].unlink()
    files[1].write_bytes(files[1].read_bytes()[:-5])
    drawn.clear()
    assert torch.equal(draw(model, which, tmp_path, told.append), first)
    assert (drawn, sum(told)) == ([8, 8], 40)
    drawn.clear()
    assert not torch.equal(draw(model, Chains(20, 2, 8), tmp_path), first)
    assert torch.equal(draw(model, which, tmp_path), first)
    other = dataclasses.replace(model, sha256="other")  # the same network by another name: drawn anew, and the same
    assert torch.equal(draw(other, which, tmp_path), first)
    assert drawn == [8, 8, 4] * 3


# The loss


class Point:
    """A network that knows the one image that there is, 0.25 everywhere, but for an error in x_0 at each timestep."""

    def __init__(self, prediction: Prediction, errors: dict[float, float]) -> None:
        self.prediction, self.errors = prediction, errors

    def __call__(self, x: Tensor, t: Tensor) -> Tensor:
        abar = SCHEDULE.alpha_bar_at(t.numpy().astype(float))
        x_0 = torch.full_like(x, 0.25 + self.errors[float(t[0])])
        alpha_bar = torch.from_numpy(abar)
        return diffusion.target(self.prediction, x_0, diffusion.to_eps(x_0, x, alpha_bar), alpha_bar)


def loss_of(prediction: Prediction, errors: tuple[float, ...]) -> tuple[float, SamplingPlan]:
    """Of a network with these errors, one a call, held to chains that go straight to the image."""
    plan, _ = Chains(16, len(errors), 2 * len(errors)).plans(SCHEDULE)
    eps = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    chains = torch.stack(
        [diffusion.q_sample(torch.full_like(eps, 0.25), eps, abar) for abar in (*plan.alpha_bars, 1.0)], 1
    )
    net = Point(prediction, dict(zip(map(float, plan.timesteps), errors, strict=True)))
    loss = TrajectoryLoss(chains, None, plan, prediction, Recipe(steps=1, batch_size=8), device=CPU)
    return float(loss(net, 0)), plan


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_who_follows_the_teacher_has_no_loss_but_the_softening(prediction: Prediction) -> None:
    assert loss_of(prediction, (0.0, 0.0, 0.0))[0] == pytest.approx(3 * trajectories.SOFTEN, rel=1e-3)


@pytest.mark.parametrize("prediction", ["sample", "v_prediction"])
def test_errors_count_in_units_of_x_0_and_again_where_they_have_moved_x(prediction: Prediction) -> None:
    """Three calls that say x_0 + d: after them x is off by b_1 d_1, then a_2 b_1 d_1 + b_2 d_2, and in the end d_3."""
    d = (0.1, 0.2, 0.4)
    loss, plan = loss_of(prediction, d)
    a, b = plan.a[:, 0], plan.b[:, 0]
    counted = (d[0], a[1] * b[0] / b[1] * d[0] + d[1], d[2])
    assert loss == pytest.approx(sum((c**2 + trajectories.SOFTEN**2) ** 0.5 for c in counted), rel=1e-3)
    assert counted[1] > 1.05 * d[1]


def test_later_calls_teach_earlier_ones() -> None:
    """Of a network whose second answer is its input, the second difference has a gradient to the first call too."""
    which = Chains(4, 2, 4)
    plan, _ = which.plans(SCHEDULE)
    first = torch.tensor(0.0, requires_grad=True)

    def network(x: Tensor, t: Tensor) -> Tensor:
        return x * 0 + first if float(t[0]) == float(plan.timesteps[0]) else x

    x_t = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    mid = float(plan.a[0, 0]) * x_t  # where x_0_hat = 0 leads: the first difference is 0, and so is its gradient
    chains = torch.stack([x_t, mid, mid + 1], 1)
    TrajectoryLoss(chains, None, plan, "sample", Recipe(steps=1, batch_size=4), device=CPU)(network, 0).backward()  # type: ignore[no-untyped-call]
    assert first.grad is not None
    assert float(first.grad) == pytest.approx(-float(plan.b[0, 0]) / (1 + trajectories.SOFTEN**2) ** 0.5, rel=1e-4)


def test_a_plan_with_history_or_noise_is_no_student_s() -> None:
    model = eight()
    for plan in (model.plan("dpmpp_2m", 2), model.plan("ddpm", 2)):
        with pytest.raises(ValueError, match="last x alone"):
            TrajectoryLoss(torch.zeros(1, 3, 1, 8, 8), None, plan, "sample", Recipe(steps=1), device=CPU)


# The command


@pytest.fixture(scope="module")
def teacher(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trained on scikit-learn's digits."""
    out = tmp_path_factory.mktemp("teacher")
    how = ["--data", "digits", "--channels", "8", "16", "--recipe", "fast", "--warmup-steps", "10", "--steps", "200"]
    assert train.main([*how, "--device", "cpu", "--no-compile", "--no-bf16", "--out", str(out)]) == 0
    return out / "model"


def arguments(teacher: Path, out: Path, *more: str) -> list[str]:
    return [*COMMON, "--model", str(teacher), "--out", str(out), "--batch-size", "16", "--lr", "3e-3", *more]


@pytest.fixture(scope="module")
def finished(teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "student"
    assert distill.main(arguments(teacher, out, "--steps", "100")) == 0
    return out


def test_a_student_comes_nearer_to_its_teacher_than_the_teacher_with_as_few_calls(
    teacher: Path, finished: Path
) -> None:
    """On noise that neither was trained with."""
    of, student = load_model(teacher), load_model(finished / "model")
    seeds, labels = range(30), [label for label in range(10) for _ in range(3)]
    wanted = sampling.generate(of, CPU, seeds, labels, sampler="dpmpp_2m", steps=6).float()

    def difference(images: Tensor) -> float:
        return float((images.float() - wanted).square().mean().sqrt())

    plain = difference(sampling.generate(of, CPU, seeds, labels, sampler="ddim", steps=2))
    assert difference(sampling.generate(student, CPU, seeds, labels)) < 0.7 * plain


def test_a_student_draws_in_one_way_whatever_the_preset(finished: Path) -> None:
    student = load_model(finished / "model")
    assert student.distilled_steps == 2
    for preset in ("fast", "balanced", "reference", "ddim"):
        assert student.plan(preset).sha256 == student.plan("ddim", 2).sha256
    for sampler, steps, reason in (("balanced", 10, "steps=10 must be 2"), ("unipc", None, "'unipc' does not fit")):
        with pytest.raises(ValueError, match=reason):
            student.plan(sampler, steps)
    with pytest.raises(ValueError, match="cannot start at an image"):
        student.plan("balanced", start=5)
    with pytest.raises(ValueError, match=r"eta=0\.5 must be 0"):
        student.plan("ddim", eta=0.5)


def test_its_record_says_what_it_came_from(teacher: Path, finished: Path) -> None:
    record = json.loads((finished / "model" / "training.json").read_text())
    assert (record["chains"], record["nfe"], record["teacher_nfe"], record["steps_done"]) == (640, 2, 6, 100)
    assert record["started_from"]["sha256"] == load_model(teacher).sha256
    assert set(record["recipe"]) == set(trajectories.OF_RECIPE)  # what has no meaning here is not claimed
    assert (finished / "samples.png").exists()


def test_diffusers_draws_the_same_with_ddim(finished: Path) -> None:
    from diffusers import DDIMScheduler, UNet2DModel

    student = load_model(finished / "model")
    unet = UNet2DModel.from_pretrained(finished / "model" / "unet").eval()
    scheduler = DDIMScheduler.from_pretrained(finished / "model" / "scheduler")
    scheduler.set_timesteps(2)
    x = start = sampling.draw_noise(range(10), 0, torch.empty(0, 1, 8, 8))
    labels = torch.arange(10)
    with torch.inference_mode():
        for t in scheduler.timesteps:
            x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
    *_, last = sampling.sample(
        student.denoiser(student.network(CPU)), student.plan("balanced"), start, range(10), labels=labels
    )
    assert torch.allclose(x, last.x, atol=1e-4)


@pytest.mark.parametrize("when", ["drawing", "training"])
def test_a_run_that_was_killed_ends_in_the_same_bytes(teacher: Path, finished: Path, tmp_path: Path, when: str) -> None:
    """The real process. Killed while it draws, the same command begins anew with the chains that are there."""
    out = tmp_path / "killed"
    process = subprocess.Popen(
        [
            sys.executable,
            "-m",
            "ddpm_core.distill",
            *arguments(teacher, out, "--steps", "100", "--save-every", "0.001s"),
        ],
        cwd=Path(ddpm_core.__file__).parent.parent,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    wanted = out / "chains" / "00000000.safetensors" if when == "drawing" else out / "samples.png"
    try:
        while not wanted.exists() and process.poll() is None:
            time.sleep(0.005)
        process.send_signal(signal.SIGKILL)
        _, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == -signal.SIGKILL, stderr
    again = ["--resume", "--device", "cpu", "--out", str(out)] if (out / "state.safetensors").exists() else None
    assert distill.main(again or arguments(teacher, out, "--steps", "100")) == 0
    assert (out / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_a_disk_that_is_full_ends_it_in_one_line_and_it_goes_on_to_the_same_bytes(
    teacher: Path, finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "full"
    line = disk.run_until_it_is_full("ddpm_core.distill", arguments(teacher, out, "--steps", "100"), out)
    assert re.fullmatch(
        rf"error: {out / 'state.safetensors'} cannot be written: File too large; the checkpoint of step \d+ is whole; "
        rf"free space, then go on with: python -m ddpm_core\.distill --out {out} --resume",
        line,
    )
    assert distill.main(["--resume", "--device", "cpu", "--out", str(out)]) == 0
    assert (out / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_a_disk_that_is_full_of_chains_says_that_the_same_command_goes_on(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    replace, out = Path.replace, tmp_path / "full"

    def fail(temporary: Path, target: Path) -> Path:
        if target.name == "00000256.safetensors":
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        assert distill.main(arguments(teacher, out, "--steps", "1")) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        f"error: {out / 'chains' / '00000256.safetensors'} cannot be written: No space left on device; "
        "there is no checkpoint yet; free space, then give the same command again"
    )
    assert [p.name for p in (out / "chains").iterdir()] == ["00000000.safetensors"]
    assert distill.main(arguments(teacher, out, "--steps", "1")) == 0


def test_a_training_that_diverges_says_that_it_has_to_begin_anew(
    teacher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """A student is where no training starts: of --init it says nothing."""
    out, loss = tmp_path / "run", TrajectoryLoss.__call__
    monkeypatch.setattr(TrajectoryLoss, "__call__", lambda *args: loss(*args) * (math.nan if args[2] > 2 else 1))
    assert distill.main(arguments(teacher, out, "--steps", "60", "--save-every", "0.001s")) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        "error: the loss or its gradient was not finite in 20 steps on end, up to step 23; the checkpoint of step 3 is "
        "whole; --resume would come to the same: begin another run with a lower --lr or a longer --warmup-steps in "
        "another --out"
    )


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--nfe", "4"], "multiple of nfe=4"),
        (["--chains", "0"], "chains=0"),
        (["--lr", "7"], "lr=7.0"),
        (["--model", "nowhere"], "no model directory at nowhere"),
        (["--resume"], "cannot change"),
    ],
)
def test_what_cannot_be_is_refused_in_one_line(
    teacher: Path, tmp_path: Path, options: list[str], reason: str, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    assert distill.main([*arguments(teacher, out, "--steps", "1"), *options]) == 2
    assert reason in capsys.readouterr().err
    assert not out.exists()


def test_a_run_goes_on_with_its_own_teacher_alone(
    teacher: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other, model = tmp_path / "other", eight()
    checkpoint.save_model(other, model.net.state_dict(), model.config, model.scheduler)
    assert distill.main(["--out", str(finished), "--resume", "--model", str(other), "--device", "cpu"]) == 2
    assert "not the teacher that this run began with" in capsys.readouterr().err
    assert train.main(["--out", str(finished), "--resume", "--device", "cpu"]) == 2
    assert "`train` and `distill` each resume what they began" in capsys.readouterr().err


def test_a_student_is_no_teacher_is_fitted_no_plans_and_starts_no_training(
    teacher: Path, finished: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    student, out = str(finished / "model"), str(tmp_path / "run")
    assert distill.main(arguments(finished / "model", tmp_path / "run")) == 2
    assert "a student itself" in capsys.readouterr().err
    assert fit_plans.main(["--model", student, "--device", "cpu"]) == 2
    assert "no other plan fits it" in capsys.readouterr().err
    assert train.main(["--init", student, "--data", "digits", "--device", "cpu", "--out", out]) == 2
    assert "start from its teacher" in capsys.readouterr().err
    assert sweep.main(["--model", student, "--classifier", out, "--data", "digits", "--device", "cpu"]) == 2
    assert "draws in one way alone" in capsys.readouterr().err
    assert average.main([student, str(teacher), "--share", "0.5", "--out", out]) == 2
    assert "not of one" in capsys.readouterr().err
    assert average.main([student, student, "--share", "0.5", "--out", out]) == 0
    assert load_model(tmp_path / "run").distilled_steps == 2


def test_a_teacher_that_predicts_eps_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = eight(scheduler=SchedulerConfig())
    checkpoint.save_model(tmp_path / "eps", model.net.state_dict(), model.config, model.scheduler)
    assert distill.main(arguments(tmp_path / "eps", tmp_path / "run")) == 2
    assert "take a model that predicts v" in capsys.readouterr().err


@pytest.mark.parametrize("steps", [0, 1001, -2, "2", True, 2.0])
def test_a_number_of_steps_that_cannot_be_is_refused(tmp_path: Path, steps: object) -> None:
    model = eight()
    checkpoint.save_model(tmp_path, model.net.state_dict(), model.config, model.scheduler)
    path = tmp_path / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "_distilled_steps": steps}))
    with pytest.raises(checkpoint.CheckpointError, match=r"distilled_steps=.* must be int, 1 \.\. 1000"):
        load_model(tmp_path)
