"""How many replicas a load wants, on paper: latency against load for 1 to 1,000 of them, cost, and when to add one.

What, by number of replicas, for Poisson arrivals and for bursts: p50 and p99 from arrival to answer, images that wait,
and, of these, the highest load at which p99 stays within a bound (2 s), which is what can be sold: images a second of a
replica, and the cost of a million. Then routes compared, and autoscalers under a load that triples.
How: benchmarks/simulation.py: the real scheduler and admission, steps that take what the curve says. Requests go to the
replica of two that has fewer, unless said otherwise. Load 1 is full steps all the time. Every point starts empty; its
first fifth is not counted. Between the loads of the table, p99 is read off a straight line.
On what: the mixed workload of serving.py, kinds in random order, 1,024 image slots a replica, 10,000 requests a point,
more where they are less than ten seconds of it. Bursts: in one second of ten three times the mean rate, everywhere at
once. The autoscalers' replicas have DDPM_QUEUE_S=5. The curve is measured on this machine unless --curve gives another
one, of whatever device. What a request takes outside of steps is --outside-ms, 0 unless given; agreement.py measures
both.

    python benchmarks/scaling.py [--curve ROWS:MS,...] [--rows 8] [--outside-ms 3] [--price 0.1] [--quick]

Eight minutes on a quiet core, two with --quick.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import itertools
import math
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from app.engine.admission import Bounds
from benchmarks import simulation as simulated
from benchmarks.autoscaling import Autoscaler, Rule, by_slots, by_waiting, replica_s
from benchmarks.load import percentiles
from benchmarks.machine import busy_cores, print_json, table
from benchmarks.serving import MIXED
from benchmarks.simulation import Outcome, Replica, Route, Simulation
from benchmarks.step_curve import Machine, machine_of, this_machine
from benchmarks.workload import Arrival, Mix, Rates, arrivals, block, bursts, mean_work

REPLICAS = (1, 2, 4, 16, 100, 1000)
ARRIVALS: dict[str, Rates | None] = {"poisson": None, "bursts": bursts()}
LOADS = {"poisson": (0.5, 0.7, 0.8, 0.9, 0.95), "bursts": (0.3, 0.4, 0.5, 0.6, 0.7, 0.8)}
ROUTES: dict[str, Callable[[], Route]] = {
    "fewest of two": lambda: simulated.fewest_of_two(SEED),
    "fewest images": lambda: simulated.fewest_images,
    "least expected end": lambda: simulated.least_expected_end,
    "round robin": simulated.round_robin,
    "at random": lambda: simulated.at_random(SEED),
}
ROUTED = 8  # replicas for which routes are compared: as many devices may be in one process
LEAST_S, LOOK_S, WARM_UP = 10.0, 0.25, 0.2
RISE = Rates(((180, 1.5), *((10, 1.5 + 0.5 * k) for k in range(1, 6)), (880, 4.5), (340, 1.5)))
"""Of the autoscalers' load, in replicas that it would keep busy: within a minute it is three times as high."""
QUEUE_S = 5.0  # DDPM_QUEUE_S while it rises, as deploy/k8s sets it
FIXED = (5, 6)  # replicas that are not scaled, for comparison
SEED = 20_261_126

Point = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Study:
    """What stays the same from point to point."""

    machine: Machine
    bounds: Bounds
    bound_s: float
    least: int  # requests of a point

    @property
    def rate(self) -> float:
        """Requests a second at load 1, of one replica."""
        return self.machine.requests_per_s(mean_work(MIXED))

    def replica(self) -> Replica:
        return Replica(self.machine, self.bounds)


