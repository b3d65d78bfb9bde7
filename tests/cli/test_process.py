"""The command as a process: terminals, pipes, signals, its start."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import COMMAND, KEY, Terminal, hear_ctrl_c
from tests.service.process import QUIET_S, Server, environment, until

PNG = b"\x89PNG"


def test_a_terminal_sees_progress(served: Server, at: list[str], tmp_path: Path) -> None:
    """The service is asked how far it is; the bar goes away, and what made the image stays."""
    shown = Terminal("generate", "-n", "16", "--sampler", "ddpm", "--steps", "150", "-o", f"{tmp_path}/x.png", *at)
    assert shown.end() == 0
    assert re.search(r"\r +\d+% \|.+\| step [\d,]+ of 150  \d+\.\d s left", shown.text)
    last = shown.text.replace("\r\n", "\n").split("\r")[-1]
    assert re.fullmatch(r"\S+x\.png: seed \d+, model tiny@\w+, sampler ddpm, steps 150\n", last)


def test_ctrl_c_here_ends_at_once(model_dir: Path) -> None:
    shown = Terminal("generate", "-n", "500", "--sampler", "reference", model=model_dir, device="cpu")
    shown.read_until("loading")
    shown.read_until(" of 1,000")
    shown.process.send_signal(signal.SIGINT)
    assert shown.end() == 130
    assert "Traceback" not in shown.text
    assert not Path("out.png").exists()


def test_ctrl_c_ends_the_request_at_the_service(served: Server) -> None:
    process = subprocess.Popen(
        [*COMMAND, "generate", "-n", "64", "--sampler", "reference", "--url", served.url],
        env={**os.environ, "DDPM_API_KEY": KEY}, stderr=subprocess.PIPE, preexec_fn=hear_ctrl_c,
    )  # fmt: skip
    until(lambda: served.metric("slots_running") > 0, "it does not begin")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=QUIET_S)
    assert (process.returncode, err) == (130, b"")
    served.wait_until_idle()
    assert "DELETE /requests/" in served.logged()


@pytest.mark.parametrize("quiet", [False, True])
def test_no_progress_where_nobody_looks(at: list[str], tmp_path: Path, quiet: bool) -> None:
    words = ["generate", "--seed", "1", "-o", f"{tmp_path}/x.png", *at]
    if quiet:
        shown = Terminal(*words, "--quiet")
        assert (shown.end(), shown.text) == (0, "")
    else:
        done = subprocess.run([*COMMAND, *words], capture_output=True, text=True, timeout=QUIET_S)
        assert re.fullmatch(r"\S+x\.png: seed 1, .*\n", done.stderr)


def test_pipes(at: list[str], direct: Callable[..., bytes]) -> None:
    """An image from stdout to stdin, with the bytes that files have."""

    def run(given: bytes, *words: str) -> subprocess.CompletedProcess[bytes]:
        return subprocess.run([*COMMAND, *words, "-o", "-", *at], input=given, capture_output=True, check=True)

    drawn = run(b"", "generate", "7", "--seed", "1").stdout
    assert drawn == direct("/generate", {"label": 7, "seed": 1}, "image/png")
    denoised = run(drawn, "denoise", "-", "3", "--t", "500", "--seed", "1").stdout
    assert denoised == direct("/denoise", {"label": 3, "t": 500, "seed": 1}, "image/png", drawn)
    noised = run(drawn, "noise", "-", "--t", "5")
    assert noised.stdout.startswith(PNG)
    assert noised.stderr.startswith(b"stdout: seed ")


def test_a_reader_that_leaves_hears_nothing(at: list[str]) -> None:
    words = ["generate", "-n", "64", "--scale", "8", "-q", "-o", "-", *at]
    reader, writer = os.pipe()
    os.close(reader)
    done = subprocess.run([*COMMAND, *words], stdout=writer, stderr=subprocess.PIPE, timeout=QUIET_S)
    os.close(writer)
    assert (done.returncode, done.stderr) == (141, b"")


def test_a_terminal_is_no_place_for_a_picture(at: list[str]) -> None:
    shown = Terminal("generate", "-o", "-", *at, stdout=True)
    assert shown.end() == 2
    assert "stdout is a terminal" in shown.text


def test_serve_ends_with_the_exit_code_of_the_service() -> None:
    words = ["serve", "--model", "nowhere"]
    done = subprocess.run([*COMMAND, *words], env=environment(), capture_output=True, text=True, timeout=QUIET_S)
    assert done.returncode == 1
    assert done.stderr.splitlines()[-1].startswith("error: no model directory at nowhere")


# Its start

FREE_OF = ("torch", "numpy", "fastapi", "pydantic", "PIL")


def test_help_and_asking_a_service_start_fast(served: Server, tmp_path: Path) -> None:
    """In a tenth of a second on a quiet machine; the bound is for a busy one."""
    script = f"""
import sys
from app.cli import main
assert main(["--help"]) == main(["generate", "--help"]) == main(["--version"]) == 0
assert main(["generate", "--seed", "1", "-o", {str(tmp_path / "x.png")!r}, "--url", {served.url!r}]) == 0
assert main(["info", "--url", {served.url!r}]) == 0
assert not {set(FREE_OF)} & set(sys.modules)
"""
    start = time.monotonic()
    subprocess.run(
        [sys.executable, "-c", script], check=True, stdout=subprocess.DEVNULL, env={**os.environ, "DDPM_API_KEY": KEY}
    )
    assert time.monotonic() - start < 3
    assert (tmp_path / "x.png").read_bytes().startswith(PNG)
