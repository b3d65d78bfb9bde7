"""Load over HTTP: requests sent when they are due, whatever became of those before them."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import re
from collections.abc import AsyncIterator, Sequence

import numpy as np

from benchmarks import wire
from benchmarks.workload import Arrival, Kind

QUIET_TIMEOUT_S = 60.0  # of a request to a server that has little to do


@dataclasses.dataclass(frozen=True)
class Answer:
    """What became of a request."""

    kind: Kind
    outcome: str  # 200, another status, timeout, or the name of the client's error
    latency_s: float  # since it was due, not since it was sent
    late_s: float  # how long after it was due the client sent it
    ended_s: float  # since the window began
    queue_s: float | None  # to its first step, where the server says so
    drawn_s: float | None = None  # to its last, by the server's clock


@dataclasses.dataclass
class Client:
    """Answers of one server, of requests that may take `timeout_s`."""

    pool: wire.Pool
    timeout_s: float
    start: float  # of the window, by the event loop's clock

    @property
    def now(self) -> float:
        """Seconds since the window began."""
        return asyncio.get_running_loop().time() - self.start

    async def ask(self, arrival: Arrival) -> Answer:
        """Waits until the request is due, and for its answer."""
        kind = arrival.kind
        body = {"n": kind.n, "steps": kind.steps, "label": arrival.label, "seed": arrival.seed, "sampler": "ddim"}
        data = wire.request("POST", "/generate", {"Content-Type": "application/json"}, json.dumps(body).encode())
        await asyncio.sleep(arrival.at_s - self.now)
        late_s, queue_s, drawn_s = self.now - arrival.at_s, None, None
        try:
            async with asyncio.timeout_at(self.start + arrival.at_s + self.timeout_s):
                reply = await self.pool.ask(data)
            outcome = str(reply.status)
            if outcome == "200" and not reply.body.startswith(b"\x89PNG"):
                outcome = "no PNG"
            if found := re.search(
                r"queue;dur=([0-9.]+), denoise;dur=([0-9.]+)", reply.headers.get("server-timing", "")
            ):
                queue_s = float(found[1]) / 1000
                drawn_s = queue_s + float(found[2]) / 1000
        except TimeoutError:
            outcome = "timeout"
        except (OSError, EOFError) as error:
            outcome = type(error).__name__
        now = self.now
        return Answer(kind, outcome, now - arrival.at_s, late_s, now, queue_s, drawn_s)

    async def ask_now(self, kind: Kind) -> Answer:
        """The same without waiting; the request always has the same label and seed."""
        return await self.ask(Arrival(self.now, kind, label=0, seed=0))

    async def keep_asking(self, kind: Kind, answers: list[Answer]) -> None:
        """One request after the other, until cancelled."""
        while True:
            answers.append(await self.ask_now(kind))
            if answers[-1].outcome != "200":
                await asyncio.sleep(0.1)  # a refusal is answered at once: asking at once again would be an attack


@contextlib.asynccontextmanager
async def client_of(url: str, timeout_s: float) -> AsyncIterator[Client]:
    """A client without a limit of connections: a limit would make arrivals wait for answers."""
    async with wire.pool(url) as pool:
        yield Client(pool, timeout_s, asyncio.get_running_loop().time())


async def warm_up(url: str, kinds: Sequence[Kind]) -> None:
    """A request of each kind, one by one, then all at once. Raises RuntimeError where one fails."""
    async with client_of(url, QUIET_TIMEOUT_S) as client:
        answers = [await client.ask_now(kind) for kind in kinds]
        _check([*answers, *await asyncio.gather(*(client.ask_now(kind) for kind in kinds))])


async def closed_loop(url: str, kinds: Sequence[Kind], clients: int) -> float:
    """Requests a second that so many clients get who each ask again when answered. Raises RuntimeError as above."""
    async with client_of(url, QUIET_TIMEOUT_S) as client:
        left, answers = iter(kinds), list[Answer]()

        async def ask_on() -> None:
            for kind in left:
                answers.append(await client.ask_now(kind))

        await asyncio.gather(*(ask_on() for _ in range(clients)))
        _check(answers)
        return len(kinds) / client.now


def _check(answers: Sequence[Answer]) -> None:
    if bad := [answer.outcome for answer in answers if answer.outcome != "200"]:
        raise RuntimeError(f"a server without load failed: {bad}")


async def open_loop(
    url: str, requests: Sequence[Arrival], timeout_s: float, background: Kind | None
) -> tuple[list[Answer], list[Answer]]:
    """The answers to the requests, and those of a background of which one is always in flight."""
    async with client_of(url, timeout_s) as client:
        behind: list[Answer] = []
        task = asyncio.create_task(client.keep_asking(background, behind)) if background else None
        answers = await asyncio.gather(*(client.ask(request) for request in requests))
        if task:
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await task
    return answers, behind


def percentiles(values: Sequence[float]) -> dict[str, float | None]:
    """p50, p95 and p99; None where there is nothing."""
    if not values:
        return {"p50": None, "p95": None, "p99": None}
    return {f"p{q}": round(float(np.percentile(values, q)), 4) for q in (50, 95, 99)}


def summary(
    answers: Sequence[Answer], behind: Sequence[Answer], seconds: float, deadline_s: float
) -> dict[str, object]:
    """The figures of one window. A request that timed out counts in the latencies, with the time that it waited."""
    good = [a for a in answers if a.outcome == "200"]
    waited = [a for a in answers if a.outcome in ("200", "timeout")]
    in_time = sum(a.latency_s <= deadline_s for a in good)
    drawn = good + [a for a in behind if a.outcome == "200"]
    until_s = max([seconds, *(a.ended_s for a in good)])
    outcomes = [a.outcome for a in answers]
    return {
        "offered_rps": round(len(answers) / seconds, 3),
        "completed_rps": round(len(good) / until_s, 3),
        "images_per_s": round(sum(a.kind.n for a in drawn) / max([until_s, *(a.ended_s for a in drawn)]), 2),
        "goodput_rps": round(in_time / seconds, 3),
        "in_time": round(in_time / len(answers), 4),
        "latency_s": percentiles([a.latency_s for a in waited]),
        "latency_n1_s": percentiles([a.latency_s for a in waited if a.kind.n == 1]),
        "first_step_s": percentiles([a.queue_s for a in good if a.queue_s is not None]),
        "requests": len(answers),
        "refused_429": outcomes.count("429"),
        "timeouts": outcomes.count("timeout"),
        "other": {name: outcomes.count(name) for name in sorted({*outcomes} - {"200", "429", "timeout"})},
        "background": {"answered": len(drawn) - len(good), "latency_s": percentiles([a.latency_s for a in behind])},
        "client_late_s": percentiles([a.late_s for a in answers]),
    }
