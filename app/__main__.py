"""`python -m app`: the service on one process, configured by DDPM_* environment variables."""

from __future__ import annotations

import contextlib
import ctypes
import logging
import logging.config
import math
import os
import resource
import sys
import time
from types import FrameType
from typing import NoReturn

import uvicorn
from pydantic import ValidationError

from app import logs
from app.connections import SPARE, bounded
from app.engine.engines import Engines
from app.jobs import Jobs
from app.main import LAST_WORDS_S, ONE_PROCESS, create_app
from app.settings import Settings, wrong

log = logging.getLogger("app")

OTHER_FILES = 256  # than connections: weights, libraries
M_MMAP_THRESHOLD, LARGE_BYTES = -3, 2**21  # of mallopt(3); no step of the shipped model takes as much at once
SECOND_SIGNAL_S = 1.0  # signals closer than this are one: shells and supervisors send some twice


class Server(uvicorn.Server):
    """uvicorn, but its listener stays open while accepted work is finished: probes and new clients get an answer."""

    def __init__(self, config: uvicorn.Config, engines: Engines, jobs: Jobs, drain_s: float) -> None:
        super().__init__(config)
        self.engines, self.jobs, self.drain_s = engines, jobs, drain_s
        self.signalled_at: float | None = None

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """The first signal drains, a second one ends at once. Runs between two bytecodes: it only takes notes."""
        now = time.monotonic()
        if self.signalled_at is None:
            self.signalled_at = now
        elif now - self.signalled_at > SECOND_SIGNAL_S:
            os._exit(1)  # a request, a thread or a lifespan that hangs must not hold it

    async def on_tick(self, counter: int) -> bool:
        """Ten times a second: ends the service once nothing accepted is left, or the drain time is up."""
        if self.signalled_at is not None and not self.should_exit:
            self.engines.drain()
            left_s = self.signalled_at + self.drain_s - time.monotonic()
            if (self.engines.idle and self.jobs.settled) or left_s <= 0:
                self.config.timeout_graceful_shutdown = max(LAST_WORDS_S, math.ceil(left_s))
                self.engines.stop(0)
                self.should_exit = True
        return await super().on_tick(counter)


def _files_for(connections: int) -> int:
    """Raises the process's own limit of open files, which connections are, as far as it may; how many it left."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY:
        return connections
    wanted = connections + OTHER_FILES
    allowed = wanted if hard == resource.RLIM_INFINITY else min(wanted, hard)
    if soft < allowed:
        resource.setrlimit(resource.RLIMIT_NOFILE, (allowed, hard))
    if allowed < wanted:
        log.warning("open files are limited to %d: not all of DDPM_MAX_CONNECTIONS can be used", allowed)
    return max(soft, allowed) - OTHER_FILES


def _give_memory_back() -> None:
    """Keeps glibc from keeping what large uploads took.

    It hands blocks above some size straight back to the system, and raises that size to 32 MiB by itself: what is
    smaller stays in heaps that each thread has, half as much again as the service needs (docs/log.md).
    """
    with contextlib.suppress(AttributeError):  # another C library
        ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, LARGE_BYTES)


def main() -> int:
    try:
        settings = Settings()
    except ValidationError as error:
        for line in wrong(error):
            print(f"error: {line}", file=sys.stderr)
        return 2
    app = create_app(settings)
    engines: Engines = app.state.engines
    logging.config.dictConfig(logs.CONFIG)
    files = _files_for(settings.max_connections + SPARE)
    config = uvicorn.Config(
        app, host=settings.host, port=settings.port, http=bounded(settings, app.state.metrics, files), ws="none",
        server_header=False, h11_max_incomplete_event_size=settings.max_header_bytes, log_config=None,
    )  # fmt: skip
    if config.workers > 1:
        print(f"error: WEB_CONCURRENCY={config.workers}: {ONE_PROCESS}", file=sys.stderr)
        return 2
    _give_memory_back()
    server = Server(config, engines, app.state.jobs, settings.drain_s)

    def on_failure(error: BaseException) -> None:
        if not engines.ready:  # a model that cannot be loaded: nothing to serve
            server.should_exit = True

    engines.on_failure(on_failure)
    try:
        server.run()
    except SystemExit:  # uvicorn's way out where it cannot listen: ours must not wait for a thread that loads
        return 1
    if engines.failure is not None:
        print(f"error: {engines.failure}", file=sys.stderr)
        return 1
    return 0


def end(code: int) -> NoReturn:
    """Ends the process: an upload's thread that is still at work must not hold it."""
    logging.shutdown()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    end(main())
