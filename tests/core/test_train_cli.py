"""The training command line, end to end on scikit-learn's digits: what it writes, refuses and resumes."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors import safe_open

import ddpm_core
from ddpm_core import checkpoint, run_options, runs, train, training_loop
from ddpm_core.checkpoint import WEIGHTS_NAME, load_model
from ddpm_core.unet import UNet

COMMON = ["--data", "digits", "--channels", "8", "16", "--device", "cpu", "--no-compile", "--no-bf16"]
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


@pytest.mark.parametrize("by", [signal.SIGINT, signal.SIGKILL], ids=["interrupted", "killed"])
def test_a_run_stopped_in_mid_epoch_and_resumed_ends_in_the_same_bytes(
    finished: Path, tmp_path: Path, by: signal.Signals
) -> None:
    """The real process, after its first checkpoint. Interrupted it saves, says how to resume and exits 130; killed it
    leaves its last checkpoint."""
    out = tmp_path / "halved"
    root = Path(ddpm_core.__file__).parent.parent
    process = subprocess.Popen(
        [sys.executable, "-m", "ddpm_core.train", *arguments(out, "--steps", "60", "--save-every", "0.001s")],
        cwd=root,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        while not (out / "samples.png").exists() and process.poll() is None:
            time.sleep(0.02)
        process.send_signal(by)
        stdout, stderr = process.communicate(timeout=120)
    finally:
        process.kill()
    if by == signal.SIGINT:
        assert process.returncode == 130, stderr
        assert f"resume with: python -m ddpm_core.train --out {out} --resume" in stdout
    else:
        assert process.returncode == -signal.SIGKILL, stderr
    assert 1 <= step_of(out) < 60

    assert train.main(["--out", str(out), "--resume", "--device", "cpu"]) == 0
    assert step_of(out) == 60
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


def test_a_crash_in_the_first_checkpoint_leaves_a_run_that_starts_or_resumes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Whichever write fails: with a state it resumes, without one it starts anew."""
    write = checkpoint.write_atomically
    for failing in ("metrics.jsonl", "state.safetensors", WEIGHTS_NAME, "config.json"):
        out = tmp_path / failing

        def fail(path: Path, content: bytes, failing: str = failing) -> None:
            if path.name == failing:
                raise OSError("No space left on device")
            write(path, content)

        with monkeypatch.context() as patch:
            patch.setattr(checkpoint, "write_atomically", fail)
            assert train.main(arguments(out, "--steps", "1")) == 2
        assert "No space left" in capsys.readouterr().err
        again = ["--resume"] if (out / "state.safetensors").exists() else arguments(out, "--steps", "1")
        assert train.main([*again, "--out", str(out), "--device", "cpu"]) == 0


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


def test_training_that_diverges_says_so_and_exits_1(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    forward = UNet.forward
    monkeypatch.setattr(UNet, "forward", lambda *args: forward(*args) * float("nan"))
    assert train.main(arguments(tmp_path / "run", "--steps", "30")) == 1
    assert "no finite gradient in 20 steps" in capsys.readouterr().err
