"""Does the simulation of one replica (benchmarks/simulation.py) say what the running service does? Side by side.

What: p50 and p99 from when a request was due to its answer, of all requests and of n = 1, and images a second, measured
and simulated, for Poisson arrivals and for bursts at several loads; how long a start takes.
How: one server, which prints of each step its rows and its time. What the simulation is told is measured first, with
other requests than those that it then has to foretell, but under way: where HTTP, PNGs and the client take the cores
that steps are made on, and threads wake up from pauses, a step takes longer than at the start.
  capacity   row-steps a second of 32 clients who each ask again when answered
  t(B)       the mean of all steps of B rows under Poisson arrivals at 0.6 of that, with all that the engine does around
  outside    the mean of what those requests took beside their time in the engine, which the service tells
Then requests come at their times and wait for nobody, and the same ones are simulated twice: with these steps, as who
foretells must, and with the mean steps of their own window, as this machine's speed moves from one to the next. The
first shows how good a forecast is here, the second whether the simulation is right. `others_cores` is what neither
server nor client used of the machine: where that is more than a fifth of one, a window is measured anew, up to four
times.
On what: weights/mnist, the mixed workload of serving.py, over loopback HTTP; this client shares the machine's cores.

    python benchmarks/agreement.py [--seconds 60] [--quick]

Ten minutes on two quiet cores, one with --quick. It prints what scaling.py takes: --curve, --rows, --outside-ms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import dataclasses
import functools
import itertools
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from app.engine.steptime import StepTime
from benchmarks import load
from benchmarks.machine import print_json, table
from benchmarks.overload import counted_cores, quietly
from benchmarks.servers import Contender, Server, health, running
from benchmarks.serving import KINDS, MIXED
from benchmarks.simulation import Replica, Simulation, at_first
from benchmarks.step_curve import Machine
from benchmarks.workload import Arrival, Kind, Rates, arrivals, bursts, mean_work

WINDOWS: list[tuple[str, Rates | None, float]] = [
    *(("poisson", None, at) for at in (0.3, 0.5, 0.7, 0.85)),
    *(("bursts", bursts(), at) for at in (0.3, 0.5, 0.7)),
]
RECORDED = Contender("benchmarks.contenders.recorded")
CLIENTS, CALIBRATED_AT = 32, 0.6
STARTS = 3
TIMEOUT_S = 60.0
GOAL = 0.15
SEED = 20_261_127
LATENCIES = ("p50_s", "p99_s", "n1_p50_s", "n1_p99_s")
COMPARED = (*LATENCIES, "images_per_s")  # which are those that come, as long as they are held

Point = dict[str, Any]


def steps_of(printed: str) -> dict[int, list[float]]:
    """Seconds by rows, of what a recorded server has printed."""
    found: dict[int, list[float]] = {}
    for rows, ms in re.findall(r"^step (\d+) ([\d.]+)$", printed, re.MULTILINE):
        found.setdefault(int(rows), []).append(float(ms) / 1000)
    return found


async def ask_on(url: str, seconds: float) -> None:
    """A crowd for so long."""
    async with load.client_of(url, TIMEOUT_S) as client:
        kinds = itertools.cycle(arrival.kind for arrival in arrivals(MIXED, 1, 400, SEED))

        async def one() -> None:
            for kind in kinds:
                await client.ask_now(kind)

        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(seconds):
                await asyncio.gather(*(one() for _ in range(CLIENTS)))


def counted(server: Server, do: Callable[[], Any]) -> Point:
    """What came of it, the steps that were made, and the cores that each used."""
    before = len(server.printed())
    start = time.monotonic()
    with counted_cores(server) as cores:
        result = do()
    return {"result": result, "steps": steps_of(server.printed()[before:]), "took_s": time.monotonic() - start, **cores}


def calibrate(server: Server, rows_limit: int, seconds: float) -> tuple[Machine, Point]:
    """What the simulation is told of a server, and what that was made of."""
    crowd = quietly(lambda: counted(server, lambda: asyncio.run(ask_on(server.url, seconds / 4))))
    capacity = sum(rows * len(found) for rows, found in crowd["steps"].items()) / crowd["took_s"]
    rate = CALIBRATED_AT * capacity / mean_work(MIXED)
    requests = arrivals(MIXED, rate, round(rate * seconds), SEED + 1)
    ask = functools.partial(load.open_loop, server.url, requests, TIMEOUT_S, None)
    under_way = quietly(lambda: counted(server, lambda: asyncio.run(ask())))
    answers, _ = under_way["result"]
    outside_s = statistics.fmean(a.latency_s - a.drawn_s for a in answers if a.drawn_s is not None)
    told = {
        "crowd_row_steps_per_s": round(capacity, 1), "others_cores": [crowd["others_cores"], under_way["others_cores"]],
        "steps": {rows: len(found) for rows, found in sorted(under_way["steps"].items())},
        "medians_ms": {
            rows: round(1000 * statistics.median(found), 3) for rows, found in sorted(under_way["steps"].items())
        },
    }  # fmt: skip
    return Machine(mean_steps(under_way["steps"]), rows_limit, outside_s=outside_s), told


def mean_steps(steps: Mapping[int, Sequence[float]]) -> StepTime:
    """The curve of steps that were made."""
    return StepTime(sorted((rows, statistics.fmean(found)) for rows, found in steps.items()))


def figures(kinds: Sequence[Kind], waits: Sequence[float], until_s: float) -> Point:
    """The figures that are compared."""
    ones = [wait for kind, wait in zip(kinds, waits, strict=True) if kind.n == 1]
    (all_, one) = load.percentiles(waits), load.percentiles(ones)
    return {
        "p50_s": all_["p50"], "p99_s": all_["p99"], "n1_p50_s": one["p50"], "n1_p99_s": one["p99"],
        "images_per_s": round(sum(kind.n for kind in kinds) / until_s, 2),
    }  # fmt: skip


def measured(server: Server, requests: Sequence[Arrival]) -> Point:
    """What the service does."""
    found = counted(server, lambda: asyncio.run(load.open_loop(server.url, requests, TIMEOUT_S, None)))
    answers, _ = found["result"]
    good = [answer for answer in answers if answer.outcome == "200"]
    return {
        **figures([a.kind for a in good], [a.latency_s for a in good], max(a.ended_s for a in good)),
        "answered": len(good), "client_late_p99_s": load.percentiles([a.late_s for a in answers])["p99"],
        "curve": mean_steps(found["steps"]).points, "others_cores": found["others_cores"],
    }  # fmt: skip


def simulated(machine: Machine, requests: Sequence[Arrival]) -> Point:
    """What the simulation says it does."""
    outcomes = Simulation([Replica(machine)], at_first).run(requests)
    done = [(o.arrival, o.wait_s) for o in outcomes if o.wait_s is not None]
    until_s = max(arrival.at_s + wait_s for arrival, wait_s in done)
    return {
        **figures([arrival.kind for arrival, _ in done], [wait_s for _, wait_s in done], until_s),
        "answered": len(done),
    }  # fmt: skip


def window(server: Server, machine: Machine, kind: str, rates: Rates | None, at: float, seconds: float) -> Point:
    """One load, both ways."""
    rate = at * machine.requests_per_s(mean_work(MIXED))
    requests = arrivals(MIXED, rate, round(rate * seconds), SEED, rates)
    real = quietly(lambda: measured(server, requests))
    own = dataclasses.replace(machine, step_time=StepTime(real["curve"]))
    said = {"foretold": simulated(machine, requests), "own_steps": simulated(own, requests)}
    off = {how: {name: round(of[name] / real[name] - 1, 3) for name in COMPARED} for how, of in said.items()}
    print(f"{kind}, load {at:g}: simulated over measured - 1: {off}", file=sys.stderr)
    return {
        "arrivals": kind, "load": at, "requests_per_s": round(rate, 2), "requests": len(requests),
        "measured": real, **said, "off": off,
    }  # fmt: skip


@contextlib.contextmanager
def started() -> Iterator[tuple[Server, float]]:
    """A server, and the seconds until it was ready."""
    start = time.monotonic()
    with running(RECORDED) as server:
        yield server, time.monotonic() - start


def start_s() -> float:
    with started() as (_, seconds):
        return round(seconds, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, help="arrival window of a load (60)")
    parser.add_argument("--quick", action="store_true", help="shows that everything runs; its figures mean little")
    chosen = parser.parse_args()
    began = time.monotonic()
    seconds = chosen.seconds or (10.0 if chosen.quick else 60.0)
    starts = [] if chosen.quick else [start_s() for _ in range(STARTS)]
    with started() as (server, last_s):
        asyncio.run(load.warm_up(server.url, KINDS))
        rows_limit = int(str((health(server.url) or {})["batch_rows_limit"]))
        machine, told = calibrate(server, rows_limit, seconds)
        points = [window(server, machine, *which, seconds) for which in (WINDOWS[::3] if chosen.quick else WINDOWS)]

    report(machine, told, points, [*starts, round(last_s, 2)])
    print_json(
        "agreement", curve_ms=machine.curve_ms, rows_limit=rows_limit, told=told, points=points,
        starts_s=[*starts, round(last_s, 2)], took_s=round(time.monotonic() - began, 1),
    )  # fmt: skip


def report(machine: Machine, told: Point, points: Sequence[Point], starts: Sequence[float]) -> None:
    """For people."""
    curve = ",".join(f"{rows}:{ms:g}" for rows, ms in machine.curve_ms.items())
    print(f"--curve {curve} --rows {machine.rows_limit} --outside-ms {1000 * machine.outside_s:.2f}")
    print(f"load 1: {machine.capacity:.0f} row-steps/s; 32 clients got {told['crowd_row_steps_per_s']:.0f}")
    print(f"starts: {starts} s\n")
    header = ["arrivals", "load", "requests", *COMPARED, "others' cores"]
    for how, title in (("foretold", "with the steps measured before"), ("own_steps", "with the steps of each window")):
        rows = [
            [
                point["arrivals"], point["load"], point["requests"],
                *(f"{point['measured'][name]:.3g} / {point[how][name]:.3g} ({100 * point['off'][how][name]:+.0f} %)"
                  for name in COMPARED),
                point["measured"]["others_cores"],
            ]
            for point in points
        ]  # fmt: skip
        off = [abs(point["off"][how][name]) for point in points for name in LATENCIES]
        print(f"measured / simulated, {title}:\n\n{table(header, rows)}\n")
        print(
            f"within {GOAL:.0%}: {sum(value <= GOAL for value in off)} of {len(off)} latencies; most: {max(off):.1%}\n"
        )


if __name__ == "__main__":
    main()
