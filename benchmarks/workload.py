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
class Rates:
    """A rate that changes: for so many seconds so many times the mean, piece by piece, and again from the first."""

    pieces: Sequence[tuple[float, float]]

    @property
    def cycle_s(self) -> float:
        return sum(seconds for seconds, _ in self.pieces)

    def when(self, even_s: float) -> float:
        """The time by which as many have come as by `even_s` at the mean rate."""
        cycle = sum(seconds * times for seconds, times in self.pieces)
        cycles, left = divmod(even_s, cycle)
        now = cycles * self.cycle_s
        for seconds, times in self.pieces:
            if left < seconds * times:
                return now + left / times
            left -= seconds * times
            now += seconds
        return now


def bursts(every_s: float = 10.0, lasting_s: float = 1.0, times: float = 3.0) -> Rates:
    """So often, for so long, so many times the mean; between bursts less, so that the mean is kept.

    The same length each time, where others draw it at random: few bursts are then enough for a percentile.
    """
    calm_s = (every_s - lasting_s) / 2
    calm = (every_s - times * lasting_s) / (every_s - lasting_s)
    return Rates(((calm_s, calm), (lasting_s, times), (calm_s, calm)))


Mix = Sequence[tuple[Kind, int]]
"""Kinds, and how many of each there are in a block."""


def block(mix: Mix) -> list[Kind]:
    """One of the smallest sets of requests with exactly this mix."""
    return [kind for kind, count in mix for _ in range(count)]


def mean_work(mix: Mix) -> float:
    """Row-steps of a request."""
    kinds = block(mix)
    return sum(kind.work for kind in kinds) / len(kinds)


def arrivals(mix: Mix, rate: float, count: int, seed: int, rates: Rates | None = None) -> list[Arrival]:
    """`count` requests of a Poisson process of `rate` a second, given that so many came in count / rate seconds.

    Kinds come in shuffled blocks of the exact mix: drawn one by one, the few that are most of the work would make the
    load of a short window another one than it is called.
    """
    rng = random.Random(seed)
    times = sorted(rng.uniform(0, count / rate) for _ in range(count))
    if rates:
        times = [rates.when(at_s) for at_s in times]
    kinds: list[Kind] = []
    while len(kinds) < count:
        kinds += rng.sample(of_block := block(mix), len(of_block))
    return [
        Arrival(at_s, kind, rng.randrange(10), rng.randrange(2**31)) for at_s, kind in zip(times, kinds, strict=False)
    ]
