"""Which images make their next step together. Pure policy over integers: no torch, no threads, no clock.

A request is images, an image is a number of steps that each cost one network row (two with guidance); its work is the
row-steps it has left. Between flows (API keys) rows are shared evenly: the flow that was served least goes first.
Within a flow the request with the least work left goes first, and one row in PATIENCE goes to the oldest request of
all, so that none waits for ever. docs/decisions/004 has the reasons and the figures.
"""

from __future__ import annotations

import dataclasses
import heapq
import itertools
from collections.abc import Iterable, Iterator, Sequence

PATIENCE = 8

Image = tuple[str, int]
"""A request's id and an image's index in it."""


@dataclasses.dataclass
class _Request:
    id: str
    flow: str
    arrival: int
    cost: list[int]  # network rows of a step, image by image
    left: dict[int, int]  # steps left, by index, of the images that have any, in order
    work: int
    started: set[int] = dataclasses.field(default_factory=set)

    @property
    def rank(self) -> tuple[int, int]:
        return self.work, self.arrival

    def turns(self, rows: int) -> Iterator[int]:
        """Its images; of the first two batches those with most steps left first, so that the last steps are full too.

        Not of all: a large request has few images begun when another goes first.
        """
        left = iter(self.left)
        near = sorted(itertools.islice(left, 2 * rows), key=self.left.__getitem__, reverse=True)
        return itertools.chain(near, left)


@dataclasses.dataclass
class _Flow:
    served: int  # rows
    requests: dict[str, _Request] = dataclasses.field(default_factory=dict)

    def turns(self, rows: int) -> Iterator[tuple[_Request, int]]:
        """Its images, the request with the least work first."""
        ranks = [(request.rank, request.id) for request in self.requests.values()]
        heapq.heapify(ranks)  # sorted as far as somebody looks
        while ranks:
            request = self.requests[heapq.heappop(ranks)[1]]
            for index in request.turns(rows):
                yield request, index


