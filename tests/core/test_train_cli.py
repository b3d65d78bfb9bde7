"""The training command line, end to end on scikit-learn's digits: what it writes, refuses and resumes."""

from __future__ import annotations

import errno
import io
import itertools
import json
import math
import multiprocessing
import os
import random
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

import ddpm_core
from ddpm_core import checkpoint, run_options, runs, train, training_loop
from ddpm_core.checkpoint import WEIGHTS_NAME, load_model
from ddpm_core.losses import DenoisingLoss
from ddpm_core.training import Predict
from tests.core import disk
from tests.core.test_data import idx_file

HARDWARE = ["--device", "cpu", "--no-compile", "--no-bf16"]
COMMON = ["--data", "digits", "--channels", "8", "16", *HARDWARE]
RECIPE = ["--batch-size", "16", "--warmup-steps", "3", "--dropout", "0.1", "--recipe", "fast"]
WEIGHTS = Path("model/unet") / WEIGHTS_NAME


def arguments(out: Path, *more: str) -> list[str]:
    return [*COMMON, *RECIPE, "--out", str(out), *more]


def step_of(out: Path) -> int:
    """The optimizer step of the state on disk."""
    with safe_open(out / "state.safetensors", framework="pt") as file:
        return int(json.loads(file.metadata()["progress"])["step"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A whole run of 60 steps, with a line of metrics for every second one."""
    out = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training_loop, "LOG_EVERY", 2)
        assert train.main(arguments(out, "--steps", "60")) == 0
    return out


def test_a_run_writes_a_model_pictures_metrics_and_its_recipe(finished: Path) -> None:
    model = load_model(finished / "model")
    assert model.config.block_out_channels == (8, 16)
    assert model.config.image_shape == (1, 8, 8)
    assert model.null_label == 10
    assert model.scheduler.prediction_type == "v_prediction"
    assert model.scheduler.timestep_spacing == "trailing"

    metrics = [json.loads(line) for line in (finished / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == list(range(2, 61, 2))
    assert set(metrics[0]) == {"step", "loss", "lr", "grad_norm", "elapsed_s", "progress"}
    assert sum(m["loss"] for m in metrics[-5:]) < sum(m["loss"] for m in metrics[:5])

    run = json.loads((finished / "run.json").read_text())
    assert (run["data"], run["recipe"]["steps"], run["recipe"]["batch_size"]) == ("digits", 60, 16)
    with Image.open(finished / "samples.png") as samples:
        assert samples.size == (2 * (10 * 10 - 2), 2 * (10 * 10 - 2))  # 10 x 10 images of 8 pixels, 2 apart, doubled
    with Image.open(finished / "loss.png") as loss:
        assert loss.size[0] > loss.size[1] > 100
    assert step_of(finished) == 60
    assert not [p for p in finished.rglob("*") if p.name.endswith(".tmp")]


def test_run_json_reads_back_to_the_same_run(finished: Path) -> None:
    text = (finished / "run.json").read_bytes()
    run = runs.TrainingRun.from_dict(json.loads(text))
    assert checkpoint.to_json(run.to_dict()) == text


def test_the_model_is_the_average_and_not_the_last_weights(finished: Path) -> None:
    shipped = load_model(finished / "model").net.state_dict()
    with safe_open(finished / "state.safetensors", framework="pt") as file:
        assert all(torch.equal(v, file.get_tensor(f"ema.{k}")) for k, v in shipped.items())
        assert not torch.equal(shipped["conv_in.weight"], file.get_tensor("net.conv_in.weight"))


def test_a_run_is_not_overwritten(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "state.safetensors").read_bytes()
    assert train.main(arguments(finished, "--steps", "1")) == 2
    message = capsys.readouterr().err
    assert str(finished) in message
    assert "--resume" in message
    assert (finished / "state.safetensors").read_bytes() == before


def test_a_run_interrupted_in_mid_epoch_and_resumed_ends_in_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    """The real process, after its first checkpoint: it saves, says how to resume and exits 130."""
    out = tmp_path / "halved"
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm_core.train", *arguments(out, "--steps", "60", "--save-every", "0.001s")],
        cwd=Path(ddpm_core.__file__).parent.parent,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (out / "samples.png").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    assert process.returncode == 130, stderr
    assert f"resume with: python -m ddpm_core.train --out {out} --resume" in stdout
    assert 1 <= step_of(out) < 60

    assert train.main(["--out", str(out), "--resume", "--device", "cpu"]) == 0
    assert step_of(out) == 60
    assert (out / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


# Killed: in processes of their own, of a server that has loaded the libraries once

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload([__name__, "sklearn.datasets"])
FILE_OPERATIONS = ((os, "fsync"), (Path, "replace"))


def run(argv: list[str], killed_before: int | None) -> None:
    """A training, killed before the file operation of this number: an fsync of a file or a folder, or a rename."""
    sys.stdout = sys.stderr = io.StringIO()
    numbers = itertools.count(1)

    def counted(operation: Callable[..., object]) -> Callable[..., object]:
        def call(*args: object) -> object:
            if next(numbers) == killed_before:
                os.kill(os.getpid(), signal.SIGKILL)
            return operation(*args)

        return call

    for owner, name in FILE_OPERATIONS:
        setattr(owner, name, counted(getattr(owner, name)))
    sys.exit(train.main(argv))


def started(argv: list[str], killed_before: int | None = None) -> BaseProcess:
    process = SERVER.Process(target=run, args=(argv, killed_before))
    process.start()
    return process


def assert_whole(out: Path) -> None:
    """Every file of a run can be read by who reads it; temporary ones nobody does."""
    load_model(out / "model")
    load_file(out / "state.safetensors")
    for path in (out / "run.json", out / "model" / "training.json"):
        json.loads(path.read_text())
    for line in (out / "metrics.jsonl").read_text().splitlines():
        json.loads(line)
    with Image.open(out / "samples.png") as samples:
        samples.load()


def test_a_run_killed_anywhere_in_a_checkpoint_goes_on_from_it_or_from_the_one_before(tmp_path: Path) -> None:
    """A checkpoint after each step: killed before every single file operation of the second one."""
    long = ["--steps", "2", "--save-every", "0.001s"]
    whole = tmp_path / "whole"
    assert train.main(arguments(whole, *long)) == 0
    files = [p for p in whole.rglob("*") if p.is_file()]
    each = 3 * (len(files) - 1)  # fsync, rename, fsync of the folder; run.json is written before
    found, temporaries = [], 0
    for number in range(3 + each + 1, 3 + 2 * each + 1):
        out = tmp_path / str(number)
        process = started(arguments(out, *long), number)
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert_whole(out)
        found.append(step_of(out))
        temporaries += len(list(out.rglob("*.tmp")))
        assert train.main(["--out", str(out), "--resume", "--device", "cpu"]) == 0
        assert (out / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()
        assert not list(out.rglob("*.tmp"))
    assert found == [*[1] * 5, *[2] * (each - 5)]  # metrics, then the state: it is there with the second rename
    assert temporaries == 2 * each // 3  # each file's is there before its fsync and before its rename


def test_a_run_killed_at_random_moments_ends_in_the_same_bytes(finished: Path, tmp_path: Path) -> None:
    """Four times, each a random while after a checkpoint; none that was there is lost."""
    out, resume, rng = tmp_path / "killed", ["--resume", "--device", "cpu"], random.Random(0)
    more, seen = arguments(out, "--steps", "60"), 0
    for _ in range(4):
        process = started([*more, "--save-every", "0.001s"])
        while not ((out / "samples.png").exists() and step_of(out) > seen) and process.is_alive():
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.2))
        seen = step_of(out)
        process.kill()
        process.join(60)
        assert process.exitcode == -signal.SIGKILL
        assert_whole(out)
        assert seen <= step_of(out) < 60
        seen, more = step_of(out), ["--out", str(out), *resume]
    assert train.main(more) == 0
    assert (out / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()
    assert not list(out.rglob("*.tmp"))


# A full disk


def test_a_disk_that_is_full_ends_a_run_in_one_line_and_it_goes_on_to_the_same_bytes(
    finished: Path, tmp_path: Path
) -> None:
    out = tmp_path / "full"
    line = disk.run_until_it_is_full("ddpm_core.train", arguments(out, "--steps", "60"), out)
    assert line == (
        f"error: {out / 'state.safetensors'} cannot be written: File too large; "
        f"the checkpoint of step {step_of(out)} is whole; "
        f"free space, then go on with: python -m ddpm_core.train --out {out} --resume"
    )
    assert 1 <= step_of(out) < 60
    assert_whole(out)
    assert train.main(["--out", str(out), "--resume", "--device", "cpu"]) == 0
    assert (out / WEIGHTS).read_bytes() == (finished / WEIGHTS).read_bytes()


def test_a_resumed_run_keeps_its_recipe(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = (finished / "run.json").read_bytes()
    assert train.main(["--out", str(finished), "--resume", "--lr", "0.1", "--channels", "8"]) == 2
    assert "--channels, --lr cannot change" in capsys.readouterr().err
    assert (finished / "run.json").read_bytes() == before


def test_a_resumed_run_finds_its_data_where_it_is_told(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, "--steps", "1", "--data-root", "here")) == 0
    assert train.main(["--out", str(out), "--resume", "--steps", "2", "--data-root", "there", "--device", "cpu"]) == 0
    run = json.loads((out / "run.json").read_text())
    assert (run["data_root"], run["bf16"], run["compile"]) == ("there", False, False)


@pytest.mark.parametrize("file", ["state.safetensors", "run.json", "metrics.jsonl"])
def test_a_damaged_run_is_named(tmp_path: Path, file: str, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, "--steps", "1")) == 0
    (out / file).write_bytes(b'{"data": "digits"}')
    capsys.readouterr()
    assert train.main(["--out", str(out), "--resume", "--device", "cpu"]) == 2
    assert str(out) in capsys.readouterr().err


@pytest.mark.parametrize(
    "failing",
    ["run.json", "metrics.jsonl", "state.safetensors", WEIGHTS_NAME, "config.json", "training.json", "samples.png"],
)
def test_a_disk_full_in_the_first_checkpoint_leaves_a_run_that_starts_or_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], failing: str
) -> None:
    """Whichever write fails: with a state it resumes, without one it starts anew, and the message says which."""
    replace, out = Path.replace, tmp_path / "run"

    def fail(temporary: Path, target: Path) -> Path:
        if target.name == failing:
            raise OSError(errno.ENOSPC, "No space left on device")
        return replace(temporary, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", fail)
        assert train.main(arguments(out, "--steps", "1")) == 1
    *_, message = capsys.readouterr().err.splitlines()
    assert re.match(rf"error: {out}/(.+/)?{failing} cannot be written: No space left on device; ", message)
    assert not list(out.rglob("*.tmp"))
    if (out / "state.safetensors").exists():
        assert message.endswith("the checkpoint of step 1 is whole; free space, then go on with: "
                                f"python -m ddpm_core.train --out {out} --resume")  # fmt: skip
        assert train.main(["--resume", "--out", str(out), "--device", "cpu"]) == 0
    else:
        assert message.endswith("there is no checkpoint yet; free space, then give the same command again")
        assert train.main(arguments(out, "--steps", "1")) == 0
    assert_whole(out)


def test_a_finished_run_can_be_made_longer(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, "--steps", "2")) == 0
    assert train.main(["--out", str(out), "--resume", "--steps", "4", "--device", "cpu", "--no-compile"]) == 0
    assert step_of(out) == 4
    assert json.loads((out / "run.json").read_text())["recipe"]["steps"] == 4
    assert not (out / "loss.png").exists()  # nothing was logged yet


def test_resuming_where_there_is_no_run_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--out", str(tmp_path / "none"), "--resume"]) == 2
    assert f"{tmp_path / 'none'} holds no run to resume" in capsys.readouterr().err


def test_missing_mnist_names_what_to_do(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert train.main(["--data-root", str(tmp_path / "data"), "--out", str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert str(tmp_path / "data") in message
    assert "--data-root" in message
    assert "--download" in message
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        (["--steps", "5", "--time-budget", "5s"], "either steps or a time budget"),
        (["--steps", "5", "--lr", "2"], "lr=2.0 must be"),
        (["--steps", "5", "--channels", "12"], "norm_num_groups=8 must divide"),
        (["--steps", "5", "--channels", "8", "8", "8", "8", "8"], "must be a multiple of 16"),
        (["--steps", "5", "--channels", "0"], "block_out_channels=(0,)"),
        (["--steps", "5", "--layers", "0"], "layers_per_block=0"),
        (["--steps", "5", "--dropout", "1.5"], "dropout=1.5"),
        (["--steps", "5", "--adam-betas", "2", "0.9"], "adam_betas"),
        (["--steps", "5", "--device", "meta"], "device 'meta' cannot be used"),
    ],
)
def test_a_run_that_cannot_be_is_refused_before_anything_is_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], options: list[str], reason: str
) -> None:
    assert train.main([*COMMON, "--out", str(tmp_path / "run"), *options]) == 2
    assert reason in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("text", "seconds"), [("90s", 90), ("40m", 2400), ("2.5h", 9000)])
def test_durations_are_read(text: str, seconds: float) -> None:
    assert run_options.duration(text) == seconds


@pytest.mark.parametrize("text", ["90", "1d", "s", "0s", "1h30m"])
def test_other_durations_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        train.main(["--time-budget", text])
    assert "write 90s, 40m or 2.5h" in capsys.readouterr().err


class Spoiled:
    """DenoisingLoss, NaN in its steps first .. last - 1."""

    def __init__(self, first: int, last: int) -> None:
        self.bad, self.loss = range(first, last), DenoisingLoss.__call__

    def __get__(self, instance: DenoisingLoss, owner: type) -> Callable[[Predict, int], Tensor]:
        return lambda predict, step: self.loss(instance, predict, step) * (math.nan if step in self.bad else 1)


def test_training_that_diverges_says_what_is_whole_and_what_to_change(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "run"
    often = ["--steps", "60", "--save-every", "0.001s"]
    monkeypatch.setattr(DenoisingLoss, "__call__", Spoiled(0, 60))
    assert train.main(arguments(out, *often)) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        "error: the loss or its gradient was not finite in 20 steps on end, up to step 20; there is no checkpoint yet; "
        "begin another run with a lower --lr or a longer --warmup-steps"
    )

    monkeypatch.undo()
    monkeypatch.setattr(DenoisingLoss, "__call__", Spoiled(5, 60))
    assert train.main(arguments(out, *often)) == 1
    *_, line = capsys.readouterr().err.splitlines()
    assert line == (
        "error: the loss or its gradient was not finite in 20 steps on end, up to step 25; the checkpoint of step 5 is "
        "whole; --resume would come to the same: begin another run with a lower --lr or a longer --warmup-steps in "
        f"another --out, from these weights with --init {out / 'model'}"
    )
    assert_whole(out)
    assert step_of(out) == 5
    monkeypatch.undo()
    again = ["--data", "digits", "--init", str(out / "model"), "--lr", "1e-5", "--steps", "1", *HARDWARE]
    assert train.main([*again, "--out", str(tmp_path / "again")]) == 0


def test_steps_that_are_skipped_are_told_recorded_and_resumed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps 4, 5 and 6 are, of 12; halved in between, the run ends in the same bytes."""
    whole, halved = tmp_path / "whole", tmp_path / "halved"
    monkeypatch.setattr(DenoisingLoss, "__call__", Spoiled(3, 6))
    assert train.main(arguments(whole, "--steps", "12", "--decay", "0")) == 0
    assert "done at step 12 (3 skipped, their loss or gradient not being finite): " in capsys.readouterr().out
    assert train.main(arguments(halved, "--steps", "5", "--decay", "0")) == 0
    assert train.main(["--out", str(halved), "--resume", "--steps", "12", "--device", "cpu"]) == 0
    for out in (whole, halved):
        assert json.loads((out / "model" / "training.json").read_text())["steps_skipped"] == 3
    assert (halved / WEIGHTS).read_bytes() == (whole / WEIGHTS).read_bytes()


def test_a_state_from_before_steps_were_counted_as_skipped_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    assert train.main(arguments(out, "--steps", "1")) == 0
    path = out / "state.safetensors"
    save_file(load_file(path), path, metadata={"progress": '{"step": 1, "elapsed_s": 0.5}'})
    assert train.main(["--out", str(out), "--resume", "--steps", "2", "--device", "cpu"]) == 0
    assert "steps_skipped" not in json.loads((out / "model" / "training.json").read_text())


# Data that is damaged


@pytest.mark.parametrize(
    ("name", "damage", "reason"),
    [
        ("train-images-idx3-ubyte", lambda b: b[:-100], "3,052 bytes where [4, 28, 28] needs 3,152"),
        ("train-images-idx3-ubyte", lambda b: bytes([0, 0, 10]) + b[3:], "no IDX file"),
        ("train-images-idx3-ubyte", lambda b: b"", "no IDX file"),
        ("train-labels-idx1-ubyte", lambda b: b[:-1], "11 bytes where [4] needs 12"),
        ("train-labels-idx1-ubyte", lambda b: b[:-1] + b"\xff", "labels above 9"),
    ],
)
def test_a_damaged_file_of_mnist_is_named_in_one_line_and_exit_2(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str, damage: Callable[[bytes], bytes], reason: str
) -> None:
    raw = tmp_path / "MNIST" / "raw"
    raw.mkdir(parents=True)
    (raw / "train-images-idx3-ubyte").write_bytes(idx_file(np.zeros((4, 28, 28))))
    (raw / "train-labels-idx1-ubyte").write_bytes(idx_file(np.arange(4)))
    command = ["--data-root", str(tmp_path), "--steps", "1", "--batch-size", "4", "--channels", "8", "8", "8"]
    command += [*HARDWARE, "--out"]
    assert train.main([*command, str(tmp_path / "good")]) == 0
    capsys.readouterr()
    (raw / name).write_bytes(damage((raw / name).read_bytes()))
    assert train.main([*command, str(tmp_path / "run")]) == 2
    message = capsys.readouterr().err
    assert message.startswith(f"error: {raw / name} is damaged ({reason}")
    assert message.endswith("): take it away, then fetch it anew with --download\n")
    assert message.count("\n") == 1
    assert not (tmp_path / "run").exists()
    assert train.main(["--out", str(tmp_path / "good"), "--resume", "--device", "cpu"]) == 2
    assert capsys.readouterr().err == message
