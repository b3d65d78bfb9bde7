"""The worker thread that owns the network: takes requests at any time, makes one step of many images at a time.

Between two steps requests join, leave, end and are chosen (scheduler.py); the steps themselves are runner.py's. An
idle engine blocks. Nothing but the worker touches the device.
"""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from app.engine.admission import Bounds, admit
from app.engine.job import Job, OnProgress
from app.engine.request import (
    Cancelled,
    DeadlinePassed,
    DuplicateRequest,
    EngineError,
    EngineNotReady,
    Exactness,
    GenerateParams,
    ModelInfo,
    Progress,
    ReplicaState,
    Result,
    Status,
)  # fmt: skip
from app.engine.runner import Row, Runner, to_pixels
from app.engine.scheduler import Scheduler
from app.engine.selfcheck import prepare
from app.metrics import EngineMetrics, Metrics

log = logging.getLogger("app.engine")

Outcome = Literal["completed", "cancelled", "failed", "deadline"]
Batch = list[tuple[Job, int, Row]]


class Engine:
    """One model on one device, shared by every request.

    Args:
        make_runner: loads the model; called on the worker thread.
        bounds: what may wait or run at once.
        exact: find out and keep what makes an image's bytes its own; False spares the start-up check and any padding.
        batch_rows: the most network rows of a step; None: as many as the measured step time recommends.
        brief: steps of few rows and a short start-up check, for an engine that is started for one request.
        name: of the model.
        metrics: where to count; several engines of a model may count together.
        device: held while it loads or makes a step: engines that share a device take turns.
        clock: seconds, monotonic.
    """

    def __init__(
        self,
        make_runner: Callable[[], Runner],
        *,
        bounds: Bounds,
        exact: bool = True,
        batch_rows: int | None = None,
        brief: bool = False,
        name: str = "model",
        metrics: EngineMetrics | None = None,
        device: AbstractContextManager[object] | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.name, self._make_runner, self.bounds = name, make_runner, bounds
        self._exact, self._batch_rows, self._brief = exact, batch_rows, brief
        self._device, self._clock = device or nullcontext(), clock
        self._changed = threading.Condition()  # guards all that follows
        self.scheduler = Scheduler()
        self._jobs: dict[str, Job] = {}
        self._left: list[Row] = []  # of what has ended, to be released by the worker
        self._stopping = False
        self.status: Status = "starting"
        self.failure: BaseException | None = None
        self.info: ModelInfo | None = None
        self.exactness: Exactness | None = None
        self.rows_limit = 0
        self.on_failure: Callable[[BaseException], None] = lambda error: None
        self._thread = threading.Thread(target=self._run, name=f"engine-{name}", daemon=True)
        self.metrics = metrics or EngineMetrics(Metrics(), name)

    # ---- for every thread

    def start(self) -> None:
        """Starts loading; status turns from starting to ok, or to failed."""
        self._thread.start()

    def expect(self, params: GenerateParams) -> float:
        """The seconds until a request ends that is submitted now. Raises as submit() does."""
        with self._changed:
            return self._admit(params)

    def make_plan(self, params: GenerateParams) -> None:
        """Makes the plan of a request that is submitted next: of many steps it takes a tenth of a second.

        Raises:
            ValueError: this model's timesteps do not allow it.
        """
        self._runner.row(params, 0)

    def submit(self, params: GenerateParams, on_progress: OnProgress | None = None) -> Future[Result]:
        """Accepts a request, or says at once why not.

        Args:
            params: checked against `info`.
            on_progress: called on any thread; must not block.

        Raises:
            EngineNotReady, EngineBusy, DuplicateRequest, DeadlineTooSoon: nothing was accepted.
        """
        with self._changed:
            predicted_s = self._admit(params)
            rows = [self._runner.row(params, index) for index in range(params.slots)]
            job = Job(params, rows, on_progress, self._clock(), predicted_s)
            self._jobs[job.id] = job
            self.scheduler.add(job.id, params.flow, params.images)
            if on_progress is not None:
                self._tell_waiting([job])
            self._changed.notify()
        return job.future

    def _admit(self, params: GenerateParams) -> float:
        """Refuses, or predicts the seconds until the request ends."""
        if self.status != "ok":
            raise EngineNotReady(self.status)
        if params.key in self._jobs:
            raise DuplicateRequest(params.request_id)
        return admit(params, self.scheduler, self.step_time, self.rows_limit, self.bounds)

    def _finish_s(self, row_steps: int, longest: int, rows: int) -> float:
        return self.step_time.finish_s(row_steps, longest, rows, self.rows_limit)

    def cancel(self, request_id: str, flow: str = "") -> bool:
        """Ends a request of a flow; its images make no further step. Returns whether there was such a one."""
        with self._changed:
            job = self._jobs.get(GenerateParams.key_of(flow, request_id))
            if job is not None:
                self._end(job, "cancelled", Cancelled("the request was cancelled"))
            return job is not None

    @property
    def state(self) -> ReplicaState:
        """How it is now."""
        return ReplicaState(
            self.name if self.info is None else self.info.device, self.status, self.scheduler.running,
            self.scheduler.waiting, self.bounds.slots, self.rows_limit, self.exactness,
        )  # fmt: skip

    def drain(self) -> None:
        """Refuses new requests from now on; accepted ones are served."""
        with self._changed:
            if self.status in ("starting", "ok"):
                self.status = "draining"

    def progress(self, request_id: str, flow: str = "") -> Progress | None:
        """How far a request of a flow is; None: there is no such one."""
        with self._changed:
            job = self._jobs.get(GenerateParams.key_of(flow, request_id))
            if job is None:
                return None
            if job.waits:
                position, row_steps = self.scheduler.line()[job.id]
                eta_s = self._finish_s(row_steps, job.params.steps, self.scheduler.rows)
                return Progress(0, job.params.steps, position, eta_s, begun=False)
            eta_s = self._finish_s(*self.scheduler.left(job.id))
            return Progress(job.steps_made // job.params.slots, job.params.steps, 0, eta_s)

    def holds(self, key: str) -> bool:
        """Whether a request of this key (GenerateParams.key) is in flight."""
        return key in self._jobs

    @property
    def idle(self) -> bool:
        """Whether no accepted request is left."""
        return not self._jobs

    def stop(self, timeout_s: float) -> bool:
        """Drains for so long, ends what is left with an error, and the thread. Returns whether it ended in time."""
        until = time.monotonic() + timeout_s
        self.drain()
        with self._changed:
            self._stopping = True
            self._changed.notify()
            self._changed.wait_for(lambda: self.idle, timeout_s)
            for job in list(self._jobs.values()):
                self._end(job, "failed", EngineNotReady("draining"))
        self._thread.join(max(0.0, until - time.monotonic()))
        return not self._thread.is_alive()

    # ---- the worker thread

    def _run(self) -> None:
        try:
            self.load()
            while self._wait_for_work():
                asked = time.perf_counter()
                with self._device:
                    self.tick(time.perf_counter() - asked)
        except BaseException as error:
            self._fail(error)

    def load(self) -> None:
        """Loads the model and finds out how this machine runs it; then the engine is ready."""
        with self._device:
            runner = self._make_runner()
            exactness, step_time, rows_limit = prepare(runner, self._exact, self._batch_rows, self._brief)
        with self._changed:
            self._runner, self.info, self.exactness = runner, runner.info, exactness
            self.step_time, self.rows_limit = step_time, rows_limit
            if self.status == "starting":
                self.status = "ok"
        log.info(
            "ready: %s on %s, up to %d network rows a step in %.1f ms, %s", self.info.id, self.info.device,
            rows_limit, 1000 * step_time.seconds(rows_limit), exactness.how,
        )  # fmt: skip

    def _wait_for_work(self) -> bool:
        """Blocks while there is nothing to do. False: there will be nothing any more."""
        with self._changed:
            self._changed.wait_for(lambda: self._jobs or self._left or self._stopping)
            return bool(self._jobs or self._left)

    def tick(self, waited_s: float = 0.0) -> None:
        """One step of the images whose turn it is, after so long a wait for the device."""
        with self._changed:
            now = self._clock()
            for job in [job for job in self._jobs.values() if job.deadline <= now]:
                self._end(job, "deadline", DeadlinePassed("the deadline has passed"))
            left, self._left = self._left, []
            batch = [(job := self._jobs[id_], i, job.rows[i]) for id_, i in self.scheduler.next(self.rows_limit)]
            for job, _, _ in batch:
                if job.waits:
                    job.begun = now
                    self.metrics.queue.observe(now - job.submitted)
        for row in left:
            self._runner.release(row)
        if not batch:
            return
        rows = [row for _, _, row in batch]
        network_rows = sum(row.network_rows for row in rows)
        padding = self._runner.padding(network_rows)
        start = time.perf_counter()
        failed = self._runner.advance(rows)
        took = time.perf_counter() - start
        if len(failed) == len(rows):
            self._runner.probe()  # raises where no step can be made any more
        ended = [row for row in rows if row.finished]
        x = dict(zip(ended, self._runner.x(ended), strict=True)) if ended else {}
        done = [(job, i, row) for job, i, row in batch if row not in failed]
        previews = self._previews(done)
        self._keep(done)

        self.metrics.step.observe(took)
        self.metrics.rows.observe(network_rows)
        self.metrics.padding.inc(padding)
        with self._changed:
            if not failed:
                self.step_time.observe(network_rows + padding, waited_s + took)
            for job, index, row in batch:
                if not job.future.done():
                    self._account(job, index, row, failed.get(row), x.get(row))
            now = self._clock()
            for job in dict.fromkeys(job for job, _, _ in batch):
                if not job.future.done():
                    if job.on_progress is not None:
                        eta_s = self._finish_s(*self.scheduler.left(job.id))
                        job.tell(now, 0, eta_s, previews.get(job, {}))
                    if len(job.x) == job.params.slots:
                        self.metrics.completed(job.params.slots, now - job.submitted, job.predicted_s)
                        self._end(job, "completed", job.result(now))
            self._tell_waiting([job for job in self._jobs.values() if job.wants_news(now)])

    def _account(
        self, job: Job, index: int, row: Row, error: Exception | None, x: NDArray[np.float32] | None
    ) -> None:  # fmt: skip
        """Writes down one image's step; an error ends its request."""
        if error is not None:
            log.error("a step of image %d failed", index, exc_info=error, extra={"request_id": job.params.request_id})
            self._end(job, "failed", EngineError(f"image {index}: a step failed with {type(error).__name__}"))
        elif x is not None and not np.isfinite(x).all():
            log.error("image %d is not finite", index, extra={"request_id": job.params.request_id})
            self._end(job, "failed", EngineError(f"image {index}: the network returned numbers that are not finite"))
        elif self.scheduler.advance((job.id, index)):
            assert x is not None
            job.x[index] = x
            self._left.append(row)

    def _end(self, job: Job, outcome: Outcome, answer: Result | EngineError) -> None:
        """A request leaves with its answer."""
        del self._jobs[job.id]
        self.scheduler.remove(job.id)
        self._left += [row for index, row in enumerate(job.rows) if index not in job.x]
        self.metrics.ended(outcome)
        if isinstance(answer, Result):
            job.future.set_result(answer)
        else:
            self.metrics.wasted.inc(job.steps_made)
            job.future.set_exception(answer)
        self._changed.notify_all()

    def _previews(self, batch: Batch) -> dict[Job, dict[int, NDArray[np.uint8]]]:
        """x_0_hat as pixels, by request and image, where a client wants to see it after this step."""
        due = [(job, index, row) for job, index, row in batch if job.wants_preview(row)]
        found: dict[Job, dict[int, NDArray[np.uint8]]] = {}
        if due:
            pixels = to_pixels(self._runner.x_0_hat([row for *_, row in due]))
            for (job, index, _), of_image in zip(due, pixels, strict=True):
                found.setdefault(job, {})[index] = of_image
        return found

    def _keep(self, batch: Batch) -> None:
        """Copies from the device what requests want to keep of their chains."""
        due = [(job, index, row) for job, index, row in batch if row.done in job.params.frames]
        if due:
            rows = [row for *_, row in due]
            for (job, index, row), *kept in zip(due, self._runner.x(rows), self._runner.x_0_hat(rows), strict=True):
                job.kept[row.done, index] = kept[0], kept[1]
        for job, index, row in batch:
            if row.done == 1 and 0 in job.params.frames:
                x = self._runner.first_x(row)
                job.kept[0, index] = x, np.full_like(x, np.nan)

    def _tell_waiting(self, jobs: list[Job]) -> None:
        """Tells clients of requests that have not begun how many go before them."""
        if not jobs:
            return
        now, line, rows = self._clock(), self.scheduler.line(), self.scheduler.rows
        for job in jobs:
            position, row_steps = line[job.id]
            job.tell(now, position, self._finish_s(row_steps, job.params.steps, rows), {})

    def _fail(self, error: BaseException) -> None:
        """The thread is ending: nobody may wait for it."""
        loading = self.info is None
        if not (loading and isinstance(error, (ValueError, OSError))):  # these say what is wrong with model or device
            log.critical("the worker thread has died", exc_info=error)
        with self._changed:
            self.status, self.failure = "failed", error
            for job in list(self._jobs.values()):
                self._end(job, "failed", EngineNotReady("failed"))
        self.on_failure(error)
