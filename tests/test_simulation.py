"""The simulation of replicas (benchmarks/simulation.py) against formulas, a loop without events, and itself."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import pytest

from app.engine.admission import Bounds
from app.engine.scheduler import Scheduler
from app.engine.steptime import StepTime
from benchmarks.simulation import (
    Outcome,
    Replica,
    Route,
    Simulation,
    at_first,
    at_random,
    fewest_images,
    fewest_of_two,
    least_expected_end,
    round_robin,
)
from benchmarks.step_curve import Machine, machine_of
from benchmarks.workload import Arrival, Kind, Mix, Rates, arrivals, bursts, mean_work

MIX: Mix = [(Kind(1, 10), 16), (Kind(4, 10), 2), (Kind(16, 20), 1), (Kind(1, 50), 1)]
MACHINE = machine_of("1:2.9,2:3.9,4:6,8:10.4,16:19.6")
ROUTES: dict[str, Callable[[], Route]] = {
    "least expected end": lambda: least_expected_end, "fewest of two": lambda: fewest_of_two(1),
    "fewest images": lambda: fewest_images, "at random": lambda: at_random(1), "round robin": round_robin,
}  # fmt: skip


def requests_at(load: float, count: int, replicas: int = 1, rates: Rates | None = None) -> list[Arrival]:
    return arrivals(MIX, load * replicas * MACHINE.requests_per_s(mean_work(MIX)), count, 7, rates)


def simulate(replicas: int, route: Route, requests: Sequence[Arrival]) -> list[Outcome]:
    return Simulation([Replica(MACHINE) for _ in range(replicas)], route).run(requests)


def waits(outcomes: Sequence[Outcome]) -> list[float]:
    """In order, of those that were not refused."""
    return sorted(outcome.wait_s for outcome in outcomes if outcome.wait_s is not None)


def one_server(machine: Machine, requests: Sequence[Arrival]) -> list[float]:
    """Waits by a loop of steps, without events, routes or admission."""
    scheduler, now, came, ended = Scheduler(), 0.0, 0, dict[int, float]()
    left: dict[str, int] = {}
    while came < len(requests) or left:
        if not left:
            now = max(now, requests[came].at_s)
        while came < len(requests) and requests[came].at_s <= now:
            kind = requests[came].kind
            scheduler.add(str(came), "", [(1, kind.steps)] * kind.n)
            left[str(came)] = kind.n
            came += 1
        picked = scheduler.next(machine.rows_limit)
        now += machine.seconds(len(picked))
        for id_, index in picked:
            if scheduler.advance((id_, index)):
                left[id_] -= 1
                if not left[id_]:
                    del left[id_]
                    scheduler.remove(id_)
                    ended[int(id_)] = now - requests[int(id_)].at_s
    return [ended[place] for place in range(len(requests))]


def test_one_replica_is_a_plain_loop_of_steps() -> None:
    requests = requests_at(0.8, 500)
    assert [outcome.wait_s for outcome in simulate(1, at_first, requests)] == one_server(MACHINE, requests)


@pytest.mark.parametrize("route", ROUTES.values(), ids=ROUTES)
@pytest.mark.parametrize("rates", [None, bursts()], ids=["poisson", "bursts"])
def test_every_request_ends_once_or_is_refused_and_nothing_is_left(
    route: Callable[[], Route], rates: Rates | None
) -> None:  # fmt: skip
    requests = requests_at(1.5, 300, replicas=3, rates=rates)
    replicas = [Replica(MACHINE, Bounds(40)) for _ in range(3)]
    outcomes = Simulation(replicas, route()).run(requests)
    assert [outcome.arrival for outcome in outcomes] == requests
    done = [outcome.arrival.kind for outcome in outcomes if outcome.wait_s is not None]
    assert 0 < len(done) < len(requests)
    assert sum(replica.row_steps for replica in replicas) == sum(kind.work for kind in done)
    assert all(not replica.images and not replica.scheduler.slots for replica in replicas)
    for outcome in outcomes:
        if outcome.wait_s is not None:  # no image has two steps at once
            assert outcome.wait_s >= outcome.arrival.kind.steps * MACHINE.seconds(1) * (1 - 1e-9)


@pytest.mark.parametrize("load", [0.5, 0.8])
def test_a_queue_of_fixed_service_times_waits_as_pollaczek_and_khinchine_say(load: float) -> None:
    """One row a step, one step a request: M/D/1, whose mean wait is load / (2 (1 - load)) services before its own."""
    service_s = 0.01
    machine = Machine(StepTime([(1, service_s)]), rows_limit=1)
    requests = arrivals([(Kind(1, 1), 1)], load / service_s, 20_000, 3)
    found = waits(Simulation([Replica(machine)], at_first).run(requests))
    wanted = service_s * (1 + load / (2 * (1 - load)))
    assert math.fsum(found) / len(found) == pytest.approx(wanted, rel=0.05)


def test_a_random_route_makes_each_replica_a_server_of_its_own() -> None:
    """Poisson arrivals that are divided at random are Poisson."""
    machine = Machine(StepTime([(1, 0.01)]), rows_limit=1)
    requests = arrivals([(Kind(1, 1), 1)], 4 * 0.7 / 0.01, 20_000, 4)
    found = waits(Simulation([Replica(machine) for _ in range(4)], at_random(4)).run(requests))
    assert math.fsum(found) / len(found) == pytest.approx(0.01 * (1 + 0.7 / 0.6), rel=0.06)


def p99(outcomes: Sequence[Outcome]) -> float:
    found = waits(outcomes)
    return found[int(0.99 * len(found))]


def test_many_replicas_under_one_roof_wait_no_longer_than_one() -> None:
    alone = p99(simulate(1, at_first, requests_at(0.85, 1000)))
    for replicas in (2, 8):
        together = requests_at(0.85, 1000, replicas)
        routed = {name: p99(simulate(replicas, route(), together)) for name, route in ROUTES.items()}
        assert routed["least expected end"] <= alone
        assert routed["least expected end"] < routed["fewest of two"] < routed["at random"]


def test_what_a_request_takes_outside_of_steps_delays_nobody_else() -> None:
    machine = Machine(StepTime([(1, 0.01)]), 1, outside_s=0.003)
    at_once = [Arrival(0.0, Kind(1, 5), 0, 0)] * 3
    assert waits(Simulation([Replica(machine)], at_first).run(at_once))[-1] == pytest.approx(15 * 0.01 + 0.003)
    assert machine.requests_per_s(5) == pytest.approx(20)


def test_bursts_keep_the_mean_rate_and_have_their_own() -> None:
    times = [arrival.at_s for arrival in requests_at(0.8, 20_000, 10, bursts(every_s=10, lasting_s=1, times=3))]
    plain = [arrival.at_s for arrival in requests_at(0.8, 20_000, 10)]
    assert times == sorted(times)
    whole = int(times[-1] // 10) * 10
    assert sum(t < whole for t in times) == sum(t < whole for t in plain)
    in_burst = sum(4.5 <= t % 10 < 5.5 for t in times if t < whole)
    assert in_burst / sum(t < whole for t in times) == pytest.approx(0.3, rel=0.05)


def test_a_replica_that_is_taken_out_ends_what_it_has_and_one_that_comes_is_used() -> None:
    simulation = Simulation([Replica(MACHINE)], fewest_of_two(1))
    first, second = simulation.replicas[0], Replica(MACHINE)
    seen: list[int] = []
    simulation.at(0.75, lambda: simulation.replicas.append(second))
    simulation.at(1.75, lambda: simulation.replicas.remove(first))
    simulation.every(0.5, lambda: seen.append(len(simulation.replicas)))
    outcomes = simulation.run(requests_at(0.8, 60))
    assert all(outcome.wait_s is not None for outcome in outcomes)
    assert seen[:4] == [1, 2, 2, 1]
    assert first.row_steps
    assert second.row_steps
