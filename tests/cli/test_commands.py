"""What there is: help, info, and the command lines of ddpm_core under one name."""

from __future__ import annotations

import importlib
import json
import re
import shlex
import shutil
import tomllib
from pathlib import Path
from typing import Any, get_args

import pytest

from app.cli import COMMANDS, EXAMPLES, OFFLINE
from app.cli.options import FIELDS
from app.schemas import GenerateRequest
from ddpm_core import __version__
from tests.networks import call_distilled

ROOT = Path(__file__).parent.parent.parent


def test_help_is_what_a_newcomer_gets(ddpm: Any) -> None:
    ran = ddpm()
    assert ran.code == 0
    assert ran.out == ddpm("--help").out
    for name in (*COMMANDS, *OFFLINE):
        assert f"\n  {name} " in ran.out
    assert "ddpm generate 7 -o seven.png" in ran.out
    assert ddpm("--version").out == f"ddpm {__version__}\n"
    assert tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"] == {"ddpm": "app.cli:main"}


@pytest.mark.parametrize("name", [*COMMANDS, *OFFLINE])
def test_every_command_has_help_of_its_own(ddpm: Any, name: str) -> None:
    ran = ddpm(name, "--help")
    assert ran.code == 0
    assert ran.out.startswith(f"usage: ddpm {name} ")


def examples() -> list[str]:
    """Every command line that help shows."""
    texts = [EXAMPLES, *(importlib.import_module(f"app.cli.{name}").EPILOG for name in COMMANDS)]
    lines = re.findall(r"^  ddpm (.*?)(?: {2,}.*)?$", "\n".join(texts), re.MULTILINE)
    return [part.removeprefix("ddpm ") for line in lines for part in line.split(" | ")]


@pytest.mark.parametrize("line", examples())
def test_every_example_of_the_help_parses(line: str) -> None:
    name, *words = shlex.split(line)
    importlib.import_module(f"app.cli.{name}").build_parser().parse_intermixed_args(words)


def test_generate_takes_what_the_service_takes(ddpm: Any) -> None:
    """All but what is of HTTP alone; and its help names every sampler."""
    assert {*FIELDS, "n", "label", "model"} == {
        *GenerateRequest.model_fields
    } - {"response_format", "deadline_ms", "previews"}  # fmt: skip
    text = ddpm("generate", "--help").out
    for sampler in get_args(GenerateRequest.model_fields["sampler"].annotation):
        assert sampler in text


def test_the_others_are_passed_through(ddpm: Any, model_dir: Path) -> None:
    """With their exit codes and messages."""
    ran = ddpm("average", str(model_dir), str(model_dir), "--share", "0.5", "--out", "between")
    assert (ran.code, ran.out) == (0, "wrote between\n")
    assert Path("between/unet/config.json").is_file()
    ran = ddpm("average", str(model_dir), "gone", "--share", "2", "--out", "x")
    assert (ran.code, ran.err) == (2, "error: --share 2.0 must be 0 .. 1\n")
    assert ddpm("train", "--recipe", "none").code == 2


def test_info_of_a_measured_model(ddpm: Any) -> None:
    weights = ROOT / "weights" / "mnist"
    ran = ddpm("info", str(weights))
    for part in ("mnist@38931c40fe98\n", "1,114,209 parameters, 0.38 GFLOP", "predicts v_prediction", "learned 5",
                 "0 .. 9, or null", "balanced = learned 5", "T = 1,000", "| FID "):  # fmt: skip
        assert part in ran.out
    facts = json.loads(ddpm("info", str(weights), "--json").out)
    card = json.loads((weights / "card.json").read_text())
    assert facts["card"]["metrics"] == card["metrics"]
    assert (facts["sha256"], facts["parameters"]) == (card["model"]["sha256"], card["model"]["parameters"])
    assert facts["gflop_per_call"] == pytest.approx(0.38, abs=0.005)


def test_info_of_models_of_other_kinds(ddpm: Any, model_dir: Path, tmp_path: Path) -> None:
    student = Path(shutil.copytree(model_dir, tmp_path / "student"))
    call_distilled(student)
    (student / "training.json").write_text(json.dumps({"data_facts": {"class_names": [*"abcdefghij"]}}))
    ran = ddpm("info", str(student))
    assert "0: a, 1: b" in ran.out
    assert "samplers  ddim 2\n" in ran.out
    assert "no card.json: not measured yet" in ran.out
    sha256 = json.loads(ddpm("info", str(student), "--json").out)["sha256"]
    (student / "card.json").write_text(json.dumps({"model": {"sha256": sha256}}))
    assert "is of another version" in ddpm("info", str(student)).problem


def test_info_of_a_service(ddpm: Any, at: list[str]) -> None:
    ran = ddpm("info", *at)
    assert ran.code == 0, ran.err
    for part in ("images of a request: 64 at most", "tiny@", "by onnxruntime on cpu, exact", "0 running, 0 waiting"):
        assert part in ran.out
    assert set(json.loads(ddpm("info", *at, "--json").out)) == {"health", "capabilities"}
