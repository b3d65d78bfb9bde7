"""The service asked for more than it can do: what it still gives, how soon it refuses, and whether its probes answer.

What, at 0.5 to 5 times the capacity: goodput (requests a second that are answered 200 within 2 s of when they were
due), all that is answered 200, images a second, the share that gets 429 and how soon, the latency of what is drawn, and
that of /livez and /metrics. A probe has failed where it is not answered 200 within a second, Kubernetes' own timeout.
How: capacity is what 32 clients get who each ask again when answered. Then, for every level a fresh process and a
warm-up, requests come at the times of a Poisson process and wait for nobody; a client gives up after 30 s. Probes go
once a second, each on a new connection. `others_cores` is what neither the server nor this client used of the machine:
where that is more than a fifth of one, the network's threads wait for each other, and the measurement is made anew.
With the defaults, which bound the images that wait, and with DDPM_QUEUE_S=1, which bounds the time that they wait.
On what: weights/mnist, the mixed workload of serving.py, over loopback HTTP; this client shares the machine's cores.
Smaller requests go first, so what is answered under load is mostly small: compare images a second too. One request in
twenty is half of the work, so that what is done in 20 s moves by a tenth with who was let in, and the engine chooses
the rows of a full step anew at each start.

    python benchmarks/overload.py [--quick] [--levels 1 5] [--seconds 20]

Eight minutes on two quiet cores, one with --quick.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from benchmarks import load, wire
from benchmarks.machine import NOISE, cpu_s, cpu_s_of, print_json, table
from benchmarks.servers import CONTENDERS, Server, health, running
from benchmarks.serving import KINDS, MIXED
from benchmarks.workload import Arrival, arrivals

SETTINGS: dict[str, dict[str, str]] = {"defaults": {}, "DDPM_QUEUE_S=1": {"DDPM_QUEUE_S": "1"}}
LEVELS = [0.5, 0.8, 1.0, 2.0, 5.0]
CLIENTS = 32  # of the closed loop: full batches, with one request in ten a large one
PER_CLIENT = 8  # requests of each of them
ATTEMPTS = 4  # to measure while others are quiet
DEADLINE_S, TIMEOUT_S, PROBE_S = 2.0, 30.0, 1.0
PROBES = ("/livez", "/metrics")
SHARE, REFUSAL_S = 0.9, 0.05  # the goals at the highest level: of the best level's goodput; the median
SEED = 20_261_126

Point = dict[str, Any]


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--levels", nargs="+", type=float, help=f"multiples of the capacity ({LEVELS})")
    parser.add_argument("--seconds", type=float, help="arrival window of a level (20)")
    parser.add_argument("--quick", action="store_true", help="shows that everything runs; its figures mean little")
    chosen = parser.parse_args()
    chosen.levels = sorted(chosen.levels or ([0.5, 5.0] if chosen.quick else LEVELS))
    chosen.seconds = chosen.seconds or (3.0 if chosen.quick else 20.0)
    return chosen


def quietly(measured: Callable[[], Point]) -> Point:
    """Measured anew where others worked meanwhile; the quietest counts."""
    points: list[Point] = []
    while len(points) < ATTEMPTS and (not points or points[-1]["others_cores"] > NOISE):
        points.append(measured())
    return min(points, key=lambda point: point["others_cores"])


@contextlib.contextmanager
def counted_cores(server: Server) -> Iterator[Point]:
    """How many cores each used meanwhile, there at the end."""

    def used_s() -> list[float]:
        return [time.monotonic(), cpu_s(), cpu_s_of(server.process.pid), cpu_s_of(os.getpid())]

    before, cores = used_s(), Point()
    yield cores
    took, everybody, its, mine = (now - then for now, then in zip(used_s(), before, strict=True))
    for name, seconds in (("server", its), ("client", mine), ("others", everybody - its - mine)):
        cores[f"{name}_cores"] = round(seconds / took, 2)


def capacity(per_client: int) -> Point:
    """Requests of the mixed workload a second, from a queue that is never empty."""
    kinds = [arrival.kind for arrival in arrivals(MIXED, 1, CLIENTS * per_client, SEED)]
    with running(CONTENDERS["ours"]) as server:
        asyncio.run(load.warm_up(server.url, KINDS))
        with counted_cores(server) as cores:
            rate = asyncio.run(load.closed_loop(server.url, kinds, CLIENTS))
    print(f"capacity: {rate:.2f} requests/s to {CLIENTS} clients", file=sys.stderr)
    return {"capacity_rps": round(rate, 3), **cores}


async def probe(url: str, path: str, times: int) -> list[float | None]:
    """Seconds until each of the answers, asked for once a second; None: there was none, or not in time."""
    start, took = time.monotonic(), list[float | None]()
    for k in range(times):
        await asyncio.sleep(start + k - time.monotonic())
        asked = time.monotonic()
        try:
            async with asyncio.timeout(PROBE_S), wire.pool(url) as fresh:
                status = (await fresh.ask(wire.request("GET", path))).status
        except (OSError, EOFError):
            status = 0
        took.append(time.monotonic() - asked if status == 200 else None)
    return took


async def under_load(
    url: str, requests: Sequence[Arrival], seconds: float
) -> tuple[list[load.Answer], list[list[float | None]]]:
    """The answers to the requests, and what each of PROBES took meanwhile."""
    probes = [asyncio.create_task(probe(url, path, round(seconds))) for path in PROBES]
    answers, _ = await load.open_loop(url, requests, TIMEOUT_S, None)
    return answers, [await probe for probe in probes]


def measure(settings: str, level: float, rate: float, seconds: float) -> Point:
    """One level with one of SETTINGS."""
    requests = arrivals(MIXED, rate, round(rate * seconds), SEED)
    with running(dataclasses.replace(CONTENDERS["ours"], env=SETTINGS[settings])) as server:
        asyncio.run(load.warm_up(server.url, KINDS))
        says = health(server.url) or {}
        with counted_cores(server) as cores:
            answers, probes = asyncio.run(under_load(server.url, requests, seconds))
    found = load.summary(answers, [], seconds, DEADLINE_S)
    print(f"{settings} x {level:g}: {found['goodput_rps']} in time a second", file=sys.stderr)
    return {
        "settings": settings,
        "level": level,
        **found,
        "refused": round(sum(a.outcome == "429" for a in answers) / len(answers), 4),
        "refusals_s": load.percentiles([a.latency_s for a in answers if a.outcome == "429"]),
        "drawn_s": load.percentiles([a.latency_s for a in answers if a.outcome == "200"]),
        "probes": {path: of_probe(took) for path, took in zip(PROBES, probes, strict=True)},
        **cores,
        "batch_rows_limit": says.get("batch_rows_limit"),
    }


def of_probe(took: Sequence[float | None]) -> Point:
    answered = [seconds for seconds in took if seconds is not None]
    return {
        **load.percentiles(answered),
        "max": round(max(answered), 4) if answered else None,
        "failed": took.count(None),
    }


HEADER = [
    "settings", "x capacity", "offered/s", "done/s", "images/s", "goodput/s", "of the best", "429", "its p50 / p95 ms",
    "drawn p50 / p99 s", *(f"{path} p50 / max ms" for path in PROBES), "probes failed", "other failures",
    "rows a step", "others' cores",
]  # fmt: skip


def row(point: Point) -> list[object]:
    """One line of the table."""

    def joined(of: dict[str, float | None], *names: str, unit: float = 0.001) -> str:
        return " / ".join("-" if (value := of[name]) is None else f"{value / unit:.3g}" for name in names)

    return [
        *(point[name] for name in ("settings", "level", "offered_rps", "completed_rps", "images_per_s", "goodput_rps")),
        *(f"{100 * point[name]:.0f} %" for name in ("of_best", "refused")),
        joined(point["refusals_s"], "p50", "p95"),
        joined(point["drawn_s"], "p50", "p99", unit=1),
        *(joined(point["probes"][path], "p50", "max") for path in PROBES),
        sum(point["probes"][path]["failed"] for path in PROBES),
        point["timeouts"] + sum(point["other"].values()),
        point["batch_rows_limit"],
        point["others_cores"],
    ]


def goals(points: Sequence[Point]) -> dict[str, dict[str, bool]]:
    """Of each settings at its highest level: what was wanted, and whether it was reached."""
    highest = {point["settings"]: point for point in points}
    return {
        settings: {
            f"goodput at least {SHARE:.0%} of the best level's": point["of_best"] >= SHARE,
            f"median refusal within {1000 * REFUSAL_S:.0f} ms": (point["refusals_s"]["p50"] or 0) <= REFUSAL_S,
            "every probe answered": all(of_path["failed"] == 0 for of_path in point["probes"].values()),
        }
        for settings, point in highest.items()
    }


def main() -> None:
    chosen = options()
    began = time.monotonic()
    most = quietly(lambda: capacity(1 if chosen.quick else PER_CLIENT))
    points = []
    for settings in SETTINGS:
        of_settings = [
            quietly(functools.partial(measure, settings, level, level * most["capacity_rps"], chosen.seconds))
            for level in chosen.levels
        ]
        best = max(point["goodput_rps"] for point in of_settings)
        points += [{**point, "of_best": round(point["goodput_rps"] / best, 3)} for point in of_settings]
    print(table(HEADER, [row(point) for point in points]))
    reached = goals(points)
    for settings, wanted in reached.items():
        said = ", ".join(f"{goal} {'reached' if yes else 'MISSED'}" for goal, yes in wanted.items())
        print(f"{settings} at x {chosen.levels[-1]:g}: {said}")
    print_json(
        "overload", deadline_s=DEADLINE_S, timeout_s=TIMEOUT_S, probe_timeout_s=PROBE_S, window_s=chosen.seconds,
        capacity=most, clients=CLIENTS, points=points, goals=reached,
        took_s=round(time.monotonic() - began, 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
