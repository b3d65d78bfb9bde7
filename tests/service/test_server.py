"""The real process on a real socket: `python -m app`."""

from __future__ import annotations

import os
import re
import signal
import socket
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


@pytest.mark.parametrize("by", [signal.SIGTERM, signal.SIGINT])
def test_the_service_draws_a_digit_and_ends_cleanly(model_dir: Path, by: signal.Signals) -> None:
    with server(model=model_dir) as (process, url):
        wait_until_ready(url)
        response = httpx.post(f"{url}/generate", json={"label": 7, "seed": 1}, timeout=60)
        assert response.status_code == 200
        assert pixels(response.content).shape == (28, 28)
        process.send_signal(by)
        process.wait(30)
        assert process.returncode == 0
        assert process.stderr is not None
        assert "Traceback" not in process.stderr.read()


def test_a_client_that_leaves_while_it_sends_is_no_error(model_dir: Path) -> None:
    """Nor is a half-sent upload a reason to stay: the drain time holds."""
    with server(model=model_dir, drain_s=0.5) as (process, url):
        wait_until_ready(url)
        host, port = url.removeprefix("http://").split(":")
        head = b"POST /noise HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=a\r\n"
        with socket.create_connection((host, int(port))) as leaving:
            leaving.sendall(head + b"Content-Length: 1000\r\n\r\n--a")
            time.sleep(0.2)
        assert httpx.get(f"{url}/health", timeout=60).status_code == 200
        with socket.create_connection((host, int(port))) as staying:
            staying.sendall(head + b"Content-Length: 1000\r\n\r\n--a")
            time.sleep(0.2)
            process.send_signal(signal.SIGTERM)
            process.wait(15)
        assert process.returncode == 0
        assert process.stderr is not None
        assert "unexpected error" not in process.stderr.read()


@pytest.mark.parametrize(
    ("settings", "what"),
    [
        ({"model": "/nonexistent"}, "no model directory at /nonexistent"),
        ({"port": "x"}, "DDPM_PORT"),
        ({"drain_s": "inf"}, "DDPM_DRAIN_S"),
        ({"queue_slots": "3"}, "DDPM_QUEUE_SLOTS=3 must be at least"),
    ],
)
def test_what_cannot_start_says_why_in_one_line(settings: dict[str, str], what: str) -> None:
    env = {**os.environ, "DDPM_PORT": "0", **{f"DDPM_{k.upper()}": v for k, v in settings.items()}}
    done = subprocess.run([sys.executable, "-m", "app"], env=env, capture_output=True, text=True, timeout=60)
    assert done.returncode not in (0, -signal.SIGKILL)
    assert what in done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr
