"""The contenders of serving.py as child processes, each on a free port of its own."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO

import httpx

from benchmarks.machine import ROOT, version

START_S = 90.0
END_S = 3.0  # what is left is of no interest: a server that still drains is killed


@dataclasses.dataclass(frozen=True)
class Contender:
    """A server, and how it is started."""

    module: str
    ready: str = "/readyz"
    env: Mapping[str, str] = dataclasses.field(default_factory=dict)
    needs: tuple[str, ...] = ()

    @property
    def installed(self) -> bool:
        return all(version(library) for library in self.needs)


CONTENDERS = {
    "ours": Contender("app"),
    "ours_unbatched": Contender("app", env={"DDPM_BATCH_ROWS": "1"}),
    "ours_whole_requests": Contender("benchmarks.contenders.whole_requests"),
    "plain": Contender("benchmarks.contenders.plain", "/health", needs=("diffusers",)),
    "litserve": Contender("benchmarks.contenders.lit", "/health", needs=("diffusers", "litserve")),
}


@dataclasses.dataclass(frozen=True)
class Server:
    """A process that serves."""

    url: str
    process: subprocess.Popen[bytes]
    output: IO[str]

    def printed(self) -> str:
        """What it has written so far."""
        return Path(f"/proc/self/fd/{self.output.fileno()}").read_text()  # opened anew: they share the place in it


def _free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port: int = s.getsockname()[1]
        return port


@contextlib.contextmanager
def running(contender: Contender) -> Iterator[Server]:
    """A fresh process that is ready. Ended at the end, with all that it started.

    Raises:
        RuntimeError: it did not become ready.
    """
    port = _free_port()
    env = {name: value for name, value in os.environ.items() if not name.startswith("DDPM_")}  # defaults are defaults
    env |= {"DDPM_PORT": str(port), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT), **contender.env}
    with tempfile.TemporaryFile("w+") as output:
        process = subprocess.Popen(
            [sys.executable, "-m", contender.module], cwd=ROOT, env=env, stdout=output, stderr=output,
            process_group=0,  # LitServe starts processes of its own: all of them are ended by this handle
        )  # fmt: skip
        server = Server(f"http://127.0.0.1:{port}", process, output)
        try:
            if not _ready(process, server.url + contender.ready):
                raise RuntimeError(f"{contender.module} did not start:\n{server.printed()[-2000:]}")
            yield server
        finally:
            _end(process)


@contextlib.contextmanager
def serving(contender: Contender) -> Iterator[str]:
    """The same by its URL, for those who want no more of it."""
    with running(contender) as server:
        yield server.url


def _ready(process: subprocess.Popen[bytes], url: str) -> bool:
    give_up = time.monotonic() + START_S
    while process.poll() is None and time.monotonic() < give_up:
        with contextlib.suppress(httpx.HTTPError):
            if httpx.get(url, timeout=5, trust_env=False).status_code == 200:
                return True
        time.sleep(0.1)
    return False


def health(url: str) -> dict[str, object] | None:
    """What our servers say of their engine: rows of a step, runtime, exactness. None: another server."""
    answer = httpx.get(f"{url}/health", timeout=5, trust_env=False)
    if answer.headers.get("Content-Type") != "application/json" or not isinstance(said := answer.json(), dict):
        return None
    engine: dict[str, object] | None = said.get("engine")
    return engine


def _end(process: subprocess.Popen[bytes]) -> None:
    for how in (signal.SIGTERM, signal.SIGKILL):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, how)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(END_S)
