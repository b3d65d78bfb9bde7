"""Does the simulation of one replica (benchmarks/simulation.py) say what the running service does? Side by side.

What: p50 and p99 from when a request was due to its answer, of all requests and of n = 1, and images a second, measured
and simulated, for Poisson arrivals and for bursts at several loads; how long a start takes.
How: one server (`python -m app`, its defaults). What the simulation is told of it is measured first, by other requests
than those that it then has to foretell:
  t(B)       one client asks for B images, with few steps and with many: the difference, by the step. So a step counts
             with what the engine does around it
  outside    the rest of the time of one image: HTTP, the PNG, the client
  a request  what it costs all others: 32 clients ask without a pause, and what their time is longer than the full steps
             that were made in it, by the request. The network's threads wait for each other where HTTP takes a core
Then requests come at their times and wait for nobody, and the same ones are simulated. `others_cores` is what neither
server nor client used of the machine: where that is more than a fifth of one, a window is measured anew, up to four
times.
On what: weights/mnist, the mixed workload of serving.py, over loopback HTTP; this client shares the machine's cores.

    python benchmarks/agreement.py [--seconds 60] [--quick]

Ten minutes on two quiet cores, one with --quick. It prints what scaling.py takes: --curve, --request-ms, --outside-ms.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import functools
import itertools
import statistics
import sys
import time
from collections.abc import Callable, Coroutine, Iterator, Sequence
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from app.engine.steptime import StepTime, sizes
from benchmarks import load, wire
from benchmarks.machine import print_json, table
from benchmarks.overload import counted_cores, quietly
from benchmarks.servers import CONTENDERS, Server, health, running
from benchmarks.serving import KINDS, MIXED
from benchmarks.simulation import Replica, Simulation, at_first
from benchmarks.step_curve import Machine
from benchmarks.workload import Arrival, Kind, Rates, arrivals, bursts, mean_work

WINDOWS: list[tuple[str, Rates | None, float]] = [
    *(("poisson", None, at) for at in (0.3, 0.5, 0.7, 0.85)),
    *(("bursts", bursts(), at) for at in (0.3, 0.5, 0.7)),
]
FEW, MANY = 10, 50  # steps of the requests whose difference is t(B)
ASKED = 15  # of each
CLIENTS, SETTLE_S = 32, 2.0
STARTS = 3
TIMEOUT_S = 60.0
GOAL = 0.15
SEED = 20_261_127
COMPARED = ("p50_s", "p99_s", "n1_p50_s", "n1_p99_s", "images_per_s")

Point = dict[str, Any]


async def ask_alone(url: str, rows: int, asked: int) -> Point:
    """The median latency of one request of so many images at a time, with few steps and with many."""
    async with load.client_of(url, TIMEOUT_S) as client:
        took: dict[int, list[float]] = {FEW: [], MANY: []}
        for steps in (FEW, MANY) * asked:
            took[steps].append((await client.ask_now(Kind(rows, steps))).latency_s)
    return {"rows": rows, **{f"{steps}_steps_s": statistics.median(found) for steps, found in took.items()}}


async def counters(pool: wire.Pool) -> dict[str, float]:
    """Steps, rows and completed requests so far."""
    text = (await pool.ask(wire.request("GET", "/metrics"))).body.decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    found = {sample.name: sample.value for sample in samples}
    completed = sum(s.value for s in samples if s.labels.get("outcome") == "completed")
    return {"steps": found["ddpm_batch_rows_count"], "rows": found["ddpm_batch_rows_sum"], "requests": completed}


async def ask_in_a_crowd(url: str, seconds: float) -> Point:
    """What is counted in so long while the queue is never empty."""
    kinds = itertools.cycle(arrival.kind for arrival in arrivals(MIXED, 1, 400, SEED))
    async with load.client_of(url, TIMEOUT_S) as client:

        async def ask_on() -> None:
            for kind in kinds:
                await client.ask_now(kind)

        tasks = [asyncio.create_task(ask_on()) for _ in range(CLIENTS)]
        await asyncio.sleep(SETTLE_S)
        before, start = await counters(client.pool), client.now
        await asyncio.sleep(seconds)
        after, took_s = await counters(client.pool), client.now - start
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)
    return {"took_s": took_s, **{name: after[name] - before[name] for name in after}}


def counted(server: Server, ask: Callable[..., Coroutine[Any, Any, Point]], *how: float) -> Point:
    """What it finds, with the cores that each used meanwhile."""
    with counted_cores(server) as cores:
        found = asyncio.run(ask(server.url, *how))
    return {**found, **cores}


def calibrate(server: Server, rows_limit: int, asked: int, seconds: float) -> tuple[Machine, Point]:
    """What the simulation is told of a server, and what that was made of."""
    alone = [quietly(functools.partial(counted, server, ask_alone, n, asked)) for n in sizes(rows_limit)]
    crowd = quietly(functools.partial(counted, server, ask_in_a_crowd, seconds))
    few, many = f"{FEW}_steps_s", f"{MANY}_steps_s"
    step_time = StepTime([(of["rows"], (of[many] - of[few]) / (MANY - FEW)) for of in alone])
    in_steps_s = crowd["steps"] * step_time.seconds(round(crowd["rows"] / crowd["steps"]))
    request_s = max(0.0, (crowd["took_s"] - in_steps_s) / crowd["requests"])
    outside_s = max(0.0, alone[0][few] - FEW * step_time.seconds(1) - request_s)
    return Machine(step_time, rows_limit, request_s=request_s, outside_s=outside_s), {"alone": alone, "crowd": crowd}


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
    with counted_cores(server) as cores:
        answers, _ = asyncio.run(load.open_loop(server.url, requests, TIMEOUT_S, None))
    good = [answer for answer in answers if answer.outcome == "200"]
    return {
        **figures([a.kind for a in good], [a.latency_s for a in good], max(a.ended_s for a in good)),
        "answered": len(good), "client_late_p99_s": load.percentiles([a.late_s for a in answers])["p99"], **cores,
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
    said = simulated(machine, requests)
    off = {name: round(said[name] / real[name] - 1, 3) for name in COMPARED}
    print(f"{kind}, load {at:g}: simulated over measured - 1: {off}", file=sys.stderr)
    return {
        "arrivals": kind, "load": at, "requests_per_s": round(rate, 2), "requests": len(requests),
        "measured": real, "simulated": said, "off": off,
    }  # fmt: skip


@contextlib.contextmanager
def started() -> Iterator[tuple[Server, float]]:
    """A server, and the seconds until it was ready."""
    start = time.monotonic()
    with running(CONTENDERS["ours"]) as server:
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
        machine, told = calibrate(server, rows_limit, 3 if chosen.quick else ASKED, seconds / 4)
        points = [window(server, machine, *which, seconds) for which in (WINDOWS[::3] if chosen.quick else WINDOWS)]

    report(machine, told, points, [*starts, round(last_s, 2)])
    print_json(
        "agreement", curve_ms=machine.curve_ms, rows_limit=rows_limit, told=told, points=points,
        starts_s=[*starts, round(last_s, 2)], took_s=round(time.monotonic() - began, 1),
    )  # fmt: skip


def report(machine: Machine, told: Point, points: Sequence[Point], starts: Sequence[float]) -> None:
    """For people."""
    crowd = told["crowd"]
    rate = machine.requests_per_s(mean_work(MIXED))
    curve = ",".join(f"{rows}:{ms:g}" for rows, ms in machine.curve_ms.items())
    print(f"--curve {curve} --request-ms {1000 * machine.request_s:.2f} --outside-ms {1000 * machine.outside_s:.2f}")
    print(f"load 1: {rate:.2f} requests/s; 32 clients: {crowd['requests'] / crowd['took_s']:.2f}; starts: {starts} s\n")
    rows = [
        [
            point["arrivals"], point["load"], point["requests"],
            *(f"{point['measured'][name]:.3g} / {point['simulated'][name]:.3g} ({100 * point['off'][name]:+.0f} %)"
              for name in COMPARED),
            point["measured"]["others_cores"],
        ]
        for point in points
    ]  # fmt: skip
    print("measured / simulated:\n")
    print(table(["arrivals", "load", "requests", *COMPARED, "others' cores"], rows))
    off = [abs(point["off"][name]) for point in points for name in COMPARED]
    print(f"\nwithin {GOAL:.0%}: {sum(value <= GOAL for value in off)} of {len(off)}; most: {max(off):.1%}")


if __name__ == "__main__":
    main()
