"""README.md cannot rot: its code blocks run, its settings table is the code's, its commands parse."""

from __future__ import annotations

import importlib
import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from app.cli import OFFLINE
from app.settings import Settings
from ddpm_core import average, card, distill, evaluate, fit_plans, sweep, train_options
from ddpm_core.checkpoint import WEIGHTS_NAME, sha256_of
from tests.service.process import server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


@pytest.fixture(scope="module")
def drawn(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which every bash block ran, in their order: later ones use what earlier ones wrote."""
    folder, bin_folder = tmp_path_factory.mktemp("readme"), tmp_path_factory.mktemp("bin")
    (folder / "weights").symlink_to(ROOT / "weights")
    command = bin_folder / "ddpm"  # as an installation makes it
    command.write_text(f'#!/bin/sh\nPYTHONPATH={shlex.quote(str(ROOT))} exec {sys.executable} -m app.cli "$@"\n')
    command.chmod(0o755)
    environment = {**os.environ, "PATH": f"{bin_folder}{os.pathsep}{os.environ['PATH']}", "DDPM_DEVICE": "cpu"}
    assert len(blocks("bash")) >= 4
    with server(model=ROOT / "weights" / "mnist") as it:
        for block in blocks("bash"):
            script = block.replace("http://127.0.0.1:8000", it.url).replace("curl ", "curl --fail-with-body -sS ")
            subprocess.run(
                ["bash", "-euo", "pipefail", "-c", script], cwd=folder, check=True, timeout=300, env=environment
            )
    return folder


def test_every_curl_block_works_against_the_real_service(drawn: Path) -> None:
    for name in ("seven.png", "any.png", "grid.png", "strip.png", "sevens.png", "chain.apng", "nine.png"):
        assert (drawn / name).read_bytes().startswith(b"\x89PNG")
    assert (drawn / "linked.png").read_bytes() == (drawn / "seven.png").read_bytes()
    assert (drawn / "events.txt").read_text().count("event: progress") == 6
    assert len(json.loads((drawn / "images.json").read_text())["images"]) == 3
    assert json.loads((drawn / "openai.json").read_text())["data"][0]["seed"] == 1
    with np.load(drawn / "chain.npz") as arrays:
        assert arrays["x"].shape == (6, 1, 1, 28, 28)
    with np.load(drawn / "x_t.npz") as arrays:
        assert arrays["x_t"].shape == (1, 1, 28, 28)


def test_the_command_drew_the_same_bytes_and_all_that_is_shown(drawn: Path) -> None:
    assert (drawn / "same.png").read_bytes() == (drawn / "seven.png").read_bytes()
    assert len(list((drawn / "sevens").glob("*.png"))) == 4
    for name, size in (("twelve.png", (4 * (4 * 30 - 2), 4 * (3 * 30 - 2))), ("x_t.png", (3 * 226 - 2, 224))):
        with Image.open(drawn / name) as picture:
            assert picture.size == size
    assert (drawn / "chain.webp").read_bytes()[8:12] == b"WEBP"


def test_every_python_block_runs_and_draws_the_same_pixels(drawn: Path, tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    assert blocks("python")
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, timeout=300)
    ours, served = (np.asarray(Image.open(folder / "seven.png")) for folder in (tmp_path, drawn))
    assert np.array_equal(ours, served)


def test_the_results_and_the_digest_are_the_cards() -> None:
    figures = json.loads((ROOT / "weights" / "mnist" / "card.json").read_text())
    assert f"mnist@{sha256_of(ROOT / 'weights' / 'mnist' / 'unet' / WEIGHTS_NAME)[:12]}" in README
    assert card.results_table(figures) in README
    assert f"{figures['metrics']['fid_over_floor']['value']:.1f} times what real images reach" in " ".join(
        README.split()
    )


def test_the_student_s_figures_are_its_card_s() -> None:
    metrics = json.loads((ROOT / "weights" / "mnist-2" / "card.json").read_text())["metrics"]
    fid, accuracy = (metrics[name]["value"] for name in ("fid", "label_accuracy"))
    assert f"needs 2 calls (FID {fid:.3f}, label accuracy {accuracy:.4f})" in " ".join(README.split())


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(DDPM_\w+)` \| `([^`]*)` \|", README, re.MULTILINE))
    assert rows == {f"DDPM_{name.upper()}": str(field.default) for name, field in Settings.model_fields.items()}


LINES = re.findall(r"^\$ (?:python|torchrun .*) -m (ddpm_core\.\w+ .*)$", README, re.MULTILINE)


@pytest.mark.parametrize("line", LINES)
def test_every_command_line_parses(line: str) -> None:
    module, *arguments = shlex.split(line)
    modules = {
        "ddpm_core.train": train_options, "ddpm_core.average": average, "ddpm_core.fit_plans": fit_plans,
        "ddpm_core.evaluate": evaluate, "ddpm_core.sweep": sweep, "ddpm_core.distill": distill,
    }  # fmt: skip
    modules[module].build_parser().parse_args(arguments)


@pytest.mark.parametrize("line", re.findall(r"^\$ ddpm (.*)$", README, re.MULTILINE))
def test_every_line_of_ddpm_parses(line: str) -> None:
    name, *arguments = shlex.split(line)
    if name in OFFLINE:
        module = train_options if name == "train" else importlib.import_module(f"ddpm_core.{name.replace('-', '_')}")
        module.build_parser().parse_args(arguments)
    else:
        importlib.import_module(f"app.cli.{name}").build_parser().parse_intermixed_args(arguments)
