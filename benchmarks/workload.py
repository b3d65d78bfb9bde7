"""Requests at random times, the same ones for the same seed."""

from __future__ import annotations

import dataclasses
import random
from collections.abc import Sequence


@dataclasses.dataclass(frozen=True)
class Kind:
    """Requests that cost the same."""

    n: int
    steps: int

    @property
    def work(self) -> int:
        """Row-steps: network rows of all its steps."""
        return self.n * self.steps


@dataclasses.dataclass(frozen=True)
class Arrival:
    """One request, and when it comes."""

    at_s: float
    kind: Kind
    label: int
    seed: int


@dataclasses.dataclass(frozen=True)
class Bursts:
    """So often, for so long, the rate is so many times the mean; between bursts it is lower, so that the mean is kept.

    The same length each time, where others draw it at random: few bursts are then enough for a percentile.
    """

    every_s: float = 10.0
    lasting_s: float = 1.0
    times: float = 3.0

    def when(self, expected_s: float) -> float:
        """The time until which as many come as without bursts until `expected_s`.

        A burst is in the middle of its cycle.
        """
        cycles, left = divmod(expected_s, self.every_s)
        calm_s = (self.every_s - self.lasting_s) / 2
        calm = calm_s * self._calm_rate
        burst = self.lasting_s * self.times
        in_burst = min(max(left - calm, 0.0), burst)
        return cycles * self.every_s + in_burst / self.times + (left - in_burst) / self._calm_rate

    @property
    def _calm_rate(self) -> float:
        return (self.every_s - self.times * self.lasting_s) / (self.every_s - self.lasting_s)


Mix = Sequence[tuple[Kind, int]]
"""Kinds, and how many of each there are in a block."""


def block(mix: Mix) -> list[Kind]:
    """One of the smallest sets of requests with exactly this mix."""
    return [kind for kind, count in mix for _ in range(count)]


def mean_work(mix: Mix) -> float:
    """Row-steps of a request."""
    kinds = block(mix)
    return sum(kind.work for kind in kinds) / len(kinds)


def arrivals(mix: Mix, rate: float, count: int, seed: int, bursts: Bursts | None = None) -> list[Arrival]:
    """`count` requests of a Poisson process of `rate` a second, given that so many came in count / rate seconds.

    Kinds come in shuffled blocks of the exact mix: drawn one by one, the few that are most of the work would make the
    load of a short window another one than it is called.
    """
    rng = random.Random(seed)
    times = sorted(rng.uniform(0, count / rate) for _ in range(count))
    if bursts:
        times = [bursts.when(at_s) for at_s in times]
    kinds: list[Kind] = []
    while len(kinds) < count:
        kinds += rng.sample(of_block := block(mix), len(of_block))
    return [
        Arrival(at_s, kind, rng.randrange(10), rng.randrange(2**31)) for at_s, kind in zip(times, kinds, strict=False)
    ]
