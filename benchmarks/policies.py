"""Other policies than the shipped one, on its own bookkeeping: what benchmarks compare it with. They know no flows."""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Iterable, Iterator

from app.engine.scheduler import PATIENCE, Image, Scheduler, _Request
from app.engine.steptime import StepTime


def fill(rows: int, images: Iterable[tuple[_Request, int]]) -> list[Image]:
    """The images in this order, as many as fit, one at least."""
    picked: list[Image] = []
    for request, index in images:
        if request.cost[index] <= rows or not picked:
            picked.append((request.id, index))
            rows -= request.cost[index]
        if rows <= 0:
            break
    return picked


def images_of(requests: Iterable[_Request]) -> Iterator[tuple[_Request, int]]:
    """One request after the other, image by image."""
    return ((request, index) for request in requests for index in request.left)


class FirstComeFirstServed(Scheduler):
    """Rows go to the oldest request, what it leaves to the next."""

    def next(self, rows: int) -> list[Image]:
        return fill(rows, images_of(self._requests.values()))


class ShortestFirst(Scheduler):
    """Rows go to the request with the least work left: the shipped policy without its patience."""

    def next(self, rows: int) -> list[Image]:
        return fill(rows, images_of(heapq.nsmallest(rows, self._requests.values(), key=lambda request: request.rank)))


class RoundRobin(Scheduler):
    """Every request in turn gets one row; a step begins with the request after the last one served."""

    def __init__(self) -> None:
        super().__init__()
        self._last = -1  # arrival of the request that was served last

    def next(self, rows: int) -> list[Image]:
        picked = fill(rows, self._turns())
        if picked:
            self._last = self._requests[picked[-1][0]].arrival
        return picked

    def _turns(self) -> Iterator[tuple[_Request, int]]:
        requests = sorted(self._requests.values(), key=lambda request: (request.arrival <= self._last, request.arrival))
        turns = deque((request, iter(request.left)) for request in requests)
        while turns:
            request, left = turns.popleft()
            if (index := next(left, None)) is not None:
                yield request, index
                turns.append((request, left))


class WholeRequests(Scheduler):
    """Admits only when empty: the oldest that fit are taken when nothing is in flight, and run to their end alone."""

    def __init__(self) -> None:
        super().__init__()
        self._taken: list[_Request] = []

    def next(self, rows: int) -> list[Image]:
        self._taken = [request for request in self._taken if self._requests.get(request.id) is request and request.left]
        if not self._taken:
            free = rows
            for request in self._requests.values():
                free -= sum(request.cost)
                if free < 0 and self._taken:
                    break
                self._taken.append(request)
        return fill(rows, images_of(self._taken))


class WhereItPays(Scheduler):
    """The least work first, but a step is filled only as far as that pays by what a row costs.

    A row more delays the requests that are in the step already, and spares those behind what it would cost later.
    """

    PRESSURE = 4  # how much more the time of those behind counts: others will come

    def __init__(self, step_time: StepTime) -> None:
        super().__init__()
        self._step_time = step_time
        self._steps = 0

    def next(self, rows: int) -> list[Image]:
        self._steps += 1
        later_s = self._step_time.seconds(rows) / rows  # of a row in a full step
        requests = sorted(self._requests.values(), key=lambda request: request.rank)
        picked: list[Image] = []
        for place, (request, index) in self._placed(requests):
            used = len(picked)
            added_s = self._step_time.seconds(used + 1) - (self._step_time.seconds(used) if used else 0.0)
            saved_s = (len(requests) - place) * (later_s - added_s)
            if used == rows or (place and place * added_s > self.PRESSURE * saved_s):
                break
            picked.append((request.id, index))
        if self._steps % PATIENCE == 0 and requests:  # as in the shipped policy the oldest has its share
            oldest = next(iter(self._requests.values()))
            others = [(oldest.id, index) for index in oldest.left if (oldest.id, index) not in picked]
            picked = [*picked[: rows - 1], *others[:1]] if others else picked
        return picked

    def _placed(self, requests: list[_Request]) -> Iterator[tuple[int, tuple[_Request, int]]]:
        """Images with the number of requests that stand before theirs."""
        return ((place, image) for place, request in enumerate(requests) for image in images_of([request]))
