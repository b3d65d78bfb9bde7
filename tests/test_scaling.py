"""What benchmarks/scaling.py makes of the simulation, and that docs/scaling.md shows what it printed."""

from __future__ import annotations

import io
import itertools
import json
import runpy
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.engine.admission import Bounds
from benchmarks.autoscaling import Autoscaler, Rule, by_slots, by_waiting, replica_s
from benchmarks.scaling import Study, crossing, mixed, sellable
from benchmarks.simulation import Simulation, fewest_of_two
from benchmarks.step_curve import machine_of
from benchmarks.workload import Rates
from tests.test_readme import ROOT

SCALING = ROOT / "docs" / "scaling"
PAGE = (ROOT / "docs" / "scaling.md").read_text()
STUDY = Study(machine_of("1:2.9,2:3.9,4:6,8:10.4,16:19.6"), Bounds(1024), bound_s=2.0, least=1000)


def points(*p99: float) -> list[dict[str, Any]]:
    return [
        {"replicas": 4, "arrivals": "poisson", "route": "x", "load": 0.5 + 0.1 * k, "waiting": 2.0 * k, "p99_s": value}
        for k, value in enumerate(p99)
    ]


def test_p99_leaves_its_bound_between_two_points_at_the_last_or_before_the_first() -> None:
    assert crossing(points(1.0, 1.5, 2.5), 2.0) == pytest.approx((0.65, 3.0))
    assert crossing(points(1.0, 1.5), 2.0) == pytest.approx((0.6, 2.0))
    assert crossing(points(2.5, 1.0), 2.0) == (None, None)


def test_a_million_images_cost_the_hours_that_they_take() -> None:
    sold = sellable(points(1.0, 1.5, 2.5), STUDY, price=0.1)
    hours = 1e6 / sold["images_per_s"] / 3600
    assert sold["per_million"] == pytest.approx(0.1 * hours, rel=0.01)
    assert sold["images_per_s"] == pytest.approx(0.65 * STUDY.rate * 2.05, rel=0.01)


def scaled(rule: Rule, load: float, seconds: float) -> tuple[list[tuple[float, int]], float]:
    """Replicas over time, from one on, and the share of requests within two seconds."""
    rate = load * STUDY.rate
    simulation = Simulation([STUDY.replica()], fewest_of_two(1))
    scaler = Autoscaler(simulation, rule, 5.0, STUDY.replica)
    outcomes = simulation.run(mixed(rate, round(rate * seconds), Rates(((seconds, 1.0),))))
    assert len(simulation.replicas) == scaler.counts[-1][1]
    return scaler.counts, sum((o.wait_s or 9) < 2 for o in outcomes) / len(outcomes)


def test_an_autoscaler_adds_what_is_wanted_and_takes_out_what_is_not() -> None:
    counts, _ = scaled(Rule(by_slots(16), look_s=5, mean_s=10, up_s=0, down_s=20, most=4), 2.5, 100)
    found = [count for _, count in counts]
    assert max(found) in (3, 4)
    assert all(after <= 2 * before for before, after in itertools.pairwise(found))
    counts, in_time = scaled(Rule(lambda waiting, running: 3, look_s=5, mean_s=5, up_s=0, down_s=20), 0.5, 80)
    assert counts == [(0.0, 1), (5.0, 2), (65.0, 3)]
    assert in_time == 1.0
    assert by_waiting(4)(8, 100) == 2


def test_what_is_paid_for_is_replicas_times_seconds() -> None:
    assert replica_s([(0.0, 2), (10.0, 5), (20.0, 1)], 30.0) == 20 + 50 + 10


# The page


@pytest.fixture(scope="module")
def plots() -> Iterator[dict[str, Any]]:
    """What docs/scaling_plots.py defines, with its sibling to import; nothing is drawn."""
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "docs")
        yield runpy.run_path(str(ROOT / "docs" / "scaling_plots.py"))


def test_every_picture_is_made_by_the_plots_and_shown(plots: dict[str, Any]) -> None:
    lying = {path.name for path in SCALING.glob("*.png")}
    assert set(plots["PICTURES"]) == lying
    assert all(f"](scaling/{name})" in PAGE for name in lying)
    assert sum((SCALING / name).stat().st_size for name in lying) < 200_000


@pytest.mark.parametrize("name", ["load.png", "worth.png", "rise.png", "agreement.png"])
def test_a_picture_drawn_anew_is_the_one_that_lies_there(plots: dict[str, Any], name: str) -> None:
    lying, new = Image.open(SCALING / name), Image.open(io.BytesIO(plots["make"](name)))
    assert lying.size == new.size
    different = np.abs(np.subtract(*(np.asarray(i.convert("L"), dtype=np.int16) for i in (lying, new)))) > 64
    assert different.mean() < 0.002


# What the page says of what was printed


def printed(name: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((SCALING / f"{name}.json").read_text())
    return found


def test_the_page_has_what_a_replica_holds() -> None:
    sold = {(one["replicas"], one["arrivals"]): one for one in printed("scaling")["sellable"] if one["replicas"] != 8}
    for replicas in sorted({replicas for replicas, _ in sold}):
        cells = [f"{replicas:,}"]
        for arrivals in ("poisson", "bursts"):
            one = sold[replicas, arrivals]
            more = " or more" if one["highest_tried"] else ""
            cells += [f"{one['load'] + 1e-9:.2f}{more}, {one['images_per_s']:.0f}", f"{one['per_million']:.2f}"]
        assert f"| {' | '.join(cells)} |" in PAGE


def test_the_page_has_what_autoscalers_make_of_a_rise() -> None:
    rows = [line.split(" | ") for line in PAGE.splitlines() if line.count("|") == 6 and "%" in line]
    rise = [one for one in printed("scaling")["rise"] if one["rule"] != "6 all the time"]
    assert len(rows) == len(rise)
    for cells, one in zip(rows, rise, strict=True):
        said = [f"{100 * one['in_time']:.1f} %", f"{one['p99_s']:.2f} s", str(one["refused"])]
        assert cells[1:4] == said
        assert float(cells[4].strip(" |")) == pytest.approx(one["mean_replicas"], abs=0.051)


def test_the_page_has_what_was_measured_and_simulated() -> None:
    points = printed("agreement")["points"]
    names = ("p50_s", "p99_s", "n1_p50_s", "n1_p99_s", "images_per_s")
    for point in points:
        pairs = [f"{point['measured'][name]:.3g} / {point['own_steps'][name]:.3g}" for name in names]
        assert f", {point['load']:g} | {' | '.join(pairs)} |" in PAGE
    for how in ("own_steps", "foretold"):
        off = [abs(point["off"][how][name]) for point in points for name in names[:4]]
        assert f"{sum(value <= 0.15 for value in off)} of {len(off)} latencies" in " ".join(PAGE.split())
