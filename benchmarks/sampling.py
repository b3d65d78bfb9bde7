"""Images a second of the same weights and sampler: the service, the library, diffusers; and lucidrains' package.

What: DDIM, 20 steps, 1 and 64 labelled images from one x_T to the bytes of a PNG, by
  ours, HTTP          `python -m app`, its defaults, over loopback: request, queue, drawing, PNG, answer
  ours, in process    sampling.sample() with the network loaded once; torch has one thread beside ONNX Runtime's, as in
                      the service
  diffusers           UNet2DModel and DDIMScheduler from our directory, loaded once; x_T is given, not drawn
  lucidrains          denoising-diffusion-pytorch, where it is installed (`pip install denoising-diffusion-pytorch`):
                      its U-Net cannot hold our weights, so one of about our size with random ones; no labels
the last two with torch's default memory format and with channels_last; the faster one is what ours is compared with.
Then one digit over HTTP, of the default preset and of the student of two calls (weights/mnist-2) by turns, and
diffusers' DDPMPipeline with its 1000 steps for one image.
How: contenders take turns; while one is measured, the others (the service too) are idle, and a draw of one image that
is not timed goes before those that are. Medians of rounds, ratios within a round, in brackets their least and most.
Before anything is timed the images are compared: where they differ by more than a few grey levels, the benchmark ends.

    python benchmarks/sampling.py [--quick] [--rounds 5]

Three minutes on two cores, half of one with --quick (one round, 8 images for 64, 50 of the pipeline's 1000 steps).
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import io
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import httpx
import numpy as np
from numpy.typing import NDArray
from PIL import Image

from benchmarks.drawing import SEED, STEPS, THREADS, Contender, contenders, pipeline_s, service
from benchmarks.machine import busy_cores, print_json, table
from benchmarks.servers import CONTENDERS, health, serving
from benchmarks.turns import Rounds, Side, Spread, in_turns, medians, ratio

BATCHES, QUICK_BATCHES = {1: 4, 64: 1}, {1: 1, 8: 1}  # and how many draws of it a turn times
THEIRS = ("diffusers", "lucidrains")
CLOSE = 3  # grey levels of 255 between two float32 chains of 20 steps
GOALS = {1: 4.0, 64: 1.5}  # ours over HTTP against diffusers
DIGIT_GOALS_MS, DIGITS = {"mnist": 60, "mnist-2": 20}, 20  # models, and how many digits a turn times


def differences(everyone: Sequence[Contender], batches: Iterable[int]) -> Iterator[dict[str, Any]]:
    """Grey levels between the service's images and each other contender's. Raises SystemExit where they are others."""
    first, *others = (who for who in everyone if who.same_images)
    for n in batches:
        reference = grey_levels(first.draw(n))
        for who in others:
            apart = np.abs(grey_levels(who.draw(n)) - reference)
            if apart.max() > CLOSE:
                raise SystemExit(f"{who.name} draws other images than {first.name}: {apart.max()} grey levels apart")
            yield {
                "images of": who.name, "batch": n, "most grey levels": int(apart.max()),
                "share of pixels that differ": round(float((apart > 0).mean()), 5),
            }  # fmt: skip


def grey_levels(png: bytes) -> NDArray[np.int16]:
    return np.array(Image.open(io.BytesIO(png)), np.int16)


def faster(of: Mapping[Contender, Rounds], library: str) -> Contender:
    """The library with the memory format that is faster here."""
    return min((who for who in of if who.library == library), key=lambda who: np.median(medians(of[who])))


def compared(of: Mapping[Contender, Rounds], n: int) -> list[dict[str, Any]]:
    """A line of figures for each contender at one batch size."""
    against = {library: faster(of, library) for library in THEIRS if any(who.library == library for who in of)}
    return [
        {
            "contender": who.name, "batch": n,
            "ms": Spread.of(1000 * s for s in medians(took)),
            "ms_per_call_and_image": Spread.of(1000 * s / n / STEPS for s in medians(took)),
            "images_per_s": Spread.of(n / s for s in medians(took)),
            **{f"times_{library}": ratio(of[best], took) for library, best in against.items()},
        }
        for who, took in of.items()
    ]  # fmt: skip


def single_digits(models: Mapping[str, httpx.Client], memory_format: str, steps: int, rounds: int) -> dict[str, Any]:
    """One image of each model's default preset over HTTP, before and after the pipeline's one."""
    sides = [Side(functools.partial(service, http, label=7, seed=SEED), functools.partial(service, http))
             for http in models.values()]  # fmt: skip
    before = in_turns(sides, range(rounds), DIGITS)
    theirs = pipeline_s(memory_format, steps)
    after = in_turns(sides, range(rounds), DIGITS)
    found: dict[str, Any] = {"pipeline_s": round(theirs, 2), "pipeline_steps": steps}
    for name, *turns in zip(models, before, after, strict=True):
        took = sorted(s for half in turns for calls in half for s in calls)
        p50, p95 = (1000 * float(np.percentile(took, percent)) for percent in (50, 95))
        found[name] = {
            "p50_ms": round(p50, 2), "p95_ms": round(p95, 2), "digits": len(took), "goal_ms": DIGIT_GOALS_MS[name],
            "met": p50 <= DIGIT_GOALS_MS[name], "times_pipeline": round(1000 * theirs / p50, 1),
        }  # fmt: skip
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5, help="of 64 images; twice as many of one (5)")
    parser.add_argument("--quick", action="store_true", help="shows that everything runs; its figures mean little")
    chosen = parser.parse_args()
    began, busy = time.monotonic(), busy_cores()
    rounds, batches = (1, QUICK_BATCHES) if chosen.quick else (chosen.rounds, BATCHES)

    ours = CONTENDERS["ours"]
    distilled = dataclasses.replace(ours, env={"DDPM_MODEL": "weights/mnist-2"})
    client = functools.partial(httpx.Client, timeout=120, trust_env=False)
    with (
        serving(ours) as url, client(base_url=url) as http,
        serving(distilled) as student_url, client(base_url=student_url) as student,
    ):  # fmt: skip
        engine = health(url)
        everyone, networks = contenders(http, batches)
        apart = list(differences(everyone, batches))
        print(table(list(apart[0]), [list(of.values()) for of in apart]), end="\n\n", flush=True)
        took = {}
        for n, timed in batches.items():
            print(f"batch {n} ...", file=sys.stderr)
            turns = range(rounds if n > 1 else 2 * rounds)
            took[n] = dict(zip(everyone, in_turns([who.side(n) for who in everyone], turns, timed), strict=True))
        memory_format, steps = faster(took[1], "diffusers").memory_format, 50 if chosen.quick else 1000
        one = single_digits({"mnist": http, "mnist-2": student}, memory_format, steps, rounds)

    figures = [line for n in batches for line in compared(took[n], n)]
    header = [column.replace("_", " ").replace("times", "times as fast as") for column in figures[0]]
    print(table(header, [list(of.values()) for of in figures]), end="\n\n")
    print(table(list(networks[0]), [list(of.values()) for of in networks]), end="\n\n")
    if len(networks) == 1:
        print("lucidrains: denoising-diffusion-pytorch is not installed")
    goals = {}
    for of in figures:
        if of["contender"] == everyone[0].name and (goal := GOALS.get(of["batch"])):
            times = of["times_diffusers"]
            goals[of["batch"]] = {"goal": goal, "times": times.json(3), "met": times.median >= goal}
            print(f"{of['batch']} over HTTP: {times} times as fast as diffusers, goal {goal}")
    print(f"{one['pipeline_steps']} steps of diffusers' pipeline: {one['pipeline_s']} s")
    for name in DIGIT_GOALS_MS:
        of = one[name]
        print(f"one digit of {name} over HTTP: {of['p50_ms']} ms (p95 {of['p95_ms']}), goal {of['goal_ms']}, ", end="")
        print(f"{of['times_pipeline']} times as fast")
    print_json(
        "sampling", busy_cores_before=busy, threads=THREADS, steps=STEPS, rounds=rounds, engine=engine,
        differences=apart, networks=networks, goals=goals, digits=one,
        figures=[{k: v.json(4) if isinstance(v, Spread) else v for k, v in of.items()} for of in figures],
        took_s=round(time.monotonic() - began, 1),
    )  # fmt: skip


if __name__ == "__main__":
    main()
