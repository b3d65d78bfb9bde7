"""The service under open-loop load, against four other ways to serve the same weights.

What: goodput (requests a second that are answered 200 within one deadline, which the servers are not told), latency
since a request was due, and time to the first step, of
  ours                 `python -m app`, its defaults
  ours_unbatched       the same with DDPM_BATCH_ROWS=1: one image a step
  ours_whole_requests  the same with the policy "admit only when empty": batches of whole requests
  plain                FastAPI, a lock, a diffusers loop
  litserve             LitServe with dynamic batching (8 requests, 5 ms) around that loop; needs `pip install litserve`
How: requests come at the times of a Poisson process and wait for nobody; every contender gets the same ones at the same
times, and for every window a fresh process and a warm-up, one contender at a time, all of one rate before the next rate
(--quick: one process a contender).
On what: weights/mnist, DDIM (eta 0, trailing), PNG answers, over loopback HTTP; this client shares the machine's cores
with the server. In the JSON `client_late_s` says how late it was itself, `busy_cores_before` what others used of them.
Workloads: `mixed` is 80 % n=1 steps=10, 10 % n=4 steps=10, 5 % n=16 steps=20 and 5 % n=1 steps=50, at multiples of what
`plain` answers to two clients in a closed loop, measured first; `background` is one n=64 steps=10 request always in
flight and about one n=1 steps=10 request a second, whose latencies are the ones reported.
One window each: a p99 of few requests is nearly their maximum. Our engine finds the rows of a full step at its start:
compare contenders of ours only where `rows a step` is the same.

    python benchmarks/serving.py [--quick] [--contenders ours plain] [--rates 0.5 2] [--seconds 20]

20 minutes on two cores, 3 with --quick.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence
from typing import Any

from benchmarks import load
from benchmarks.machine import busy_cores, print_json, table
from benchmarks.servers import CONTENDERS, health, serving
from benchmarks.workload import Arrival, Kind, Mix, arrivals, block

MIXED: Mix = [(Kind(1, 10), 16), (Kind(4, 10), 2), (Kind(16, 20), 1), (Kind(1, 50), 1)]
ALONE: Mix = [(Kind(1, 10), 1)]
KINDS = [kind for kind, _ in MIXED]
BEHIND = Kind(64, 10)
BACKGROUND_RATE, BACKGROUND_WINDOWS = 1.0, 2  # requests a second are few: the window is twice as long
HELD = 0.99  # a server holds a load where so many of its requests are answered within the deadline
SEED = 20_261_123

Point = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Load:
    """What every contender gets in one window."""

    workload: str
    rate: float | None  # multiple of plain's capacity
    requests: Sequence[Arrival]
    seconds: float
    background: Kind | None = None


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS), help="all")
    parser.add_argument("--rates", nargs="+", type=float, help="multiples of plain's capacity (0.5 0.7 2 4)")
    parser.add_argument("--seconds", type=float, help="arrival window of a point (20)")
    parser.add_argument("--timeout", type=float, help="seconds that the client waits for an answer (30)")
    parser.add_argument("--deadline", type=float, default=2.0, help="seconds within which an answer counts (2)")
    parser.add_argument("--quick", action="store_true", help="shows that everything runs; its figures mean little")
    chosen = parser.parse_args()
    chosen.rates = sorted(chosen.rates or ([0.5, 4.0] if chosen.quick else [0.5, 0.7, 2.0, 4.0]))
    chosen.seconds = chosen.seconds or (2.0 if chosen.quick else 20.0)
    chosen.timeout = chosen.timeout or (3.0 if chosen.quick else 30.0)
    return chosen


def plain_capacity(blocks: int) -> tuple[float, float]:
    """Requests of the mixed workload that `plain` answers a second, to one client and to two."""
    with serving(CONTENDERS["plain"]) as url:
        asyncio.run(load.warm_up(url, KINDS))
        alone, shared = (asyncio.run(load.closed_loop(url, block(MIXED) * blocks, clients)) for clients in (1, 2))
        return alone, shared


def loads(capacity: float, rates: Sequence[float], seconds: float) -> list[Load]:
    """The background last: what it leaves behind in one process (--quick) would be in the way of the mixed load."""
    found = []
    for rate in rates:
        count = max(1, round(rate * capacity * seconds))
        found.append(Load("mixed", rate, arrivals(MIXED, rate * capacity, count, SEED), seconds))
    long_s = BACKGROUND_WINDOWS * seconds
    few = arrivals(ALONE, BACKGROUND_RATE, max(1, round(BACKGROUND_RATE * long_s)), SEED)
    return [*found, Load("background", None, few, long_s, BEHIND)]


def windows(name: str, chosen: argparse.Namespace, *of: Load) -> Iterator[Point]:
    """One contender under one load after the other, in one process."""
    busy = busy_cores()
    with serving(CONTENDERS[name]) as url:
        asyncio.run(load.warm_up(url, KINDS))
        says = health(url)
        for this in of:
            answers, behind = asyncio.run(load.open_loop(url, this.requests, chosen.timeout, this.background))
            found = load.summary(answers, behind, this.seconds, chosen.deadline)
            print(f"{this.workload} {this.rate or ''} {name}: {found['goodput_rps']} in time a second", file=sys.stderr)
            yield {
                "workload": this.workload,
                "rate": this.rate,
                "contender": name,
                **found,
                "engine": says,
                "busy_cores_before": busy,
            }


HEADER = [
    "workload", "contender", "x plain", "offered/s", "done/s", "images/s", "goodput/s", "p50 / p95 / p99 s",
    "the same of n=1", "1st step p50 / p99 s", "429", "timeouts", "other",
    "rows a step",
]  # fmt: skip


def row(point: Point) -> list[object]:
    """One line of the table."""

    def joined(of: dict[str, float | None], *names: str) -> str:
        return " / ".join("-" if (value := of[name]) is None else f"{value:.3f}" for name in names)

    return [
        *(point[name] for name in ("workload", "contender", "rate", "offered_rps", "completed_rps", "images_per_s")),
        point["goodput_rps"],
        joined(point["latency_s"], "p50", "p95", "p99"),
        joined(point["latency_n1_s"], "p50", "p95", "p99"),
        joined(point["first_step_s"], "p50", "p99"),
        *(point["refused_429"], point["timeouts"], sum(point["other"].values())),
        (point["engine"] or {}).get("batch_rows_limit"),
    ]


def ratio(a: float | None, b: float | None) -> float | None:
    """None where either is missing or nothing was answered in time."""
    return round(a / b, 3) if a is not None and b else None


def ratios(points: list[Point]) -> dict[str, Any]:
    """Ours against the others, where that says something."""
    at = {(point["workload"], point["rate"], point["contender"]): point for point in points}
    pairs = [
        (rate, ours, plain)
        for (workload, rate, contender), ours in at.items()
        if workload == "mixed" and contender == "ours" and (plain := at.get(("mixed", rate, "plain")))
    ]
    both = [pair for pair in pairs if min(pair[1]["in_time"], pair[2]["in_time"]) >= HELD] or pairs[:1]
    found: dict[str, Any] = {
        "goodput, ours / plain, where plain fails": {
            rate: ratio(ours["goodput_rps"], plain["goodput_rps"])
            for rate, ours, plain in pairs
            if plain["in_time"] < HELD
        }
    }
    for rate, ours, plain in both[-1:]:
        found["p99, ours / plain, at the highest rate both hold, else the lowest"] = {
            rate: ratio(ours["latency_s"]["p99"], plain["latency_s"]["p99"])
        }
    for k in ("p50", "p99"):
        behind = [at.get(("background", None, name)) for name in ("ours", "ours_whole_requests")]
        if behind[0] and behind[1]:
            found[f"{k} of n=1 beside n=64, ours / ours_whole_requests"] = ratio(
                behind[0]["latency_n1_s"][k], behind[1]["latency_n1_s"][k]
            )
    return found


def main() -> None:
    chosen = options()
    began = time.monotonic()
    missing = [name for name in chosen.contenders if not CONTENDERS[name].installed]
    contenders = [name for name in chosen.contenders if name not in missing]
    alone, capacity = plain_capacity(1 if chosen.quick else 3)
    print(f"plain, closed loop: {alone:.2f} requests/s to one client, {capacity:.2f} to two", file=sys.stderr)

    points: list[Point] = []
    all_loads = loads(capacity, chosen.rates, chosen.seconds)
    if chosen.quick:
        for name in contenders:
            points += windows(name, chosen, *all_loads)
        points.sort(key=lambda point: point["rate"] or float("inf"))
    else:
        for this in all_loads:
            for name in contenders:
                points += windows(name, chosen, this)

    print(table(HEADER, [row(point) for point in points]))
    for name in missing:
        print(f"{name}: not installed")
    summary = ratios(points)
    print("\n".join(f"{what}: {value}" for what, value in summary.items()))
    print_json(
        "serving", deadline_s=chosen.deadline, timeout_s=chosen.timeout, window_s=chosen.seconds,
        plain_capacity_rps=round(capacity, 3), plain_one_client_rps=round(alone, 3), points=points,
        not_installed=missing, ratios=summary, took_s=round(time.monotonic() - began, 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
