"""The real process on a real socket: `python -m app`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import pytest

from tests.service.conftest import pixels


@contextmanager
def server(**settings: object) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """A running service and its URL; any free port."""
    env = {
        **os.environ,
        "DDPM_PORT": "0",
        "DDPM_DEVICE": "cpu",
        **{f"DDPM_{k.upper()}": str(v) for k, v in settings.items()},
    }
    process = subprocess.Popen([sys.executable, "-m", "app"], env=env, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    try:
        url = ""
        for line in process.stderr:
            if match := re.search(r"running on (http://\S+)", line):
                url = match[1]
                break
        yield process, url
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()
        process.stderr.close()


def wait_until_ready(url: str) -> None:
    deadline = time.monotonic() + 60
    while httpx.get(f"{url}/readyz", timeout=60).status_code != 200:
        assert time.monotonic() < deadline, "the service did not become ready in a minute"
        time.sleep(0.1)


def test_the_service_draws_a_digit_and_ends_cleanly(model_dir: Path) -> None:
    with server(model=model_dir) as (process, url):
        wait_until_ready(url)
        response = httpx.post(f"{url}/generate", json={"label": 7, "seed": 1}, timeout=60)
        assert response.status_code == 200
        assert pixels(response.content).shape == (28, 28)
        process.send_signal(signal.SIGTERM)
        process.wait(30)
        assert process.returncode in (0, -signal.SIGTERM)


@pytest.mark.parametrize(
    ("settings", "what"),
    [({"model": "/nonexistent"}, "no model directory at /nonexistent"), ({"port": "x"}, "DDPM_PORT")],
)
def test_what_cannot_start_says_why_in_one_line(settings: dict[str, str], what: str) -> None:
    env = {**os.environ, "DDPM_PORT": "0", **{f"DDPM_{k.upper()}": v for k, v in settings.items()}}
    done = subprocess.run([sys.executable, "-m", "app"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert what in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
