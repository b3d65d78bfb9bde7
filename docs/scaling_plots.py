"""Makes the plots of docs/scaling.md from what two benchmarks printed: `python docs/scaling_plots.py`.

docs/scaling/scaling.json and agreement.json are the last lines of benchmarks/scaling.py and benchmarks/agreement.py.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib import pyplot as plt
from plots import STYLE, png

OUT = Path(__file__).parent / "scaling"
NAMES = {"poisson": "Poisson", "bursts": "bursts"}
SHOWN = (1, 4, 16, 100, 1000)


def figures(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((OUT / f"{name}.json").read_text())
    return found


def curve(points: Sequence[dict[str, Any]], **of: object) -> list[dict[str, Any]]:
    return [point for point in points if all(point[name] == value for name, value in of.items())]


def column(points: Sequence[dict[str, Any]], name: str) -> list[float]:
    return [point[name] for point in points]


def ticks(axis: Any, *at: float) -> None:
    """Of a logarithmic axis, in plain numbers."""
    axis.set_ticks(at, [f"{value:,g}" for value in at])
    axis.set_ticks([], minor=True)


def load() -> bytes:
    """p99 against load, by number of replicas, and by route."""
    scaling = figures("scaling")
    figure, panels = plt.subplots(1, 3, figsize=(10.5, 3.3), sharey=True)
    for axes, kind in zip(panels, NAMES, strict=False):
        for replicas in SHOWN:
            points = curve(scaling["points"], replicas=replicas, arrivals=kind, route="fewest of two")
            axes.plot(column(points, "load"), column(points, "p99_s"), marker=".", label=f"{replicas:,}")
        axes.set(xlabel="load", title=f"{NAMES[kind]}, by replicas")
        axes.legend(fontsize=8)
    routed = sorted({point["route"] for point in scaling["points"]})
    for route in routed:
        points = curve(scaling["points"], replicas=8, arrivals="poisson", route=route)
        panels[2].plot(column(points, "load"), column(points, "p99_s"), marker=".", label=route)
    panels[2].set(xlabel="load", title="Poisson, 8 replicas, by route")
    panels[2].legend(fontsize=8)
    for axes in panels:
        axes.axhline(scaling["bound_s"], color="black", linestyle="--", linewidth=0.8)
    panels[0].set(ylabel="p99 of all requests, s", yscale="log", ylim=(0.3, 10))
    ticks(panels[0].yaxis, 0.5, 1, 2, 5)
    return png(figure)


def worth() -> bytes:
    """Images that a replica can sell, and images that wait where p99 leaves its bound."""
    scaling = figures("scaling")
    figure, (sold, waits) = plt.subplots(1, 2, figsize=(9, 3.3))
    for kind, name in NAMES.items():
        of = [one for one in scaling["sellable"] if one["arrivals"] == kind and one["route"] == "fewest of two"]
        of = sorted((one for one in of if one["replicas"] != 8), key=lambda one: float(one["replicas"]))
        sold.plot(column(of, "replicas"), column(of, "images_per_s"), marker=".", label=name)
        points = curve(scaling["points"], arrivals=kind)
        waits.plot(column(points, "waiting"), column(points, "p99_s"), ".", label=name)
    sold.set(xlabel="replicas", ylabel="images/s a replica, p99 within 2 s", xscale="log", ylim=(0, None))
    waits.set(xlabel="images that wait, a replica", ylabel="p99, s", xscale="log", yscale="log")
    waits.axhline(scaling["bound_s"], color="black", linestyle="--", linewidth=0.8)
    ticks(sold.xaxis, *(one for one in sorted({point["replicas"] for point in scaling["points"]}) if one != 8))
    ticks(waits.xaxis, 0.2, 0.5, 1, 2, 5, 10, 20, 50)
    ticks(waits.yaxis, 0.5, 1, 2, 5)
    sold.legend(fontsize=8, loc="lower right")
    waits.legend(fontsize=8)
    return png(figure)


def rise() -> bytes:
    """Replicas over time by each rule."""
    scaling = figures("scaling")
    seconds, loads = zip(*scaling["rise_pieces"], strict=True)
    ends = [0.0, *itertools.accumulate(seconds)]
    figure, panels = plt.subplots(1, 2, figsize=(9.5, 3.5), sharey=True)
    for one in scaling["rise"]:
        if len(one["replicas"]) > 1:
            when, counts = zip(*one["replicas"], strict=True)
            axes = panels[int("deploy/ray" in one["rule"])]
            axes.step([*when, ends[-1]], [*counts, counts[-1]], where="post", label=one["rule"])
    for axes in panels:
        axes.step(ends, [*loads, loads[-1]], where="post", color="black", linestyle="--", label="load")
        axes.set(xlabel="seconds", ylim=(0, 15.9))
        axes.legend(fontsize=8, loc="upper left")
    panels[0].set(ylabel="replicas")
    return png(figure)


def agreement() -> bytes:
    """Simulated against measured."""
    found = figures("agreement")["points"]
    figure, panels = plt.subplots(1, 2, figsize=(8, 3.7), sharey=True)
    names = {"p50_s": "p50", "p99_s": "p99", "n1_p50_s": "p50 of n = 1", "n1_p99_s": "p99 of n = 1"}
    titles = {"foretold": "step times measured before", "own_steps": "step times of the window itself"}
    for axes, (how, title) in zip(panels, titles.items(), strict=True):
        for name, label in names.items():
            measured, said = ([one[of][name] for one in found] for of in ("measured", how))
            axes.plot(measured, said, "o", markersize=4, label=label)
        ends = [0.02, 5.0]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.fill_between(ends, [0.85 * end for end in ends], [1.15 * end for end in ends], alpha=0.15, color="black")
        axes.set(xlabel="measured, s", title=title, xscale="log", yscale="log", xlim=ends, ylim=ends)
        ticks(axes.xaxis, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
    ticks(panels[0].yaxis, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
    panels[0].set(ylabel="simulated, s")
    panels[0].legend(fontsize=8)
    return png(figure)


PICTURES: dict[str, Callable[[], bytes]] = {
    "load.png": load, "worth.png": worth, "rise.png": rise, "agreement.png": agreement,
}  # fmt: skip


def make(name: str) -> bytes:
    with plt.rc_context(STYLE):
        return PICTURES[name]()


if __name__ == "__main__":
    for name in PICTURES:
        (OUT / name).write_bytes(make(name))
