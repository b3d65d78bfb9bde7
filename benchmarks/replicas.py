"""Two engines against one, and what a cluster's ingress costs, all in one run.

What: images a second of a full service, and the latency of one small request after the other, of
  one process, 1 thread       `python -m app` with OMP_NUM_THREADS=1: one engine as Ray Serve gives it one CPU
  one process, 2 engines      the same with DDPM_DEVICE=cpu,cpu: several devices under one app
  one process, all threads    its defaults: one engine on every core
  Ray Serve, 1 replica        deploy/ray: proxy, ingress and engine are a process each
  Ray Serve, 2 replicas       needs `make .venv/ray`
How: for each a fresh start and a warm-up. First one client that asks again when answered (n = 1, 10 steps): the median
is what a request takes, its difference between Ray Serve's one replica and the process of one thread is the ingress.
Then 16 clients (n = 4, 20 steps) for the images a second. Rounds go over all of them; medians over rounds count.
On what: weights/mnist, DDIM, PNG answers, over loopback HTTP. This client, Ray Serve's proxy and its ingress share the
machine's cores with the engines: on two cores two engines leave nothing for them, so more cores show more.

    python benchmarks/replicas.py [--quick] [--rounds 3] [--seconds 15]

Eight minutes on two quiet cores, two with --quick.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from typing import Any

from benchmarks import load
from benchmarks.machine import busy_cores, print_json, table
from benchmarks.servers import Contender, health, running
from benchmarks.workload import Kind

ONE, FOUR = Kind(1, 10), Kind(4, 20)
CLIENTS = 16
RAY = "benchmarks.contenders.ray_serve"
THREAD = {"OMP_NUM_THREADS": "1"}
SERVICES = {
    "one process, 1 thread": Contender("app", env=THREAD),
    "one process, 2 engines": Contender("app", env={**THREAD, "DDPM_DEVICE": "cpu,cpu"}),
    "one process, all threads": Contender("app"),
    "Ray Serve, 1 replica": Contender(RAY, env={"REPLICAS": "1"}, needs=("ray",)),
    "Ray Serve, 2 replicas": Contender(RAY, env={"REPLICAS": "2"}, needs=("ray",)),
}

Point = dict[str, Any]


async def small_s(url: str, seconds: float) -> list[float]:
    """What each of one client's small requests took."""
    async with load.client_of(url, load.QUIET_TIMEOUT_S) as client:
        took = []
        while client.now < seconds:
            answer = await client.ask_now(ONE)
            if answer.outcome != "200":
                raise RuntimeError(f"a server without load failed: {answer.outcome}")
            took.append(answer.latency_s)
        return took


async def images_per_s(url: str, seconds: float) -> float:
    """Of clients that keep the service full."""
    async with load.client_of(url, load.QUIET_TIMEOUT_S) as client:
        answers: list[load.Answer] = []
        asking = [asyncio.create_task(client.keep_asking(FOUR, answers)) for _ in range(CLIENTS)]
        await asyncio.sleep(seconds)
        for task in asking:
            task.cancel()
        await asyncio.gather(*asking, return_exceptions=True)
        if bad := {answer.outcome for answer in answers} - {"200"}:
            raise RuntimeError(f"a server under load failed: {bad}")
        return len(answers) * FOUR.n / max(answer.ended_s for answer in answers)


def measure(name: str, seconds: float) -> Point:
    """One service, once."""
    busy = busy_cores()
    with running(SERVICES[name]) as server:
        asyncio.run(load.warm_up(server.url, [ONE, FOUR]))
        small = asyncio.run(small_s(server.url, seconds / 3))
        images = asyncio.run(images_per_s(server.url, seconds))
        says = health(server.url) or {}
    print(f"{name}: {images:.1f} images/s, {1000 * statistics.median(small):.1f} ms", file=sys.stderr)
    return {
        "service": name, "images_per_s": round(images, 2), "small_p50_ms": round(1000 * statistics.median(small), 2),
        "small_p95_ms": round(1000 * statistics.quantiles(small, n=20)[-1], 2),
        "batch_rows_limit": says.get("batch_rows_limit"), "exact": says.get("exact"), "busy_cores_before": busy,
    }  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, help="times that each is started (3)")
    parser.add_argument("--seconds", type=float, help="of the full load (15)")
    parser.add_argument("--quick", action="store_true", help="shows that everything runs; its figures mean little")
    chosen = parser.parse_args()
    rounds, seconds = chosen.rounds or (1 if chosen.quick else 3), chosen.seconds or (3.0 if chosen.quick else 15.0)
    began = time.monotonic()
    names = [name for name, contender in SERVICES.items() if contender.installed]
    points = [measure(name, seconds) for _ in range(rounds) for name in names]

    def median(name: str, what: str) -> float:
        return statistics.median(point[what] for point in points if point["service"] == name)

    first = names[0]
    rows = [
        [
            name, *(median(name, what) for what in ("images_per_s", "small_p50_ms", "small_p95_ms")),
            round(median(name, "images_per_s") / median(first, "images_per_s"), 2),
            round(median(name, "small_p50_ms") - median(first, "small_p50_ms"), 1),
        ]
        for name in names
    ]  # fmt: skip
    print(table(["service", "images/s", "n=1 p50 ms", "p95 ms", "images/s, x the first", "ms more than it"], rows))
    for name in SERVICES:
        if name not in names:
            print(f"{name}: not installed")
    print_json("replicas", points=points, clients=CLIENTS, seconds=seconds, took_s=round(time.monotonic() - began, 1))


if __name__ == "__main__":
    main()
