"""An autoscaler in simulated time: it looks at the replicas now and then, and adds or takes out some."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence

from benchmarks.simulation import Replica, Simulation


@dataclasses.dataclass(frozen=True)
class Rule:
    """How many replicas are wanted, and how soon that counts.

    What is wanted for `up_s` on end is added, at most as many within a minute as there were. What nobody wanted for
    `down_s` is taken out, all at once or one every `each_s`.
    """

    wanted: Callable[
        [float, float], float
    ]  # from images that wait and images that have begun, of all replicas together
    look_s: float  # from one look to the next
    mean_s: float  # of what is seen: the mean of the looks of so long
    up_s: float
    down_s: float
    each_s: float | None = None
    least: int = 1
    most: int = 100


def by_waiting(target: float) -> Callable[[float, float], float]:
    """Until `target` images wait in each, as the Kubernetes objects of deploy/k8s have it."""
    return lambda waiting, running: waiting / target


def by_slots(target: float) -> Callable[[float, float], float]:
    """Until each has `target` images, those that have begun counted in, as deploy/ray has it."""
    return lambda waiting, running: (waiting + running) / target


class Autoscaler:
    """Holds a simulation to a rule. A new replica is there `start_s` after it was wanted.

    Args:
        new: makes one.
    """

    def __init__(self, simulation: Simulation, rule: Rule, start_s: float, new: Callable[[], Replica]) -> None:
        self._simulation, self._rule, self._start_s, self._new = simulation, rule, start_s, new
        self._count = len(simulation.replicas)  # those that start counted in
        self._seen: list[tuple[float, float, float]] = []  # when, waiting, running
        self._wanted: list[tuple[float, int]] = []
        self.counts: list[tuple[float, int]] = [(0.0, self._count)]  # paid for, from when on
        simulation.every(rule.look_s, self._look)

    def _look(self) -> None:
        rule, now = self._rule, self._simulation.now
        schedulers = [replica.scheduler for replica in self._simulation.replicas]
        seen = now, float(sum(s.waiting for s in schedulers)), float(sum(s.running for s in schedulers))
        self._seen = [*(old for old in self._seen if old[0] > now - rule.mean_s), seen]
        waiting, running = (sum(old[k] for old in self._seen) / len(self._seen) for k in (1, 2))
        wanted = min(rule.most, max(rule.least, math.ceil(rule.wanted(waiting, running))))
        self._wanted = [*(old for old in self._wanted if old[0] >= now - rule.down_s), (now, wanted)]
        up = min(count for when, count in self._wanted if when >= now - rule.up_s)
        down = max(count for _, count in self._wanted)
        if up > self._count:
            self._add(min(up, 2 * self._least_lately(60.0)) - self._count)
        elif down < self._count and now >= rule.down_s:
            if rule.each_s is None:
                self._take_out(self._count - down)
            elif now >= self.counts[-1][0] + rule.each_s:
                self._take_out(1)

    def _least_lately(self, seconds: float) -> int:
        lately = [count for when, count in self.counts if when > self._simulation.now - seconds]
        before = [count for when, count in self.counts if when <= self._simulation.now - seconds]
        return min([*lately, *before[-1:]])

    def _add(self, count: int) -> None:
        for _ in range(count):
            self._simulation.at(
                self._simulation.now + self._start_s, lambda: self._simulation.replicas.append(self._new())
            )
        self._now_are(self._count + max(count, 0))

    def _take_out(self, count: int) -> None:
        ready = self._simulation.replicas
        count = min(count, len(ready) - 1)
        del ready[len(ready) - count :]
        self._now_are(self._count - count)

    def _now_are(self, count: int) -> None:
        if count != self._count:
            self._count = count
            self.counts.append((self._simulation.now, count))


def replica_s(counts: Sequence[tuple[float, int]], until_s: float) -> float:
    """Replica-seconds that were paid for."""
    ends = [*(when for when, _ in counts[1:]), until_s]
    return sum(count * (end - when) for (when, count), end in zip(counts, ends, strict=True))
