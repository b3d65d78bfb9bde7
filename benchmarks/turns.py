"""Contenders that take turns, so that what else happens on a shared machine happens to all of them."""

from __future__ import annotations

import dataclasses
import statistics
import time
from collections.abc import Callable, Iterable, Iterator, Sequence

Rounds = Sequence[Sequence[float]]
"""Seconds of one side's calls, round by round."""


@dataclasses.dataclass(frozen=True)
class Side:
    """What is timed, and what goes before it in every turn."""

    call: Callable[[], object]
    before: Callable[[], object]  # with a call of its own: no side may meet the spinning threads of another


def in_turns(sides: Sequence[Side], rounds: Iterable[int], timed: int) -> list[Rounds]:
    """Each side's seconds; in every round each has one turn of so many timed calls, in an order that turns around."""
    took: list[list[list[float]]] = [[] for _ in sides]
    for turn in rounds:
        for k in range(len(sides))[:: -1 if turn % 2 else 1]:
            sides[k].before()
            took[k].append([seconds_of(sides[k].call) for _ in range(timed)])
    return list(took)


def rounds_within(seconds: float, fewest: int, most: int) -> Iterator[int]:
    """Numbers of rounds, as many as begin in that time, within bounds."""
    until = time.perf_counter() + seconds
    for turn in range(most):
        if turn >= fewest and time.perf_counter() > until:
            return
        yield turn


def seconds_of(call: Callable[[], object]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@dataclasses.dataclass(frozen=True)
class Spread:
    """The median of rounds, and the least and most of them."""

    median: float
    least: float
    most: float

    @classmethod
    def of(cls, values: Iterable[float]) -> Spread:
        ordered = sorted(values)
        return cls(statistics.median(ordered), ordered[0], ordered[-1])

    def times(self, factor: float) -> Spread:
        return Spread(self.median * factor, self.least * factor, self.most * factor)

    def json(self, digits: int) -> dict[str, float]:
        return {name: round(value, digits) for name, value in dataclasses.asdict(self).items()}

    def __str__(self) -> str:
        median, least, most = (
            f"{value:.0f}" if abs(value) >= 100 else f"{value:.3g}" for value in dataclasses.astuple(self)
        )
        return f"{median} ({least} .. {most})"


def medians(rounds: Rounds) -> list[float]:
    """Of each round's calls."""
    return [statistics.median(calls) for calls in rounds]


def ratio(a: Rounds, b: Rounds) -> Spread:
    """a / b, each within its round: what slowed a round down slowed both."""
    return Spread.of(x / y for x, y in zip(medians(a), medians(b), strict=True))
