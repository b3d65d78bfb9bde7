"""The command in this process and as a process, and one service that it started and asks."""

from __future__ import annotations

import dataclasses
import fcntl
import io
import os
import pty
import re
import signal
import struct
import subprocess
import sys
import termios
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest
from PIL import Image

from app.cli import main
from app.engine import engine, selfcheck
from app.engine.runner import Runner
from tests.service.process import QUIET_S, Server, server, until

KEY = "a-key-of-the-tests"
COMMAND = [sys.executable, "-m", "app.cli"]


@pytest.fixture(scope="session")
def served(model_dir: Path) -> Iterator[Server]:
    """The tiny model, served by `ddpm serve` with a small queue and a key; its options override the environment."""
    options = ("serve", "--model", str(model_dir), "--port", "0", "--device", "cpu")
    settings = {"model": "nowhere", "port": 1, "device": "nothing", "queue_slots": 64, "api_keys": KEY}
    with server("app.cli", *options, **settings) as running:
        yield running
        running.process.send_signal(signal.SIGTERM)
        assert running.process.wait(QUIET_S) == 0


@pytest.fixture
def direct(served: Server) -> Callable[..., bytes]:
    """Asks the service as anybody would, without the command."""

    def ask(path: str, body: dict[str, Any], accept: str, image: bytes | None = None) -> bytes:
        headers = {"authorization": f"Bearer {KEY}", "accept": accept}
        given: dict[str, Any] = {"json": body}
        if image is not None:
            given = {"data": {k: str(v) for k, v in body.items()}, "files": {"image": image}}
        answer = httpx.post(served.url + path, headers=headers, timeout=QUIET_S, **given)
        assert answer.status_code == 200, answer.text
        return answer.content

    return ask


@dataclasses.dataclass
class Ran:
    code: int
    out: str
    err: str

    @property
    def problem(self) -> str:
        """The one line of a command that could not do what it was asked for."""
        assert self.code == 2, self.err
        assert re.fullmatch(r"error: [^\n]+\n", self.err), self.err
        return self.err


@pytest.fixture(scope="session")
def checked() -> Any:
    """Looks at what the machine does with the tiny model once: the same is found at every start."""
    found: list[Any] = []

    def prepare(runner: Runner, exact: bool, batch_rows: int | None, brief: bool) -> Any:
        if not found:
            found.extend(selfcheck.prepare(runner, exact, batch_rows, brief))
        runner.pad_to(found[0].rows_multiple)
        return found

    return prepare


@pytest.fixture
def ddpm(
    capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, checked: Any, model_dir: Path, tmp_path: Path
) -> Any:
    """Runs a command line in this process, on the tiny model, in an empty folder."""
    monkeypatch.setattr(engine, "prepare", checked)
    monkeypatch.setenv("DDPM_MODEL", str(model_dir))
    monkeypatch.setenv("DDPM_DEVICE", "cpu")
    monkeypatch.chdir(tmp_path)

    def run(*words: str) -> Ran:
        capfd.readouterr()
        code = main(words)
        return Ran(code, *capfd.readouterr())

    return run


@pytest.fixture
def at(served: Server) -> list[str]:
    """Options that ask the service."""
    return ["--url", served.url, "--api-key", KEY]


@pytest.fixture
def place(request: pytest.FixtureRequest) -> list[str]:
    """Options of where to ask, by the parameter "here" or "service"."""
    return [] if request.param == "here" else request.getfixturevalue("at")


everywhere = pytest.mark.parametrize("place", ["here", "service"], indirect=True)


@pytest.fixture(scope="session")
def picture() -> bytes:
    """A small one in colour."""
    buffer = io.BytesIO()
    Image.effect_noise((30, 40), 60).convert("RGB").save(buffer, "PNG")
    return buffer.getvalue()


def hear_ctrl_c() -> None:
    """What shells start in the background ignores it, and so would the commands of a test run there."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


class Terminal:
    """A command whose stderr (and stdout, if wanted) is a terminal."""

    def __init__(self, *words: str, stdout: bool = False, **settings: object) -> None:
        self._ours, theirs = pty.openpty()
        fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 100, 0, 0))
        environment = {**os.environ, **{f"DDPM_{k.upper()}": str(v) for k, v in settings.items()}}
        to = theirs if stdout else subprocess.DEVNULL
        self.process = subprocess.Popen(
            [*COMMAND, *words], stderr=theirs, stdout=to, env=environment, preexec_fn=hear_ctrl_c
        )  # fmt: skip
        os.close(theirs)
        self.text = ""

    def read(self) -> bool:
        """Reads what comes next. False: that was all."""
        try:
            piece = os.read(self._ours, 4096)
        except OSError:  # Linux's way of saying so
            piece = b""
        self.text += piece.decode(errors="replace")
        return bool(piece)

    def read_until(self, text: str) -> None:
        until(lambda: text in self.text or not self.read(), f"it does not say {text}")
        assert text in self.text, self.text

    def end(self) -> int:
        """Reads all; its exit code."""
        while self.read():
            pass
        os.close(self._ours)
        return self.process.wait(QUIET_S)
