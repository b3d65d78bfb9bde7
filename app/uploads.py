"""What uploaded images may take of the process at once: the bytes of their forms, places, pixels, threads."""

from __future__ import annotations

import asyncio
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

    def __init__(self, limit: int, what: str, metrics: Metrics) -> None:
        self.limit, self.what, self._metrics = limit, what, metrics
        self.taken = 0
        self._lock = threading.Lock()

    def share(self, held: ExitStack) -> Callable[[int], None]:
        """What takes parts, of which all are given back when `held` is closed.

        It raises UploadsFull where a part is not there now.
        """
        mine = 0

        def take(amount: int) -> None:
            nonlocal mine
            with self._lock:
                if self.taken + amount > self.limit:
                    self._metrics.refused.labels("uploads_full").inc()
                    raise errors.UploadsFull(
                        f"other uploads hold {self.taken - mine:,} of {self.limit:,} {self.what}: try again later",
                        headers={"Retry-After": "1"},
                    )
                self.taken += amount
                mine += amount

        def give_back() -> None:
            with self._lock:
                self.taken -= mine

        held.callback(give_back)
        return take


class Uploads:
    """The bounds of one process. Its threads are its own: encoding of drawn images never waits for uploads."""

    def __init__(self, settings: Settings, metrics: Metrics) -> None:
        self.bytes = Budget(settings.upload_bytes, "bytes of forms", metrics)
        self.slots = Budget(settings.upload_slots, "places for images", metrics)
        self.pixels = Budget(settings.upload_pixels, "pixels", metrics)
        self.threads = ThreadPoolExecutor(max(2, os.cpu_count() or 1), "upload")

    async def work(self, held: ExitStack, work: Callable[[], T]) -> T:
        """Runs what is slow about an upload in a thread. Raises UploadsFull.

        Cancelled while it waits, it is dropped; while it is worked on, it ends first: until then it holds what it took.
        """
        self.slots.share(held)(1)
        future = self.threads.submit(work)
        try:
            return await asyncio.wrap_future(future)
        except asyncio.CancelledError:
            if not future.cancel():
                await asyncio.gather(asyncio.wrap_future(future), return_exceptions=True)
            raise
