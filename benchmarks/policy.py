"""The shipped scheduling policy against five others, in simulated time.

What: what clients wait for (from arrival to the last step) by kind of request, the share done within 2 s, and images a
second, at loads below and above what the machine can do.
How: benchmarks/simulation.py with one replica: the real app.engine.scheduler.Scheduler, which knows no clock, and steps
that take what the step-time curve says. The policies are those of benchmarks/policies.py. No HTTP, no threads, no
network: differences are the policy's alone.
On what: 4,000 requests at Poisson times per load, the same ones for every policy: 80 % n=1 steps=10, 10 % n=4 steps=10,
5 % n=16 steps=20, 3 % n=64 steps=10, 2 % n=1 steps=100; 1,024 image slots, beyond which a request is refused. Load 1 is
full steps all the time. The curve is the one that the engine measures at its start, of weights/mnist on this machine,
or --curve "1:2.9,2:3.9,..." (rows:ms).

    python benchmarks/policy.py [--curve ROWS:MS,...] [--quick]

Two minutes, seconds with --quick.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from typing import Any

from app.engine.scheduler import Scheduler
from app.engine.steptime import StepTime
from benchmarks.load import percentiles
from benchmarks.machine import busy_cores, print_json, table
from benchmarks.policies import FirstComeFirstServed, RoundRobin, ShortestFirst, WhereItPays, WholeRequests
from benchmarks.simulation import Replica, Simulation, at_first
from benchmarks.step_curve import Machine, machine_of, this_machine
from benchmarks.workload import Arrival, Kind, Mix, arrivals, mean_work

ONE, SHEET, LONG = Kind(1, 10), Kind(64, 10), Kind(1, 100)
MIX: Mix = [(ONE, 80), (Kind(4, 10), 10), (Kind(16, 20), 5), (SHEET, 3), (LONG, 2)]
LOADS = (0.5, 0.8, 0.95, 1.3)
SOON_S = 2.0
SEED = 20_261_123
POLICIES: dict[str, Callable[[StepTime], Scheduler]] = {
    "shipped": lambda step_time: Scheduler(),
    "shortest first": lambda step_time: ShortestFirst(),
    "filled where it pays": WhereItPays,
    "first come first served": lambda step_time: FirstComeFirstServed(),
    "round robin": lambda step_time: RoundRobin(),
    "whole requests": lambda step_time: WholeRequests(),
}


def simulate(scheduler: Scheduler, machine: Machine, requests: Sequence[Arrival]) -> dict[str, Any]:
    """Serves the requests; what their clients saw."""
    simulation = Simulation([Replica(machine, scheduler=scheduler)], at_first)
    outcomes = simulation.run(requests)
    waits = [(outcome.arrival.kind, outcome.wait_s) for outcome in outcomes if outcome.wait_s is not None]
    images = sum(kind.n for kind, _ in waits)
    ones, sheets, longs = ([wait for kind, wait in waits if kind == of] for of in (ONE, SHEET, LONG))
    return {
        "n1_p50_s": percentiles(ones)["p50"], "n1_p99_s": percentiles(ones)["p99"],
        "n64_p99_s": percentiles(sheets)["p99"], "steps100_p99_s": percentiles(longs)["p99"],
        "longest_s": round(max(wait for _, wait in waits), 3),
        "within_2s": round(sum(wait <= SOON_S for _, wait in waits) / len(requests), 4),
        "images_per_s": round(images / simulation.now, 1), "refused": len(requests) - len(waits),
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--curve", type=machine_of, help="rows:ms,rows:ms,... instead of measuring this machine")
    parser.add_argument("--quick", action="store_true", help="400 requests a load")
    chosen = parser.parse_args()
    began = time.monotonic()
    busy = None if chosen.curve else busy_cores()  # a given curve needs no quiet machine
    machine = chosen.curve or this_machine()
    rate = machine.capacity / mean_work(MIX)  # requests a second at load 1
    points = []
    for load in LOADS:
        requests = arrivals(MIX, load * rate, 400 if chosen.quick else 4000, SEED)
        for name, policy in POLICIES.items():
            points.append({"load": load, "policy": name, **simulate(policy(machine.step_time), machine, requests)})

    curve = {rows: round(1000 * seconds, 3) for rows, seconds in machine.step_time.points}
    print(
        f"steps of at most {machine.rows_limit} rows; load 1: {machine.capacity:.0f} row-steps/s, {rate:.2f} requests/s"
    )
    print(f"curve, rows: ms: {curve}\n")
    print(table(
        ["load", "policy", "n=1 p50 s", "n=1 p99 s", "n=64 p99 s", "100 steps p99 s", "longest s", "within 2 s",
         "images/s", "refused"],
        [list(point.values()) for point in points],
    ))  # fmt: skip
    print_json(
        "policy", busy_cores_before=busy, curve_ms=curve, rows_limit=machine.rows_limit,
        rows_multiple=machine.rows_multiple,
        row_steps_per_s=round(machine.capacity, 1), points=points, took_s=round(time.monotonic() - began, 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
