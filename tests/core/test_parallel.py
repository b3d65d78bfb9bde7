"""Two processes, started by torchrun, train and draw what one does; they stop, fail and resume together."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import ddpm_core
from ddpm_core import average, checkpoint, classifier, evaluate, fit_plans, recipe, sweep, train
from ddpm_core.checkpoint import WEIGHTS_NAME
from ddpm_core.parallel import ONE, Ranks
from tests.core import ranks as worker
from tests.core.test_train_cli import step_of
from tests.networks import eight

WEIGHTS = Path("model/unet") / WEIGHTS_NAME
ROOT = Path(ddpm_core.__file__).parent.parent


def torchrun(*arguments: str, processes: int = 2) -> subprocess.Popen[str]:
    """torchrun on any free port."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "error"}
    return subprocess.Popen(
        [*command, *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@contextlib.contextmanager
def ended(process: subprocess.Popen[str]) -> Iterator[subprocess.Popen[str]]:
    """A torchrun that has ended afterwards, and what it started with it."""
    with process:
        try:
            yield process
        finally:
            process.terminate()


def carried_out(*arguments: str, processes: int = 2) -> str:
    """What it said on stderr, having ended well."""
    with ended(torchrun(*arguments, processes=processes)) as process:
        _, stderr = process.communicate(timeout=240)
    assert process.returncode == 0, stderr
    return stderr


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where two ranks have found their facts and carried out worker.COMMANDS, and one process the last two."""
    root = tmp_path_factory.mktemp("ranks")
    model = eight()
    for name in ("tiny", "one", "two"):
        checkpoint.save_model(root / "weights" / name, model.net.state_dict(), model.config, model.scheduler)
    with contextlib.redirect_stdout(io.StringIO()):
        out = str(root / "weights" / "digits-classifier")
        assert classifier.main(["--data", "digits", "--epochs", "1", "--out", out]) == 0
    carried_out("-m", "tests.core.ranks", str(root))
    return root


@pytest.fixture(scope="module")
def two(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "facts.json").read_text())
    assert len(found) == 2
    return found


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(worker.trajectories, "FILE_CHAINS", 4)
        found: dict[str, Any] = json.loads(json.dumps(worker.facts(ONE, tmp_path_factory.mktemp("one"))))
    return found


# Training


def of_all(two: list[dict[str, Any]], one: dict[str, Any], *names: str) -> list[dict[str, Any]]:
    """What lies under these names: of rank 0, of rank 1, of one process."""
    found = [*two, one]
    for name in names:
        found = [facts[name] for facts in found]
    return found


@pytest.mark.parametrize(("name", "bound"), [("adamw", 1e-5), ("muon", 2e-3)])
def test_two_processes_have_the_course_of_one(
    two: list[dict[str, Any]], one: dict[str, Any], name: str, bound: float
) -> None:
    """Loss, gradient norm and learning rate of 25 steps, with all that a recipe can draw; Muon rounds to bfloat16."""
    first, second, alone = of_all(two, one, "courses", name)
    assert first["steps"] == second["steps"]
    assert first["weights"] == second["weights"] != alone["weights"]
    found, wanted = (torch.tensor(course["steps"]) for course in (first, alone))
    assert found.shape == (25, 3)
    torch.testing.assert_close(found, wanted, rtol=bound, atol=0)


def test_only_rank_0_averages(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    first, second, alone = of_all(two, one, "courses", "adamw")
    assert first["averaged"] == alone["averaged"] > 0 == second["averaged"]


def test_a_bad_gradient_of_one_rank_is_skipped_by_all(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    first, second, alone = of_all(two, one, "spoiled")
    assert first["skipped"] == second["skipped"] == alone["skipped"] == 1
    assert first["steps"] == second["steps"]
    assert first["weights"] == second["weights"]
    torch.testing.assert_close(torch.tensor(first["steps"]), torch.tensor(alone["steps"]), rtol=1e-4, atol=0)


def test_one_rank_that_is_told_to_stop_stops_all_after_the_same_step(
    two: list[dict[str, Any]], one: dict[str, Any]
) -> None:
    assert of_all(two, one, "stopped") == [4, 4, 4]


def test_rank_0_has_the_clock(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    first, second, alone = of_all(two, one, "budgeted")
    assert len(first["steps"]) == len(alone["steps"]) == 10
    assert first["steps"] == second["steps"]
    assert first["elapsed_s"] == second["elapsed_s"] == pytest.approx(1)


def test_distillation_has_the_same_chains_and_course(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    first, second, alone = of_all(two, one, "distilled")
    assert first["chains"] == second["chains"] == alone["chains"]
    assert first["counted"] == alone["counted"] == 18
    assert first["steps"] == second["steps"]
    torch.testing.assert_close(torch.tensor(first["steps"]), torch.tensor(alone["steps"]), rtol=1e-3, atol=0)


def test_each_rank_has_dropout_of_its_own_and_rank_0_that_of_one_process() -> None:
    seeds = [recipe.seed_of(3, "dropout", 5, rank) for rank in range(4)]
    assert len(set(seeds)) == 4
    assert seeds[0] == recipe.seed_of(3, "dropout", 5)


# Drawing


def test_images_and_likelihoods_are_those_of_one_process(two: list[dict[str, Any]], one: dict[str, Any]) -> None:
    first, second, alone = of_all(two, one, "drawn")
    assert first == second == alone
    assert len(alone["images"]) == alone["finished"] == 9


def test_an_evaluation_and_a_sweep_find_the_figures_of_one_process(
    folder: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(folder)
    _, arguments, _ = worker.COMMANDS["evaluate"]
    assert evaluate.main(arguments) == 0
    alone = json.loads(capsys.readouterr().out.splitlines()[-1])
    together = json.loads((folder / "evaluate.0").read_text().splitlines()[-1])
    assert (folder / "evaluate.1").read_text() == ""
    for part in ("metrics", "floor", "sampling", "command"):
        assert together[part] == alone[part]
    assert together["hardware"].endswith(", 2 processes)")
    assert "processes" not in alone["hardware"]

    _, arguments, _ = worker.COMMANDS["sweep"]
    assert sweep.main(["--model", "weights/one", *arguments[2:]]) == 0
    points = [json.loads((folder / "weights" / name / "sweep.json").read_text())["points"] for name in ("one", "two")]
    assert points[0] == points[1]
    assert len(points[0]) == 2


# Errors


def test_what_is_wrong_is_told_once_and_by_whom_it_was_found(two: list[dict[str, Any]]) -> None:
    for found in two:
        assert found["one"] == "rank 1 of 2: no such file on 1"
        assert found["all"] == "a full disk"
        assert found["other"].startswith("rank 1 would do other work than rank 0")
        assert found["none"] == "nothing"


def test_one_rank_of_a_host_fetches_before_the_others(two: list[dict[str, Any]]) -> None:
    assert [found["found"] for found in two] == [False, True]


def test_a_batch_that_cannot_be_shared_out_is_refused_in_one_line(folder: Path) -> None:
    assert (folder / "uneven.0").read_text() == (
        "error: batch_size=15 is that of all 2 processes together and must be a multiple of 2, such as 14 or 16\n"
    )
    assert (folder / "uneven.1").read_text() == ""
    assert not (folder / "none").exists()


def test_a_command_line_that_is_refused_is_refused_once(folder: Path) -> None:
    assert "unrecognized arguments: --colour" in (folder / "unknown.0").read_text()
    assert (folder / "unknown.1").read_text() == ""


@pytest.mark.parametrize("world", [1, 2, 3, 8])
def test_the_shares_of_all_ranks_are_the_batch(world: int) -> None:
    shares = [torch.arange(24)[Ranks(rank, world).share(24)] for rank in range(world)]
    assert torch.equal(torch.cat(shares), torch.arange(24))
    assert {len(share) for share in shares} == {24 // world}


def test_a_rank_takes_no_device_that_is_not_its_own() -> None:
    with pytest.raises(ValueError, match="'cuda:1' is one, and each of 2 processes has its own"):
        Ranks(0, 2).device("cuda:1")
    assert Ranks(1, 2, 1, 2).device("cpu") == torch.device("cpu")


def test_processes_that_cannot_be_reached_are_named_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    with pytest.raises(SystemExit, match=r"^error: WORLD_SIZE=2, but .*MASTER_ADDR.*: start them with torchrun$"):
        train.main([])


def test_what_works_in_one_process_refuses_several(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")
    for main in (average.main, classifier.main, fit_plans.main):
        for rank, code in ((0, 2), (1, 0)):
            monkeypatch.setenv("RANK", str(rank))
            assert main(["--no-such-option"]) == code
        message = capsys.readouterr().err
        assert message == "error: this works in one process, not in 2: start it with python\n"


# Interrupted, killed and resumed


def rank_1(agent: int) -> int:
    """The process of rank 1 among those that torchrun has started."""
    for path in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            parent = int((path / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == agent and b"\0RANK=1\0" in (path / "environ").read_bytes():
                return int(path.name)
    raise AssertionError("there is no rank 1")


def test_a_run_interrupted_on_one_rank_and_resumed_ends_in_the_same_bytes(folder: Path) -> None:
    again = "torchrun --nproc-per-node 2 -m ddpm_core.train --out halved --resume"
    said = (folder / "interrupted.0").read_text()
    assert f"saved at step 7: halved/samples.png, halved/model\nresume with: {again}\n" in said
    assert (folder / "interrupted.1").read_text() == ""
    assert "for    33 steps" in (folder / "resumed.0").read_text()
    assert (folder / "halved" / WEIGHTS).read_bytes() == (folder / "whole" / WEIGHTS).read_bytes()
    assert json.loads((folder / "halved" / "model" / "training.json").read_text())["processes"] == [2]


def test_a_run_killed_on_one_rank_ends_on_all_and_resumed_it_ends_in_the_same_bytes(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out, again = tmp_path / "run", ["--resume", "--device", "cpu"]
    process = torchrun("-m", "ddpm_core.train", "--out", str(out), "--save-every", "0.001s", *worker.TRAINING)
    with ended(process):
        while not (out / "samples.png").exists() and process.poll() is None:
            time.sleep(0.02)
        os.kill(rank_1(process.pid), signal.SIGKILL)
        _, stderr = process.communicate(timeout=240)
    assert process.returncode != 0
    killed = step_of(out)
    assert 1 <= killed < 40
    command = f"torchrun --nproc-per-node 2 -m ddpm_core.train --out {out} --resume"
    assert f"the checkpoint of step {killed} is whole; go on with: {command}\n" in stderr
    assert "error: another of the processes has ended, and this one with it" in stderr
    assert "by peer" not in stderr

    alone = shutil.copytree(out, tmp_path / "alone")
    carried_out("-m", "ddpm_core.train", "--out", str(out), *again)
    assert (out / WEIGHTS).read_bytes() == (folder / "whole" / WEIGHTS).read_bytes()

    # by one process: not the same bits, but the same course, and the records say so
    assert train.main(["--out", str(alone), *again]) == 0
    assert "by 2, then 1 processes: the same course, to other last digits" in capsys.readouterr().out
    assert (alone / WEIGHTS).read_bytes() != (folder / "whole" / WEIGHTS).read_bytes()
    assert json.loads((alone / "run.json").read_text())["processes"] == [2, 1]
    assert json.loads((alone / "model" / "training.json").read_text())["processes"] == [2, 1]