def mixed(rate: float, count: int, rates: Rates | None) -> list[Arrival]:
    """The mixed workload in random order: blocks of the exact mix would keep large requests apart."""
    blocks = -(-count // len(block(MIXED)))
    mix: Mix = [(kind, times * blocks) for kind, times in MIXED]
    return arrivals(mix, rate, count, SEED, rates)


def figures(outcomes: Sequence[Outcome], bound_s: float) -> Point:
    """What clients saw."""
    waits = [outcome.wait_s for outcome in outcomes if outcome.wait_s is not None]
    ones = [o.wait_s for o in outcomes if o.wait_s is not None and o.arrival.kind.n == 1]
    return {
        "p50_s": percentiles(waits)["p50"], "p99_s": percentiles(waits)["p99"],
        "n1_p50_s": percentiles(ones)["p50"], "n1_p99_s": percentiles(ones)["p99"],
        "in_time": round(sum(wait <= bound_s for wait in waits) / len(outcomes), 4),
        "refused": len(outcomes) - len(waits), "requests": len(outcomes),
    }  # fmt: skip


def measure(study: Study, replicas: int, kind: str, load: float, route: str) -> Point:
    """One point."""
    rate = load * replicas * study.rate
    seconds = LEAST_S * math.ceil(max(LEAST_S, study.least / rate) / LEAST_S)  # whole cycles of bursts
    requests = mixed(rate, round(rate * seconds), ARRIVALS[kind])
    simulation = Simulation([study.replica() for _ in range(replicas)], ROUTES[route]())
    waiting: list[int] = []
    simulation.every(LOOK_S, lambda: waiting.append(sum(r.scheduler.waiting for r in simulation.replicas)))
    outcomes = simulation.run(requests)[round(WARM_UP * len(requests)) :]
    waiting = waiting[round(WARM_UP * len(waiting)) :]
    print(f"{replicas} replicas, {kind}, {route}: load {load}", file=sys.stderr)
    return {
        "replicas": replicas, "arrivals": kind, "route": route, "load": load, **figures(outcomes, study.bound_s),
        "waiting": round(sum(waiting) / len(waiting) / replicas, 3),
        "rows_a_step": round(
            sum(r.row_steps for r in simulation.replicas) / sum(r.steps for r in simulation.replicas), 2
        ),
    }  # fmt: skip


def sellable(points: Sequence[Point], study: Study, price: float) -> Point:
    """Of the points of one curve: where its p99 leaves the bound, and what that makes a replica worth."""
    first = points[0]
    load, waiting = crossing(points, study.bound_s)
    images = sum(kind.n for kind in block(MIXED)) / len(block(MIXED))
    images_per_s = None if load is None else load * study.rate * images
    return {
        "replicas": first["replicas"], "arrivals": first["arrivals"], "route": first["route"], "load": rounded(load, 3),
        "highest_tried": load == points[-1]["load"], "images_per_s": rounded(images_per_s, 1),
        "per_million": rounded(images_per_s and price / (3600 * images_per_s) * 1e6, 3),
        "waiting": rounded(waiting, 2),
    }  # fmt: skip


def crossing(points: Sequence[Point], bound_s: float) -> tuple[float, float] | tuple[None, None]:
    """The load and the images that wait where p99 leaves its bound, or at the last point; None: before the first."""
    held = list(itertools.takewhile(lambda point: point["p99_s"] <= bound_s, points))
    if not held:
        return None, None
    low = held[-1]
    if len(held) == len(points):
        return low["load"], low["waiting"]
    high = points[len(held)]
    share = (bound_s - low["p99_s"]) / (high["p99_s"] - low["p99_s"])
    load, waiting = (low[name] + share * (high[name] - low[name]) for name in ("load", "waiting"))
    return load, waiting


def rounded(value: float | None, digits: int) -> float | None:
    return None if value is None else round(value, digits)


def under_a_rise(study: Study, name: str, replicas: int, rule: Rule | None, start_s: float) -> Point:
    """What an autoscaler makes of RISE; without a rule nothing changes."""
    requests = mixed(study.rate, round(study.rate * sum(seconds * load for seconds, load in RISE.pieces)), RISE)
    run = Simulation([study.replica() for _ in range(replicas)], simulated.fewest_of_two(SEED))
    scaler = Autoscaler(run, rule, start_s, study.replica) if rule else None
    outcomes = run.run(requests)
    counts = scaler.counts if scaler else [(0.0, replicas)]
    print(f"a load that triples: {name}", file=sys.stderr)
    return {
        "rule": name, **figures(outcomes, study.bound_s),
        "mean_replicas": round(replica_s(counts, RISE.cycle_s) / RISE.cycle_s, 2),
        "most_replicas": max(count for _, count in counts),
        "replicas": [(round(when, 1), count) for when, count in counts],
    }  # fmt: skip


def rules(rows: int) -> dict[str, Rule]:
    """What deploy/k8s and deploy/ray do where a step has so many rows, and what becomes of it with another signal."""
    k8s = functools.partial(Rule, look_s=15, up_s=0, down_s=300, each_s=120, least=2, most=8)
    ray = functools.partial(Rule, look_s=10, mean_s=30, up_s=10, down_s=300, least=2, most=8)
    return {
        "32 wait, mean of 60 s": k8s(by_waiting(32), mean_s=60),
        "32 wait, mean of 15 s": k8s(by_waiting(32), mean_s=15),
        f"deploy/k8s: {rows} wait, mean of 15 s": k8s(by_waiting(rows), mean_s=15),
        f"{2 * rows} wait or run, mean of 15 s": k8s(by_slots(2 * rows), mean_s=15),
        f"deploy/ray: {2 * rows} wait or run": ray(by_slots(2 * rows)),
        f"{rows} wait, as fast as deploy/ray": ray(by_waiting(rows)),
    }


def options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", type=machine_of, help="rows:ms,rows:ms,... instead of measuring this machine")
    parser.add_argument("--rows", type=int, help="network rows of a full step (as the engine chooses by the curve)")
    parser.add_argument("--outside-ms", type=float, default=0.0, help="of a request before and after its steps (0)")
    parser.add_argument("--bound", type=float, default=2.0, help="seconds that p99 may be (2)")
    parser.add_argument("--price", type=float, default=0.1, help="of an hour of a replica, in any currency (0.1)")
    parser.add_argument("--start", type=float, default=15.0, help="seconds until a new replica serves (15)")
    parser.add_argument("--quick", action="store_true", help="at most 16 replicas and 1,000 requests a point")
    return parser.parse_args()


def curves(study: Study, quick: bool) -> list[list[Point]]:
    """The points of each curve: by number of replicas and arrivals, then by route."""
    chosen = [(count, kind, "fewest of two") for count in REPLICAS for kind in ARRIVALS if count <= 16 or not quick]
    chosen += [(ROUTED, kind, route) for kind in ARRIVALS for route in ROUTES]
    return [[measure(study, count, kind, load, route) for load in LOADS[kind]] for count, kind, route in chosen]


def main() -> None:
    chosen = options()
    began = time.monotonic()
    busy = None if chosen.curve else busy_cores()  # a given curve needs no quiet machine
    machine = dataclasses.replace(chosen.curve or this_machine(), outside_s=chosen.outside_ms / 1000)
    machine = dataclasses.replace(machine, rows_limit=chosen.rows or machine.rows_limit)
    study = Study(machine, Bounds(1024), chosen.bound, 1000 if chosen.quick else 10_000)
    bounded = dataclasses.replace(study, bounds=Bounds(1024, queue_s=QUEUE_S))
    found = curves(study, chosen.quick)
    sold = [sellable(points, study, chosen.price) for points in found]
    scaled = [under_a_rise(bounded, f"{count} all the time", count, None, 0.0) for count in FIXED]
    scaled += [
        under_a_rise(bounded, name, rule.least, rule, chosen.start) for name, rule in rules(machine.rows_limit).items()
    ]

    points = list(itertools.chain(*found))
    print(f"steps of at most {machine.rows_limit} rows; load 1 of a replica: {study.rate:.2f} requests/s\n")
    print(table(
        ["replicas", "arrivals", "route", "load", "p50 s", "p99 s", "n=1 p50 s", "n=1 p99 s", "in time", "refused",
         "requests", "waiting a replica", "rows a step"],
        [list(point.values()) for point in points],
    ))  # fmt: skip
    print(f"\np99 within {chosen.bound:g} s, an hour of a replica at {chosen.price:g}:\n")
    print(table(
        ["replicas", "arrivals", "route", "up to load", "the highest tried", "images/s a replica", "a million images",
         "waiting a replica then"],
        [list(of.values()) for of in sold],
    ))  # fmt: skip
    print("\na load of 1.5 replicas that becomes one of 4.5 within a minute:\n")
    names = ("rule", "p50_s", "p99_s", "n1_p99_s", "in_time", "refused", "mean_replicas", "most_replicas")
    print(table(names, [[point[name] for name in names] for point in scaled]))
    print_json(
        "scaling", busy_cores_before=busy, curve_ms=machine.curve_ms, rows_limit=machine.rows_limit,
        outside_ms=chosen.outside_ms, bound_s=chosen.bound,
        price=chosen.price, start_s=chosen.start, requests_per_s=round(study.rate, 3), points=points, sellable=sold,
        rise=scaled, rise_pieces=RISE.pieces, took_s=round(time.monotonic() - began, 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
