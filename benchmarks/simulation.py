"""Replicas of the service in simulated time: discrete events around the real scheduler and the real admission.

A replica is an app.engine.scheduler.Scheduler, which knows no clock, and a machine whose steps take what its curve
says. What came during a step can be chosen for the next, as in the engine. No threads, no network, no failures: what
differs between two runs is what was changed between them.
"""

from __future__ import annotations

import dataclasses
import functools
import heapq
import itertools
import math
import random
from collections.abc import Callable, Sequence

from app.engine.admission import Bounds, admit
from app.engine.request import EngineError, GenerateParams
from app.engine.scheduler import Image, Scheduler
from benchmarks.step_curve import Machine
from benchmarks.workload import Arrival, Kind

BOUNDS = Bounds(slots=1024)  # DDPM_QUEUE_SLOTS's default


@functools.cache
def params_of(kind: Kind) -> GenerateParams:
    """What the engine is asked for; ids are the simulation's own."""
    return GenerateParams("", (0,) * kind.n, (None,) * kind.n, "ddim", kind.steps, 0.0, 1.0)


class Replica:
    """One engine: requests, and the step that is under way."""

    def __init__(self, machine: Machine, bounds: Bounds = BOUNDS, scheduler: Scheduler | None = None) -> None:
        self.machine, self.bounds = machine, bounds
        self.scheduler = scheduler or Scheduler()
        self.images: dict[int, int] = {}  # left to draw, by request
        self.step: list[Image] = []
        self.steps = self.row_steps = 0

    def expect(self, kind: Kind) -> float:
        """The seconds until a request ends that is submitted now. Raises EngineError where it is refused."""
        machine = self.machine
        return admit(params_of(kind), self.scheduler, machine.step_time, machine.rows_limit, self.bounds)

    def submit(self, request: int, kind: Kind) -> None:
        self.scheduler.add(str(request), "", params_of(kind).images)
        self.images[request] = kind.n

    def begin(self) -> float | None:
        """Chooses the next step. Returns its seconds; None: there is nothing to do."""
        if not self.images:
            return None
        self.step = self.scheduler.next(self.machine.rows_limit)
        self.steps += 1
        self.row_steps += len(self.step)
        return self.machine.seconds(len(self.step))

    def end(self) -> list[int]:
        """The step is made. Returns the requests that ended with it."""
        ended = []
        for image in self.step:
            if self.scheduler.advance(image):
                request = int(image[0])
                self.images[request] -= 1
                if not self.images[request]:
                    del self.images[request]
                    self.scheduler.remove(image[0])
                    ended.append(request)
        self.step = []
        return ended


Route = Callable[[Sequence[Replica], Kind], Replica]
"""Chooses a replica for a request. Raises EngineError where it knows that none accepts it."""


def at_first(replicas: Sequence[Replica], kind: Kind) -> Replica:
    """Where there is one."""
    return replicas[0]


def least_expected_end(replicas: Sequence[Replica], kind: Kind) -> Replica:
    """What app.engine.replicas does for the devices of one process: it asks every engine."""
    expected: list[tuple[float, int]] = []
    refusals: list[EngineError] = []
    for place, replica in enumerate(replicas):
        try:
            expected.append((replica.expect(kind), place))
        except EngineError as error:
            refusals.append(error)
    if not expected:
        raise min(refusals, key=lambda error: error.wait_s)
    return replicas[min(expected)[1]]


def fewest_of_two(seed: int) -> Route:
    """What Envoy and Ray Serve do by themselves: of two at random, the one with fewer requests."""
    rng = random.Random(seed)

    def route(replicas: Sequence[Replica], kind: Kind) -> Replica:
        two = rng.sample(replicas, 2) if len(replicas) > 1 else replicas
        return min(two, key=lambda replica: len(replica.images))

    return route


def fewest_images(replicas: Sequence[Replica], kind: Kind) -> Replica:
    """What deploy/ray does, whose ingress knows all replicas."""
    return min(replicas, key=lambda replica: replica.scheduler.slots)


def at_random(seed: int) -> Route:
    """What a Kubernetes Service does with every new connection."""
    rng = random.Random(seed)
    return lambda replicas, kind: rng.choice(replicas)


def round_robin() -> Route:
    """What a gateway does that knows nothing of its servers."""
    turn = itertools.count()
    return lambda replicas, kind: replicas[next(turn) % len(replicas)]


@dataclasses.dataclass(frozen=True, slots=True)
class Outcome:
    """What became of a request."""

    arrival: Arrival
    wait_s: float | None  # until its answer; None: it was refused


class Simulation:
    """Replicas behind a route. `replicas` may change meanwhile: one that is taken out ends what it has."""

    def __init__(self, replicas: Sequence[Replica], route: Route) -> None:
        self.replicas, self._route = list(replicas), route
        self.now = 0.0
        self._events: list[tuple[float, int, Callable[[], None]]] = []
        self._order = itertools.count()
        self._requests: Sequence[Arrival] = ()
        self._waits: list[float | None] = []
        self._over = False  # nobody comes any more

    def at(self, when: float, do: Callable[[], None]) -> None:
        """Lets something happen at a time; of the same time what was asked for first."""
        heapq.heappush(self._events, (when, next(self._order), do))

    def every(self, seconds: float, do: Callable[[], None]) -> None:
        """Lets something happen again and again as long as requests come."""

        def again() -> None:
            if not self._over:
                do()
                self.every(seconds, do)

        self.at(self.now + seconds, again)

    def run(self, requests: Sequence[Arrival]) -> list[Outcome]:
        """Serves the requests, which are in the order of their times; what became of each."""
        self._requests, self._waits = requests, [None] * len(requests)
        for place, request in enumerate(requests):
            self._until(request.at_s)
            self.now = request.at_s
            self._arrive(place, request.kind)
        self._over = True
        self._until(math.inf)
        return [Outcome(request, wait_s) for request, wait_s in zip(requests, self._waits, strict=True)]

    def _until(self, when: float) -> None:
        """What happens before; at the same time those who come are first, as they are for the engine's next step."""
        while self._events and self._events[0][0] < when:
            self.now, _, do = heapq.heappop(self._events)
            do()

    def _arrive(self, place: int, kind: Kind) -> None:
        try:
            replica = self._route(self.replicas, kind)
            replica.expect(kind)
        except EngineError:
            return
        replica.submit(place, kind)
        if not replica.step:
            self._begin(replica)

    def _begin(self, replica: Replica) -> None:
        if (seconds := replica.begin()) is not None:
            self.at(self.now + seconds, functools.partial(self._end, replica))

    def _end(self, replica: Replica) -> None:
        for place in replica.end():
            self._waits[place] = self.now - self._requests[place].at_s + replica.machine.outside_s
        self._begin(replica)
