"""What it is worth that the models of one process take turns on the device.

What: images/s and the seconds of a small request (one image, p50 and p95) on each of two models, both kept busy by one
request of 32 images at a time: with one lock for both engines, as the service has it, and with a lock each, so that
their steps run at once. In turns, in one process, the weights that are shipped, DDIM with 10 steps.

    python -m benchmarks.two_models --seconds 120
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Sequence

from app.engine.admission import Bounds
from app.engine.engine import Engine
from app.engine.request import GenerateParams
from app.engine.runner import Runner
from benchmarks.machine import ROOT, busy_cores, print_json, table
from benchmarks.turns import rounds_within

TURN_S = 5.0
SMALL_EVERY_S = 0.1


def engines(locks: Sequence[threading.Lock]) -> list[Engine]:
    """Two engines of the shipped weights, ready."""
    made = []
    for lock in locks:
        engine = Engine(lambda: Runner.load(str(ROOT / "weights" / "mnist"), "cpu"), bounds=Bounds(1024), device=lock)
        engine.start()
        while engine.status == "starting":
            time.sleep(0.05)
        made.append(engine)
    return made


def asked(name: str, images: int) -> GenerateParams:
    return GenerateParams(name, tuple(range(images)), (7,) * images, "ddim", 10, 0.0, 1.0)


def turn(pair: Sequence[Engine]) -> tuple[float, list[float]]:
    """Images/s of both together, and the seconds of their small requests."""
    until = time.monotonic() + TURN_S
    done, took = [0, 0], []

    def large(k: int) -> None:
        while time.monotonic() < until:
            pair[k].submit(asked("large", 32)).result()
            done[k] += 32

    def small(k: int) -> None:
        while time.monotonic() < until:
            start = time.monotonic()
            pair[k].submit(asked("small", 1)).result()
            took.append(time.monotonic() - start)
            done[k] += 1
            time.sleep(SMALL_EVERY_S)

    threads = [threading.Thread(target=work, args=(k,)) for work in (large, small) for k in (0, 1)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(done) / TURN_S, took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    seconds, busy = parser.parse_args().seconds, busy_cores()
    shared = threading.Lock()
    sides = {"one lock": engines([shared, shared]), "a lock each": engines([threading.Lock(), threading.Lock()])}
    rates: dict[str, list[float]] = {name: [] for name in sides}
    small: dict[str, list[float]] = {name: [] for name in sides}
    for _ in rounds_within(seconds, 3, 100):
        for name, pair in sides.items():
            rate, took = turn(pair)
            rates[name].append(rate)
            small[name] += took
    found = [
        {
            "engines": name,
            "images_per_s": statistics.median(rates[name]),
            "least": min(rates[name]),
            "most": max(rates[name]),
            "small_p50_ms": 1000 * statistics.median(small[name]),
            "small_p95_ms": 1000 * statistics.quantiles(small[name], n=20)[-1],
        }
        for name in sides
    ]
    print(table(list(found[0]), [list(side.values()) for side in found]))
    print_json("two_models", sides=found, busy_cores_before=busy)


if __name__ == "__main__":
    main()
