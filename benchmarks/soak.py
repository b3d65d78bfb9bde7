"""A long mixed load on one process of the service: every byte right, nothing lost, nothing kept.

What: `python -m app` with short bounds gets a catalogue of requests (catalogue.py) in random order: /generate and
/denoise in all forms of answers, /noise, /images, what is refused, probes; some are ended on their way by DELETE. One
client in ten leaves: while it sends, while it waits or is drawn, or while it reads. Promised, and checked:
  bytes      every answer is that of the same request alone in another process; in JSON all but `created`, of an event
             stream `completed` and every preview, of a refusal its status and type; or it is a 429 of a full queue
  none lost  every client that stays is answered, and the engine has accepted as many requests as clients know of (of
             those that left while they waited, and of /images that others asked for too, nobody knows)
  none kept  afterwards no slot is taken, the budgets of uploads are whole, there are as many threads and open files as
             before, and resident memory has not grown by 5 % since the warm-up (medians of the first and last tenth)
  quiet      no traceback and no error in the log, and SIGTERM ends it with 0
How: references are drawn first, one by one, by a process that ends before the soak starts. Then eight clients find in a
closed loop what the service can do, and for the rest of the time requests come at the times of a Poisson process of
65 % of that, with bursts of 300 at once. The warm-up is the first tenth, ten seconds at least.
On what: --model, any of ten classes that is not distilled, over loopback HTTP; this client shares the cores.

    python benchmarks/soak.py [--seconds 1200] [--model weights/mnist]

Prints a line each ten seconds; exits 1 where a promise was broken. --seconds and two minutes.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from app.settings import Settings
from benchmarks import wire
from benchmarks.catalogue import Request, blank, catalogue, form
from benchmarks.crowd import ANSWER_S, SEED, Crowd, References, references_of
from benchmarks.machine import MODEL, busy_cores, print_json, table
from benchmarks.servers import CONTENDERS, Server, running

BOUNDS = {"DDPM_QUEUE_SLOTS": "128", "DDPM_QUEUE_S": "2"}  # a burst must be more than they take
REQUESTS = 132  # of the catalogue that are served
LOAD = 0.65  # of the capacity
CALIBRATION, CALIBRATION_S = 1 / 6, 20.0  # share of the time, and its most
BURST_EVERY, BURST_EVERY_S = 1 / 4, 30.0
WARM_UP, WARM_UP_S = 0.1, 10.0  # share of the time, and its least
WATCH_S, SAY_S = 0.5, 10.0
GROWTH, WINDOWS, FEWEST = 0.05, 10, 10  # medians of fewer samples tell nothing
SLOTS_S, SETTLE_S = 5.0, 30.0  # pools end threads that were idle for ten seconds
HOLD_S = 2.0  # until the server has read what was sent
END_S = 70.0  # more than DDPM_DRAIN_S
MOST_TOLD = 5
OUTCOMES = ("asked", "right", "refused", "ended", "left", "wrong")
PROGRESS = ("seconds", *OUTCOMES, "lost", "waiting", "slots", "RSS MB", "files", "threads")

Figures = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Sample:
    """A look at the server."""

    at_s: float
    rss_mb: float
    files: int
    threads: int
    metrics: Mapping[str, float]  # by name and labels

    def total(self, name: str) -> float:
        """Of all its labels together."""
        return sum(value for key, value in self.metrics.items() if key.partition("{")[0] == name)

    @property
    def slots(self) -> float:
        return self.total("ddpm_slots_running") + self.total("ddpm_slots_waiting")


class Watch:
    """Looks at a server's process and at its metrics."""

    def __init__(self, server: Server, pool: wire.Pool) -> None:
        self.proc, self.pool, self.began = Path("/proc", str(server.process.pid)), pool, time.monotonic()
        self.samples: list[Sample] = []

    async def look(self) -> Sample:
        """Raises OSError or EOFError where the server does not answer."""
        async with asyncio.timeout(ANSWER_S):
            text = (await self.pool.ask(wire.request("GET", "/metrics"))).body.decode()
        lines = (line.rpartition(" ") for line in text.splitlines() if not line.startswith("#"))
        status = dict(re.findall(r"(VmRSS|Threads):\s+(\d+)", (self.proc / "status").read_text()))
        return Sample(
            round(time.monotonic() - self.began, 2), int(status["VmRSS"]) / 1024,
            len(list((self.proc / "fd").iterdir())), int(status["Threads"]),
            {name: float(value) for name, _, value in lines},
        )  # fmt: skip

    async def follow(self, crowd: Crowd) -> None:
        """Looks until it is cancelled, and says how it goes."""
        print("".join(f"{name:>9}" for name in PROGRESS), file=sys.stderr)
        said_s = 0.0
        while True:
            self.samples.append(now := await self.look())
            if now.at_s >= said_s:
                said_s += SAY_S
                values = (
                    now.at_s, *(crowd.counts[outcome] for outcome in OUTCOMES), len(crowd.lost),
                    crowd.in_flight.total(), now.slots, now.rss_mb, now.files, now.threads,
                )  # fmt: skip
                print("".join(f"{value:9.0f}" for value in values), file=sys.stderr)
            await asyncio.sleep(WATCH_S)

    async def until(self, enough: Callable[[Sample], bool], seconds: float) -> Sample:
        """What is there once that is enough, or the time is up."""
        until = time.monotonic() + seconds
        while not enough(now := await self.look()) and time.monotonic() < until:
            await asyncio.sleep(WATCH_S)
        return now

    async def idle(self, enough: Callable[[Sample], bool] = lambda now: True, seconds: float = 0.0) -> Sample:
        """The same after requests for which pools begin the threads that they keep, and end others in time."""
        until = time.monotonic() + seconds
        headers, body = form({"t": 1, "fit": "model"}, blank(500))
        upload = wire.request("POST", "/noise", headers, body)
        while True:
            async with wire.pool(self.pool.url) as pool:
                await asyncio.gather(*(pool.ask(upload) for _ in range(2 * (os.cpu_count() or 1))))
                await pool.ask(wire.request("POST", "/generate"))
            await asyncio.sleep(WATCH_S)
            if enough(now := await self.look()) or time.monotonic() > until:
                return now

    def windows(self, after_s: float) -> list[list[Sample]]:
        """The samples since then in equal parts."""
        values = [sample for sample in self.samples if sample.at_s >= after_s]
        count = min(WINDOWS, len(values))
        edges = [len(values) * k // count for k in range(count + 1)]
        return [values[a:b] for a, b in itertools.pairwise(edges)]


async def kept_of_uploads(url: str) -> list[str]:
    """Which budgets of uploads are not whole: each is asked for at once, to its last part."""
    limits = Settings.model_construct()  # the defaults, whatever the environment has

    async with wire.pool(url) as pool:

        async def refused(count: int, side: int) -> bool:
            headers, body = form({"t": 1, "fit": "model"}, blank(side))
            data = wire.request("POST", "/noise", headers, body)
            return any(reply.status != 200 for reply in await asyncio.gather(*(pool.ask(data) for _ in range(count))))

        checks = {
            "pixels": await refused(
                limits.upload_pixels // limits.max_image_pixels, math.isqrt(limits.max_image_pixels)
            ),
            "places": await refused(limits.upload_slots, 500),
            "bytes": await _bytes_refused(url, limits),
        }
    return [f"{what} of uploads" for what, kept in checks.items() if kept]


async def _bytes_refused(url: str, limits: Settings) -> bool:
    """Whether uploads that together are as many bytes as are taken at once are not; what they hold is no image."""
    whole, rest = divmod(limits.upload_bytes, limits.max_body_bytes)
    headers, empty = form({"t": 1}, b"")
    connections = []
    for size in [*[limits.max_body_bytes] * whole, rest]:
        _, body = form({"t": 1}, bytes(size - len(empty)))
        connections.append(connection := await wire.Connection.open(url))
        connection.writer.write(wire.request("POST", "/noise", headers, body)[:-1])
        await connection.writer.drain()
    await asyncio.sleep(HOLD_S)
    for connection in connections:
        connection.writer.write(b"\n")
    statuses = [(await connection.reply()).status for connection in connections]
    for connection in connections:
        connection.leave()
    return statuses != [422] * len(statuses)


async def under_load(server: Server, references: References, seconds: float) -> Figures:
    """The figures of a soak; in `broken` the promises that were not kept."""
    calibration_s = min(CALIBRATION_S, CALIBRATION * seconds)
    async with wire.pool(server.url) as of_watch:
        watch = Watch(server, of_watch)
        before = await watch.idle()
        async with wire.pool(server.url) as pool:
            crowd = Crowd(pool, references)
            watching = asyncio.create_task(watch.follow(crowd))
            capacity = await crowd.closed_loop(calibration_s)
            every_s = min(BURST_EVERY_S, BURST_EVERY * seconds)
            await crowd.open_loop(LOAD * capacity, seconds - calibration_s, every_s)
            watching.cancel()
            await asyncio.wait([watching])
        emptied = await watch.until(lambda now: now.slots == 0, SLOTS_S)
        kept = await kept_of_uploads(server.url)
        after = await watch.idle(lambda now: now.files <= before.files and now.threads <= before.threads, SETTLE_S)
    windows = watch.windows(min(max(WARM_UP_S, WARM_UP * seconds), seconds / 2))
    rss_mb = [round(statistics.median(sample.rss_mb for sample in window), 1) for window in windows]
    growth = rss_mb[-1] / rss_mb[0] - 1 if len(windows[0]) >= FEWEST else 0.0
    accepted = emptied.total("ddpm_requests_total") - before.total("ddpm_requests_total")
    promises = {
        f"{len(crowd.wrong)} answers were wrong": not crowd.wrong,
        f"{len(crowd.lost)} clients got no answer": not crowd.lost,
        f"{accepted:.0f} requests were accepted, and clients know of {crowd.accepted} and {crowd.perhaps} perhaps":
            crowd.accepted <= accepted <= crowd.accepted + crowd.perhaps,
        "no burst was too much, so that nothing was shown": crowd.counts["refused"] > 0,
        f"{emptied.slots:.0f} slots were kept": emptied.slots == 0,
        f"kept: {', '.join(kept)}": not kept,
        f"{after.files} files are open, {before.files} were": after.files <= before.files,
        f"{after.threads} threads are there, {before.threads} were": after.threads <= before.threads,
        f"resident memory has grown by {growth:.1%}": growth < GROWTH,
    }  # fmt: skip
    return {
        "broken": [what for what, kept in promises.items() if not kept],
        "counts": dict(crowd.counts),
        "wrong": crowd.wrong[:MOST_TOLD],
        "lost": crowd.lost[:MOST_TOLD],
        "capacity_rps": round(capacity, 1),
        "accepted": {"server": accepted, "clients": crowd.accepted, "perhaps": crowd.perhaps},
        "busy": round(
            (emptied.total("ddpm_step_seconds_sum") - before.total("ddpm_step_seconds_sum")) / emptied.at_s, 3
        ),
        "server_refused": {k: v for k, v in emptied.metrics.items() if k.startswith("ddpm_refused_total") and v},
        "rss_mb": rss_mb,
        "rss_growth": round(growth, 4),
        "files": [before.files, max(sample.files for sample in watch.samples), after.files],
        "threads": [before.threads, max(sample.threads for sample in watch.samples), after.threads],
    }


def complaints(log: str) -> list[str]:
    """Lines of a log that no load may cause: errors, and what is none of the service's lines."""
    found = []
    for line in log.splitlines():
        try:
            fine = "Traceback" not in line and json.loads(line)["level"] not in ("ERROR", "CRITICAL")
        except (ValueError, KeyError, TypeError):
            fine = False
        if not fine:
            found.append(line)
    return found


def soak(model: Path, requests: Sequence[Request], seconds: float) -> Figures:
    """References, the load, and the end of the process."""
    ours = dataclasses.replace(CONTENDERS["ours"], env={"DDPM_MODEL": str(model), **BOUNDS})
    with running(ours) as alone:
        references = asyncio.run(references_of(alone.url, requests))
    with running(ours) as server:
        figures = asyncio.run(under_load(server, references, seconds))
        server.process.terminate()
        code = server.process.wait(END_S)
        bad = complaints(server.printed())
    if code != 0:
        figures["broken"].append(f"SIGTERM ended it with {code}")
    if bad:
        figures["broken"].append(f"{len(bad)} errors in the log")
    alone_s = sum(reference.took_s for reference in references.values())
    return {**figures, "log": bad[:MOST_TOLD], "requests": len(requests), "requests_alone_s": round(alone_s, 1)}


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=1200, help="of load (1200)")
    parser.add_argument("--model", type=Path, default=MODEL, help=f"of ten classes, not distilled ({MODEL})")
    return parser.parse_args()


def main() -> int:
    chosen = options()
    busy = busy_cores()
    began = time.monotonic()
    figures = soak(chosen.model, catalogue(chosen.model.resolve().name, REQUESTS, SEED), chosen.seconds)
    print(table(["clients", "count"], sorted(figures["counts"].items())))
    print("before, most, after: files {}, threads {}".format(figures["files"], figures["threads"]))
    print("RSS by tenths of the time after the warm-up, MB:", *figures["rss_mb"])
    print(
        *(figures["broken"] or ["every promise was kept"]),
        *figures["wrong"],
        *figures["lost"],
        *figures["log"],
        sep="\n",
    )
    print_json(
        "soak", seconds=chosen.seconds, model=str(chosen.model), **figures, busy_cores_before=busy,
        took_s=round(time.monotonic() - began, 1),
    )  # fmt: skip
    return 1 if figures["broken"] else 0


if __name__ == "__main__":
    sys.exit(main())
