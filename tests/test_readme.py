"""README.md cannot rot: its code blocks run, its settings table is the code's, its commands parse."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from app.settings import Settings
from ddpm_core import card, evaluate, train
from tests.service.test_server import server, wait_until_ready

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def blocks(kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def test_every_curl_block_works_against_the_real_service(tmp_path: Path) -> None:
    """In their order and one folder: later ones use what earlier ones wrote."""
    assert len(blocks("bash")) >= 4
    with server(model=ROOT / "weights" / "mnist") as (_, url):
        wait_until_ready(url)
        for block in blocks("bash"):
            script = block.replace("http://127.0.0.1:8000", url).replace("curl ", "curl --fail-with-body -sS ")
            subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=tmp_path, check=True, timeout=300)
    for name in ("seven.png", "any.png", "grid.png", "strip.png"):
        assert (tmp_path / name).read_bytes().startswith(b"\x89PNG")


def test_every_python_block_runs(tmp_path: Path) -> None:
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    assert blocks("python")
    for block in blocks("python"):
        subprocess.run([sys.executable, "-c", block], cwd=tmp_path, check=True, timeout=300)
    assert (tmp_path / "seven.png").exists()


def test_the_results_are_the_cards() -> None:
    figures = json.loads((ROOT / "weights" / "mnist" / "card.json").read_text())
    assert card.results_table(figures) in README
    assert f"{figures['metrics']['fid_over_floor']['value']:.1f} times what real images reach" in " ".join(
        README.split()
    )


def test_every_setting_is_in_the_table_with_its_default() -> None:
    rows = dict(re.findall(r"^\| `(DDPM_\w+)` \| `([^`]*)` \|", README, re.MULTILINE))
    assert rows == {f"DDPM_{name.upper()}": str(field.default) for name, field in Settings.model_fields.items()}


@pytest.mark.parametrize("line", re.findall(r"^\$ python -m (ddpm_core\.\w+ .*)$", README, re.MULTILINE))
def test_every_command_line_parses(line: str) -> None:
    module, *arguments = shlex.split(line)
    {"ddpm_core.train": train, "ddpm_core.evaluate": evaluate}[module].build_parser().parse_args(arguments)
