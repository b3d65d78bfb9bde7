"""The service as its users have it: a process of its own on a socket, and clients that misbehave."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

import httpx

QUIET_S = 60.0  # for what is nearly instant on a quiet machine


@dataclasses.dataclass
class Server:
    """A running service."""

    process: subprocess.Popen[bytes]
    log: IO[bytes]  # its stderr: a file, because a full pipe would stop it
    url: str = ""

    def logged(self) -> str:
        """What it has written so far."""
        return Path(self.log.name).read_text()

    def get(self, path: str, **options: object) -> httpx.Response:
        return httpx.get(f"{self.url}{path}", timeout=QUIET_S, **options)  # type: ignore[arg-type]

    def post(self, path: str, **options: object) -> httpx.Response:
        return httpx.post(f"{self.url}{path}", timeout=QUIET_S, **options)  # type: ignore[arg-type]

    def metric(self, name: str) -> float:
        """The sum of a metric's samples, of all labels or of those that are given."""
        pattern = rf"ddpm_{re.escape(name)}(\{{.*\}})? "
        return sum(
            float(line.split()[-1]) for line in self.get("/metrics").text.splitlines() if re.match(pattern, line)
        )

    def open_files(self) -> int:
        return len(list(Path(f"/proc/{self.process.pid}/fd").iterdir()))

    def send(self, head: str, body: bytes = b"", length: int | None = None) -> socket.socket:
        """Sends a request on a connection of its own and reads nothing.

        Args:
            head: request line and headers but Host and Content-Length.
            body: what is sent of the body.
            length: what Content-Length says; None: the truth.
        """
        connection = self.connect()
        length = len(body) if length is None else length
        connection.sendall(f"{head}\r\nHost: x\r\nContent-Length: {length}\r\n\r\n".encode() + body)
        return connection

    def connect(self) -> socket.socket:
        host, port = self.url.removeprefix("http://").split(":")
        return socket.create_connection((host, int(port)), timeout=QUIET_S)

    def wait_until_ready(self) -> None:
        until(lambda: self.get("/readyz").status_code == 200, f"it did not become ready: {self.logged()}")

    def wait_until_idle(self, seconds: float = QUIET_S) -> None:
        until(lambda: self.metric("slots_running") + self.metric("slots_waiting") == 0, "slots are not free", seconds)


def environment(**settings: object) -> dict[str, str]:
    """Of a service: any free port on the CPU, unless said otherwise."""
    given = {"port": 0, "device": "cpu", **settings}
    return {**os.environ, **{f"DDPM_{name.upper()}": str(value) for name, value in given.items()}}


@contextlib.contextmanager
def server(
    module: str = "app",
    *arguments: str,
    wait: bool = True,
    before: Callable[[], object] | None = None,
    **settings: object,
) -> Iterator[Server]:
    """A service that listens, and is ready unless `wait` is False. Killed at the end where it still runs.

    Args:
        module: what python -m starts.
        arguments: of its command line.
        wait: until it is ready.
        before: called in the new process before the service is.
        settings: by their names.
    """
    with tempfile.NamedTemporaryFile(suffix=".log") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments], env=environment(**settings), stderr=log, preexec_fn=before
        )
        running = Server(process, log)
        try:

            def listens() -> bool:
                found = re.search(r"running on (http://[^\s\"]+)", running.logged())
                running.url = found[1] if found else ""
                return bool(found) or process.poll() is not None

            until(listens, "it does not listen")
            assert running.url, running.logged()
            if wait:
                running.wait_until_ready()
            yield running
        finally:
            if process.poll() is None:
                process.kill()
            process.wait()


def refused_start(**settings: object) -> subprocess.CompletedProcess[str]:
    """A service that must not start."""
    done = subprocess.run(
        [sys.executable, "-m", "app"], env=environment(**settings), capture_output=True, text=True, timeout=QUIET_S
    )
    assert done.returncode > 0
    assert "Traceback" not in done.stderr
    return done


def until(true: Callable[[], bool], what: str, seconds: float = QUIET_S) -> None:
    """Waits for what must become true."""
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, what
        time.sleep(0.02)
