"""docs/ cannot rot: blocks print what the page says, names and links exist, commands parse, pictures are the plots'."""

from __future__ import annotations

import argparse
import importlib
import io
import re
import runpy
import shlex
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote

import numpy as np
import pytest
from PIL import Image

from app.settings import Settings
from tests.service.process import Server, server
from tests.test_readme import ROOT

CONCEPTS = ROOT / "docs" / "concepts"
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = sorted(CONCEPTS.glob("*.md"))
NUMBER = r"-?\d+\.?\d*(?:e-?\d+)?"
NOT_OURS = {"runs", "data", "dist"}  # of .gitignore: what people make beside the repository


def name_of(path: object) -> str:
    return path.relative_to(ROOT).as_posix() if isinstance(path, Path) else str(path)


FOLDERS = [path for path in ROOT.iterdir() if path.is_dir() and path.name[0] != "." and path.name not in NOT_OURS]
DOCUMENTS = sorted([*ROOT.glob("*.md"), *(path for folder in FOLDERS for path in folder.rglob("*.md"))])


def blocks(text: str, kind: str) -> list[str]:
    return re.findall(rf"^```{kind}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def prose(path: Path) -> str:
    """A document without its blocks and code, in which brackets are no links."""
    text = re.sub(r"^```.*?^```", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]+`", "", text)


def links(path: Path) -> list[str]:
    """What its links and pictures name, those of the web left out."""
    found = re.findall(r"\]\(([^)\s]+)\)", prose(path))
    return [unquote(target) for target in found if not re.match(r"[a-z]+:", target)]


def anchors(path: Path) -> set[str]:
    """The names that GitHub gives to the headings of a document."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


# Names and links


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_every_link_and_picture_is_there(path: Path) -> None:
    for link in links(path):
        target, _, anchor = link.partition("#")
        file = path.parent / target if target else path
        assert file.exists(), f"{link} is not there"
        assert not anchor or anchor in anchors(file), f"{link}: there is no such heading"


def test_links_are_seen() -> None:
    assert "docs/decisions/001-samplers-are-plans.md" in links(ROOT / "README.md")
    assert "forward.png" in links(CONCEPTS / "01-forward-process.md")
    assert "load" in anchors(ROOT / "docs" / "reliability.md")


@pytest.mark.parametrize("path", [*PAGES, TUTORIAL], ids=name_of)
def test_every_name_of_the_library_exists(path: Path) -> None:
    for name in sorted(set(re.findall(r"\bddpm_core(?:\.\w+)+", path.read_text()))):
        parts = name.split(".")
        modules = [n for n in range(1, len(parts) + 1) if (ROOT / Path(*parts[:n])).with_suffix(".py").is_file()]
        module = ".".join(parts[: max(modules, default=1)])
        found: Any = importlib.import_module(module)
        for attribute in parts[max(modules, default=1) :]:
            found = getattr(found, attribute)


def test_every_page_is_in_the_index_and_has_its_parts() -> None:
    assert set(links(CONCEPTS / "README.md")) >= {page.name for page in PAGES} - {"README.md"}
    for page in PAGES:
        if page.name != "README.md":
            text = page.read_text()
            assert blocks(text, "math"), page
            assert blocks(text, "python"), page
            assert "**What to notice.**" in text, page
            assert re.search(r"^!\[[^\]]+\]\([\w-]+\.png\)$", text, re.MULTILINE), page


# Blocks


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working directory with the shipped weights."""
    (tmp_path / "weights").symlink_to(ROOT / "weights")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "README.md"], ids=name_of)
def test_every_python_block_prints_what_is_shown(page: Path, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    text = page.read_text()
    shown = re.findall(r"^```python\n(.*?)^```\n\n```text\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    assert len(shown) == len(blocks(text, "python"))
    for code, output in shown:
        exec(compile(code, str(page), "exec"), {"__name__": "block"})
        printed = capsys.readouterr().out
        assert re.sub(NUMBER, "#", printed) == re.sub(NUMBER, "#", output)
        found, wanted = (np.array(re.findall(NUMBER, text), float) for text in (printed, output))
        assert found == pytest.approx(wanted, rel=0.02)  # another processor may round a last digit differently


@pytest.fixture(scope="module")
def service() -> Iterator[Server]:
    with server(model=ROOT / "weights" / "mnist") as it:
        yield it


def test_every_curl_and_python_block_of_the_tutorial_works(service: Server, folder: Path) -> None:
    """In their order, against the shipped model: a reader's own has no such figures, but takes the same requests."""
    found = re.findall(r"^```(bash|python)\n(.*?)^```", TUTORIAL.read_text(), re.MULTILINE | re.DOTALL)
    assert {kind for kind, _ in found} == {"bash", "python"}
    for kind, block in found:
        code = block.replace("http://127.0.0.1:8000", service.url)
        if kind == "python":
            exec(compile(code, str(TUTORIAL), "exec"), {"__name__": "block"})
        else:
            script = code.replace("curl ", "curl --fail-with-body -sS ")
            subprocess.run(["bash", "-euo", "pipefail", "-c", script], cwd=folder, check=True, timeout=60)
    assert (folder / "seven.png").read_bytes() == (folder / "again.png").read_bytes()
    for picture in folder.glob("*.png"):
        Image.open(picture).verify()


# Commands


class Parsed(Exception):
    """A command line was understood, and is not carried out."""


def understood(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Holds `python -m MODULE ...` to the parser that the module's main() makes. SystemExit where it is refused."""
    module, *arguments = shlex.split(line)
    parse = argparse.ArgumentParser.parse_args

    def parse_alone(self: argparse.ArgumentParser, args: list[str] | None = None) -> None:
        parse(self, args)
        raise Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_alone)
    with pytest.raises(Parsed):
        importlib.import_module(module).main(arguments)


def test_a_wrong_command_line_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SystemExit):
        understood("ddpm_core.train --data nothing", monkeypatch)


