"""The worker thread: loads the model, then serves whole requests one after another.

The thread blocks on its inbox and never polls. Nothing but this thread touches the network.
"""

from __future__ import annotations

import logging
import math
import queue
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from typing import Literal

from app.engine.request import (
    DuplicateRequest,
    EngineBusy,
    EngineError,
    EngineNotReady,
    GenerateParams,
    ModelInfo,
    Result,
)  # fmt: skip
from app.engine.runner import Runner

log = logging.getLogger("app.engine")

Status = Literal["starting", "ok", "draining", "failed"]


class Engine:
    """A queue of requests in front of one model on one device."""

    def __init__(self, make_runner: Callable[[], Runner], *, queue_slots: int) -> None:
        self._make_runner, self.queue_slots = make_runner, queue_slots
        self._inbox: queue.SimpleQueue[tuple[GenerateParams, Future[Result], float] | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._in_flight: dict[str, GenerateParams] = {}
        self._slot_s = 0.0  # seconds an image took lately
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self.status: Status = "starting"
        self.failure: BaseException | None = None
        self.info: ModelInfo | None = None
        self.on_failure: Callable[[BaseException], None] = lambda error: None

    def start(self) -> None:
        """Starts loading; status turns from starting to ok, or to failed."""
        self._thread.start()

    def submit(self, params: GenerateParams) -> Future[Result]:
        """Queues a request. Thread-safe.

        Raises:
            EngineNotReady, EngineBusy, DuplicateRequest: nothing was queued.
        """
        with self._lock:
            if self.status != "ok":
                raise EngineNotReady(self.status)
            if params.request_id in self._in_flight:
                raise DuplicateRequest(params.request_id)
            slots = sum(p.slots for p in self._in_flight.values())
            if slots + params.slots > self.queue_slots:
                raise EngineBusy(slots, self.queue_slots, max(1, math.ceil(slots * self._slot_s)))
            future: Future[Result] = Future()
            self._in_flight[params.request_id] = params
            self._inbox.put((params, future, time.monotonic()))
        return future

    def slots(self) -> int:
        """Images waiting or running."""
        with self._lock:
            return sum(p.slots for p in self._in_flight.values())

    def drain(self) -> None:
        """Refuses new requests from now on; accepted ones are served."""
        with self._lock:
            if self.status in ("starting", "ok"):
                self.status = "draining"

    def stop(self, timeout_s: float) -> bool:
        """Drains, waits for the thread to end. Returns whether it did in time."""
        self.drain()
        self._inbox.put(None)
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        try:
            runner = self._make_runner()
            runner.warm_up()
            with self._lock:
                self.info = runner.info
                if self.status == "starting":
                    self.status = "ok"
            while (item := self._inbox.get()) is not None:
                self._serve(runner, *item)
        except BaseException as error:
            self._fail(error)

    def _serve(self, runner: Runner, params: GenerateParams, future: Future[Result], queued_at: float) -> None:
        """One request; an error in it is its own, the thread goes on."""
        start = time.monotonic()
        outcome: Result | EngineError | None = None  # None: cancelled while it waited
        if future.set_running_or_notify_cancel():
            try:
                images = runner.generate(params)
                took = time.monotonic() - start
                outcome = Result(images, start - queued_at, took)
                self._slot_s = (
                    took / params.slots if not self._slot_s else 0.8 * self._slot_s + 0.2 * took / params.slots
                )
            except Exception as error:
                log.exception("request %s failed", params.request_id)
                outcome = EngineError(f"the reverse chain failed: {type(error).__name__}")
            except BaseException:
                future.set_exception(EngineNotReady("failed"))
                raise
        with self._lock:
            del self._in_flight[params.request_id]
        if isinstance(outcome, Result):
            future.set_result(outcome)
        elif outcome is not None:
            future.set_exception(outcome)

    def _fail(self, error: BaseException) -> None:
        """The thread is ending: nobody may wait for it."""
        if not isinstance(error, (ValueError, OSError)):  # these say themselves what is wrong with model or device
            log.critical("the worker thread has died", exc_info=error)
        with self._lock:
            self.status, self.failure = "failed", error
            self._in_flight.clear()
        while not self._inbox.empty():
            item = self._inbox.get()
            if item is not None and item[1].set_running_or_notify_cancel():
                item[1].set_exception(EngineNotReady("failed"))
        self.on_failure(error)
