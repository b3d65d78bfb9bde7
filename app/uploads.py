"""What uploaded images may take of the process at once: the bytes of their forms, places, pixels, threads."""

from __future__ import annotations

import asyncio
import collections
import os
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import TypeVar

from app import errors
from app.metrics import Metrics
from app.settings import Settings

T = TypeVar("T")


class Budget:
    """An amount of which requests take parts, on any thread."""

    def __init__(self, limit: int, of_flow: int, what: str, metrics: Metrics, full: type[errors.Full]) -> None:
        self.limit, self.of_flow, self.what, self._metrics, self._full = limit, of_flow, what, metrics, full
        self.taken = 0
        self._flows = collections.Counter[str]()
        self._lock = threading.Lock()

    def share(self, held: ExitStack, flow: str) -> Callable[[int], None]:
        """What takes parts for a flow (API key), of which all are given back when `held` is closed.

        It raises `full` where a part is not there now.
        """
        mine = 0

        def take(amount: int) -> None:
            nonlocal mine
            with self._lock:
                of_flow = (self._flows[flow], self.of_flow, " of this API key")
                for taken, limit, whose in ((self.taken, self.limit, ""), of_flow):
                    if taken + amount > limit:
                        self._metrics.refused.labels(self._full.reason).inc()
                        raise self._full(
                            f"other requests{whose} hold {taken - mine:,} of {limit:,} {self.what}: try again later",
                            headers={"Retry-After": "1"},
                        )
                self.taken += amount
                self._flows[flow] += amount
                mine += amount

        def give_back() -> None:
            with self._lock:
                self.taken -= mine
                self._flows[flow] -= mine
                if not self._flows[flow]:
                    del self._flows[flow]

        held.callback(give_back)
        return take


def _budget(settings: Settings, metrics: Metrics, limit: int, least: int, what: str, full: type[errors.Full]) -> Budget:
    """One of which no API key takes all."""
    of_flow = max(limit // 2, least) if len(settings.keys) > 1 else limit
    return Budget(limit, of_flow, what, metrics, full)


def frames(settings: Settings, metrics: Metrics) -> Budget:
    """Of the moments of chains that are kept for answers."""
    most, of_key = settings.frame_bytes, settings.frame_bytes_of_key
    return Budget(most, of_key, "bytes of frames", metrics, errors.FramesFull)


class Uploads:
    """The bounds of one process. Its threads are its own: encoding of drawn images never waits for uploads."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:

        def budget(limit: int, least: int, what: str) -> Budget:
            return _budget(settings, metrics, limit, least, what, errors.UploadsFull)

        self.bytes = budget(settings.upload_bytes, settings.max_body_bytes, "bytes of forms")
        self.slots = budget(settings.upload_slots, 1, "places for images")
        self.pixels = budget(settings.upload_pixels, settings.max_image_pixels, "pixels")
        self.threads = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "upload")

    async def work(self, held: ExitStack, flow: str, work: Callable[[], T]) -> T:
        """Runs what is slow about an upload in a thread. Raises UploadsFull.

        Cancelled while it waits, it is dropped; while it is worked on, it ends first: until then it holds what it took.
        """
        self.slots.share(held, flow)(1)
        future = self.threads.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)
            raise