COMMANDS = re.findall(r"^\$ (.*)$", "\n".join(page.read_text() for page in [*PAGES, TUTORIAL]), re.MULTILINE)
TARGETS = re.findall(r"^([\w./-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)


@pytest.mark.parametrize("line", COMMANDS)
def test_every_command_line_parses(line: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = shlex.split(line, comments=True)
    while re.fullmatch(r"[A-Z_]+=.*", words[0]):
        name = words.pop(0).partition("=")[0]
        assert name.removeprefix("DDPM_").lower() in Settings.model_fields, f"{name} is no setting"
    if words[:2] == ["python", "-m"]:
        understood(shlex.join(words[2:]), monkeypatch)
    elif words[0] == "make":
        assert {word for word in words[1:] if "=" not in word} <= set(TARGETS), f"{line}: no such target"
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file() or words[1] in TUTORIAL.read_text().replace(line, "")
    else:
        assert words[0] in {".", "docker"}, f"nobody checks {line!r}"
        for name in re.findall(r"DDPM_(\w+)=", line):
            assert name.lower() in Settings.model_fields, f"DDPM_{name} is no setting"


# Pictures


@pytest.fixture(scope="module")
def plots() -> dict[str, Any]:
    """What docs/plots.py defines; nothing is drawn."""
    return runpy.run_path(str(ROOT / "docs" / "plots.py"))


def test_every_picture_is_made_by_plots_and_shown(plots: dict[str, Any]) -> None:
    lying = {path.name for path in CONCEPTS.iterdir() if path.suffix != ".md"}
    assert set(plots["PICTURES"]) == lying
    shown = [link for page in PAGES for link in links(page) if link.endswith(".png")]
    assert sorted(shown) == sorted(lying)


def test_pictures_are_small() -> None:
    sizes = {path.name: path.stat().st_size for path in CONCEPTS.glob("*.png")}
    assert max(sizes.values()) < 100_000
    assert sum(sizes.values()) < 1_000_000


@pytest.mark.parametrize("name", ["schedules.png", "order.png", "unet.png", "spacings.png"])
def test_a_picture_drawn_anew_is_the_one_that_lies_there(plots: dict[str, Any], name: str) -> None:
    """Of those that need no network call. A tenth of the paper is ink: another curve or box is more than 1 %."""
    lying, new = Image.open(CONCEPTS / name), Image.open(io.BytesIO(plots["make"](name)))
    assert lying.size == new.size
    different = np.abs(np.subtract(*(np.asarray(i.convert("L"), dtype=np.int16) for i in (lying, new)))) > 64
    assert different.mean() < 0.002
