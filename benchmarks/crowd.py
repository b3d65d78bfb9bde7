"""Clients that compare what they get with what it must be, byte for byte, and some that leave before."""

from __future__ import annotations

import asyncio
import collections
import dataclasses
import json
import random
import re
import time
from collections.abc import Mapping, Sequence

from benchmarks import wire
from benchmarks.catalogue import EVENTS, Request

SEED = 20_261_126
CLIENTS, BURST = 8, 300  # of the closed loop, which fill no queue; of requests at once
LEAVERS, ENDED = 0.1, 0.05  # shares of requests whose client leaves, or that somebody ends by DELETE
ANSWER_S = 60.0  # a client that waits longer is lost
FULL = {"queue-full", "uploads-full", "deadline-too-soon"}
TELLING = ("content-type", "etag", "cache-control", "x-seed", "x-model", "x-alpha-bar", "allow")  # headers

Essence = tuple[object, ...]
"""What of an answer must be the same whenever it is asked for."""


def essence(reply: wire.Reply) -> Essence:
    headers = tuple(reply.headers.get(name) for name in TELLING)
    if "problem+json" in reply.headers.get("content-type", ""):
        return reply.status, json.loads(reply.body)["type"].rpartition(":")[2]
    if reply.headers.get("content-type", "").startswith(EVENTS):
        return reply.status, headers, *_of_events(reply.body)
    return reply.status, headers, _undated(reply.body)


def _undated(body: bytes) -> bytes:
    return re.sub(rb'"created":\d+', b'"created":0', body)


def _of_events(body: bytes) -> tuple[str, bytes | str, Mapping[int, list[str]]]:
    """How a stream ended, with what, and the previews of every image in their order."""
    previews: dict[int, list[str]] = {}
    for event in body.decode().split("\n\n"):
        name, _, data = event.removeprefix("event: ").partition("\ndata: ")
        if name == "progress":
            for shown in json.loads(data)["previews"]:
                previews.setdefault(shown["index"], []).append(shown["b64_json"])
        elif name == "completed":
            return name, _undated(data.encode()), previews
        elif name == "error":
            return name, json.loads(data)["type"].rpartition(":")[2], {}
    return "cut off", "", {}


@dataclasses.dataclass(frozen=True)
class Reference:
    """The answer to a request that was alone."""

    essence: Essence
    took_s: float


References = Mapping[Request, Reference]


async def references_of(url: str, requests: Sequence[Request]) -> References:
    found = {}
    async with wire.pool(url) as pool:
        for request in requests:
            began = time.monotonic()
            found[request] = Reference(essence(await pool.ask(request.data("alone"))), time.monotonic() - began)
    return found


class Crowd:
    """Clients of one server, and what they saw."""

    def __init__(self, pool: wire.Pool, references: References) -> None:
        self.pool, self.references = pool, references
        self.requests = list(references)
        self.rng = random.Random(SEED)
        self.counts: collections.Counter[str] = collections.Counter()
        self.wrong: list[str] = []
        self.lost: list[str] = []
        self.accepted = 0  # by the engine, as the clients know
        self.perhaps = 0  # more than those
        self.in_flight: collections.Counter[Request] = collections.Counter()

    def any(self) -> Request:
        return self.rng.choice(self.requests)

    async def client(self, request: Request) -> None:
        """One client, until it has its answer or has left."""
        self.counts["asked"] += 1
        request_id = f"soak-{self.counts['asked']}"
        company = request.shared and self.in_flight[request] > 0
        self.in_flight[request] += 1
        try:
            async with asyncio.timeout(ANSWER_S):
                if (chance := self.rng.random()) < LEAVERS:
                    await self._leave(request, request_id, company)
                elif chance < LEAVERS + ENDED and request.draws and not request.shared:
                    await self._end(request, request_id)
                else:
                    self.judge(request, request_id, await self.pool.ask(request.data(request_id)), company=company)
        except (OSError, EOFError) as error:
            self.lost.append(f"{request_id} {request.what}: {error!r}")
        finally:
            self.in_flight[request] -= 1

    async def _leave(self, request: Request, request_id: str, company: bool) -> None:
        connection = await wire.Connection.open(self.pool.url)
        data, took_s = request.data(request_id), self.references[request].took_s
        how = self.rng.choice(("sending", "waiting", "reading"))
        try:
            if how == "sending":
                connection.writer.write(data[: self.rng.randrange(len(data))])
                await asyncio.sleep(self.rng.uniform(0, 0.1))
            else:
                connection.writer.write(data)
                status = (await connection.head())[0] if how == "reading" else None
                await asyncio.sleep(self.rng.uniform(0, 2 * took_s))
                if request.draws:
                    self.accepted += status == 200 and not company
                    self.perhaps += status is None or (status == 200 and company)
        finally:
            connection.leave()
        self.counts["left"] += 1
        self.counts[f"left while {how}"] += 1

    async def _end(self, request: Request, request_id: str) -> None:
        """Somebody asks, and somebody else ends that by its id."""

        async def delete() -> int:
            await asyncio.sleep(self.rng.uniform(0, 2 * self.references[request].took_s))
            return (await self.pool.ask(wire.request("DELETE", f"/requests/{request_id}"))).status

        reply, status = await asyncio.gather(self.pool.ask(request.data(request_id)), delete())
        if status not in (204, 404):
            self.wrong.append(f"{request_id} {request.what}: DELETE got {status}")
        self.judge(request, request_id, reply, ended=status == 204)

    def judge(
        self, request: Request, request_id: str, reply: wire.Reply, *, company: bool = False, ended: bool = False
    ) -> None:
        found, wanted = essence(reply), self.references[request].essence
        if request.draws and reply.status in (200, 410, 504):
            self.accepted += not company
            self.perhaps += company
        if ended:
            outcome = "ended" if "cancelled" in found else "wrong"
        elif found == wanted or (request.changes and reply.status == wanted[0]):
            outcome = "right"
        elif request.may_be_refused and reply.status == 429 and found[1] in FULL and "retry-after" in reply.headers:
            outcome = "refused"
        elif b"deadline_ms" in request.body and "deadline-passed" in found:
            outcome = "too late"
        else:
            outcome = "wrong"
        if reply.headers.get("x-request-id") != request_id:
            outcome = "wrong"
        if outcome == "wrong":
            self.wrong.append(f"{request_id} {request.what}: {str(found)[:200]} for {str(wanted)[:200]}")
        self.counts[outcome] += 1

    async def closed_loop(self, seconds: float) -> float:
        """Requests a second that CLIENTS who each ask again when answered get done."""
        until, before = time.monotonic() + seconds, self.counts["asked"] - self.counts["refused"]

        async def ask_on() -> None:
            while time.monotonic() < until:
                await self.client(self.any())

        await asyncio.gather(*(ask_on() for _ in range(CLIENTS)))
        return (self.counts["asked"] - self.counts["refused"] - before) / seconds

    async def open_loop(self, rate: float, seconds: float, burst_every_s: float) -> None:
        """Requests at random times, and bursts, until all of their clients have been served or have left."""
        start = time.monotonic()
        due_s, burst_s = self.rng.expovariate(rate), burst_every_s / 2
        async with asyncio.TaskGroup() as clients:
            while (next_s := min(due_s, burst_s)) < seconds:
                await asyncio.sleep(start + next_s - time.monotonic())
                for _ in range(1 if next_s == due_s else BURST):
                    clients.create_task(self.client(self.any()))
                if next_s == due_s:
                    due_s += self.rng.expovariate(rate)
                else:
                    burst_s += burst_every_s
