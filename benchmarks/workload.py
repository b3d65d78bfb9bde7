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


Mix = Sequence[tuple[Kind, int]]
"""Kinds, and how many of each there are in a block."""


def block(mix: Mix) -> list[Kind]:
    """One of the smallest sets of requests with exactly this mix."""
    return [kind for kind, count in mix for _ in range(count)]


def mean_work(mix: Mix) -> float:
    """Row-steps of a request."""
    kinds = block(mix)
    return sum(kind.work for kind in kinds) / len(kinds)


def arrivals(mix: Mix, rate: float, count: int, seed: int) -> list[Arrival]:
    """`count` requests of a Poisson process of `rate` a second, given that so many came in count / rate seconds.

    Kinds come in shuffled blocks of the exact mix: drawn one by one, the few that are most of the work would make the
    load of a short window another one than it is called.
    """
    rng = random.Random(seed)
    times = sorted(rng.uniform(0, count / rate) for _ in range(count))
    kinds: list[Kind] = []
    while len(kinds) < count:
        kinds += rng.sample(of_block := block(mix), len(of_block))
    return [
        Arrival(at_s, kind, rng.randrange(10), rng.randrange(2**31)) for at_s, kind in zip(times, kinds, strict=False)
    ]
