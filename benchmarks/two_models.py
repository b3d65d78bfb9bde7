"""What it is worth that the models of one process take turns on the device.

What: images/s and the seconds of a small request (one image) on each of two models, both kept busy by one request of 32
images at a time: with turns, as the service has them, with a `threading.Lock`, which promises no order, and with
nothing, so that their steps run at once. In rounds, in one process, the weights that are shipped, DDIM with 10 steps.

    python -m benchmarks.two_models --seconds 120
"""

from __future__ import annotations

import argparse
import statistics
import threading
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from app.engine.admission import Bounds
from app.engine.engine import Engine
from app.engine.request import GenerateParams
from app.engine.runner import Runner
from app.engine.turns import Turns
from benchmarks.machine import ROOT, busy_cores, print_json, table
from benchmarks.turns import rounds_within

TURN_S = 5.0
SMALL_EVERY_S = 0.1


def engines(device: AbstractContextManager[object]) -> list[Engine]:
    """Two engines of the shipped weights, ready."""
    made = []
    for _ in range(2):
        engine = Engine(lambda: Runner.load(str(ROOT / "weights" / "mnist"), "cpu"), bounds=Bounds(1024), device=device)
        engine.start()
        while engine.status == "starting":
            time.sleep(0.05)
        made.append(engine)
    return made


def asked(name: str, images: int) -> GenerateParams:
    return GenerateParams(name, tuple(range(images)), (7,) * images, "ddim", 10, 0.0, 1.0)


def turn(pair: Sequence[Engine]) -> tuple[float, list[float]]:
    """Images/s of both together, and the seconds of their small requests."""
    began = time.monotonic()
    until = began + TURN_S
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
    return sum(done) / (time.monotonic() - began), took


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seconds", type=float, default=120)
    seconds, busy = parser.parse_args().seconds, busy_cores()
    ways = {"turns": Turns(), "a lock": threading.Lock(), "at once": nullcontext()}
    sides = {name: engines(way) for name, way in ways.items()}
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
            "small_most_ms": 1000 * max(small[name]),
        }
        for name in sides
    ]
    print(table(list(found[0]), [list(side.values()) for side in found]))
    print_json("two_models", sides=found, busy_cores_before=busy)


if __name__ == "__main__":
    main()