class Scheduler:
    """Requests, their images, and whose turn it is."""

    def __init__(self) -> None:
        self._requests: dict[str, _Request] = {}  # the oldest first
        self._flows: dict[str, _Flow] = {}  # those that have requests
        self._arrivals = 0
        self._since_oldest = 0
        self.running = 0  # images that have made a step and have steps left
        self.waiting = 0  # images that have made none

    def add(self, request_id: str, flow: str, images: Sequence[tuple[int, int]]) -> None:
        """A request enters; images are (network rows of a step, steps), steps >= 1."""
        cost, left = [rows for rows, _ in images], {i: steps for i, (_, steps) in enumerate(images)}
        work = sum(rows * steps for rows, steps in images)
        request = _Request(request_id, flow, self._arrivals, cost, left, work)
        if flow not in self._flows:  # it has no claim on what it did not use
            self._flows[flow] = _Flow(min((other.served for other in self._flows.values()), default=0))
        self._requests[request_id] = self._flows[flow].requests[request_id] = request
        self._arrivals += 1
        self.waiting += len(images)

    @property
    def slots(self) -> int:
        """Images that have steps left."""
        return self.running + self.waiting

    def slots_of(self, flow: str) -> int:
        """Those of one flow."""
        return sum(len(request.left) for request in self._flows[flow].requests.values()) if flow in self._flows else 0

    @property
    def work(self) -> int:
        """Row-steps that are left."""
        return sum(request.work for request in self._requests.values())

    def remove(self, request_id: str) -> None:
        """A request leaves, whatever it has left."""
        request = self._requests.pop(request_id)
        running = sum(index in request.started for index in request.left)
        self.running -= running
        self.waiting -= len(request.left) - running
        del self._flows[request.flow].requests[request_id]
        if not self._flows[request.flow].requests:
            del self._flows[request.flow]

    def next(self, rows: int) -> list[Image]:
        """The images that make a step now: as many as fit into `rows` network rows, one at least where there is any."""
        turns = {name: flow.turns(rows) for name, flow in self._flows.items()}
        picked: dict[Image, None] = {}  # in order
        free = rows

        def take_one(images: Iterable[tuple[_Request, int]]) -> bool:
            """Takes the first that is free and fits."""
            nonlocal free
            for request, index in images:
                image, cost = (request.id, index), request.cost[index]
                if image not in picked and (cost <= free or not picked):
                    picked[image] = None
                    free -= cost
                    self._flows[request.flow].served += cost
                    self._since_oldest += cost
                    return True
            return False

        oldest_waits = False
        while free > 0 and turns:
            if self._since_oldest >= PATIENCE - 1 and not oldest_waits:
                oldest = next(iter(self._requests.values()))
                if take_one((oldest, index) for index in oldest.turns(rows)) or all(
                    (oldest.id, index) in picked for index in oldest.left
                ):
                    self._since_oldest = 0
                else:
                    oldest_waits = True  # its two rows do not fit into the one that is left: it begins the next step
                continue
            name = min(turns, key=lambda name: self._flows[name].served)
            if not take_one(turns[name]):
                del turns[name]
        return list(picked)

    def advance(self, image: Image) -> bool:
        """An image has made its step. Returns whether that was its last."""
        request_id, index = image
        request = self._requests[request_id]
        if index not in request.started:
            request.started.add(index)
            self.waiting -= 1
            self.running += 1
        request.left[index] -= 1
        request.work -= request.cost[index]
        if request.left[index]:
            return False
        del request.left[index]
        self.running -= 1
        return True

    def line(self) -> dict[str, tuple[int, int]]:
        """The requests by the work they have left: how many go before each, and the row-steps until it ends.

        One pass for all, so it looks away from flows and from the oldest's share.
        """
        ordered = sorted(self._requests.values(), key=lambda request: request.rank)
        sums = itertools.accumulate(request.work for request in ordered)
        return {
            request.id: (place, row_steps) for place, (request, row_steps) in enumerate(zip(ordered, sums, strict=True))
        }

    def left(self, request_id: str) -> tuple[int, int, int]:
        """Of a request: the row-steps until it ends, its longest image's steps, and the network rows of a step then."""
        request = self._requests[request_id]
        longest = max(request.left.values(), default=0)
        return self._ahead(request.flow, request.rank, request.work, 0), longest, self.rows

    def left_of_new(self, flow: str, images: Sequence[tuple[int, int]]) -> tuple[int, int, int]:
        """The same of a request that would enter now."""
        work = sum(rows * steps for rows, steps in images)
        longest = max(steps for _, steps in images)
        return self._ahead(flow, (work, self._arrivals), work, work), longest, self.rows + sum(r for r, _ in images)

    def ahead_of_new(self, flow: str, images: Sequence[tuple[int, int]]) -> int:
        """Row-steps until a request that would enter now makes its first."""
        work = sum(rows * steps for rows, steps in images)
        return self._ahead(flow, (work, self._arrivals), 0, 0)

    def _ahead(self, flow: str, rank: tuple[int, int], work: int, new: int) -> int:
        """Row-steps until a request of this flow, rank and work ends: its own, and what goes before it or beside it.

        `new` of them are of a request that is not in yet.
        """
        everything = new + self.work
        mine = self._flows[flow].requests.values() if flow in self._flows else ()
        own = work + sum(request.work for request in mine if request.rank < rank)
        others = (sum(r.work for r in other.requests.values()) for name, other in self._flows.items() if name != flow)
        shared = own + sum(min(own, theirs) for theirs in others)
        return min(everything, -(-shared * PATIENCE // (PATIENCE - 1)))

    @property
    def rows(self) -> int:
        """Network rows that a step of all images would have."""
        return sum(request.cost[index] for request in self._requests.values() for index in request.left)

    def work_until_free(self, slots: int, flow: str | None = None) -> int:
        """Row-steps until so many images (of one flow) have ended, by the order of the work they have left."""
        work = 0
        of = self._requests if flow is None else self._flows[flow].requests
        for request in sorted(of.values(), key=lambda request: request.rank):
            images = len(request.left)
            if images >= slots:
                return work + -(-request.work * slots // images)
            work += request.work
            slots -= images
        return work
