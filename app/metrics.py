"""What /metrics says: Prometheus metrics of one process and of the engine of each model, in one registry."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector

STEP_S = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5)
WAIT_S = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 300)
ROWS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
REFUSALS = (
    "queue_full", "queue_long", "key_full", "deadline", "duplicate_id", "not_ready", "uploads_full", "frames_full",
    "jobs_full",
    "unauthorized", "connections",
)  # fmt: skip
RATIO = (0.1, 0.25, 0.5, 0.7, 0.8, 0.9, 1.0, 1.1, 1.25, 1.5, 2, 4, 10)


class Slots(Protocol):
    """Who has images."""

    running: int
    waiting: int


class Limits(Protocol):
    """What they may have."""

    @property
    def slots(self) -> int: ...


class Watched(Protocol):
    """What of an engine is read when somebody looks."""

    rows_limit: int

    @property
    def bounds(self) -> Limits: ...

    @property
    def scheduler(self) -> Slots: ...


class Metrics:
    """Of one process, its memory, time and files too.

    `_total` counts, `_seconds` measures, limits are gauges beside what they bound.
    """

    def __init__(self) -> None:
        self.registry = r = CollectorRegistry()
        ProcessCollector(registry=r)
        of = ["model"]
        self.slots_running = Gauge("ddpm_slots_running", "Images that have begun and are not done.", of, registry=r)
        self.slots_waiting = Gauge("ddpm_slots_waiting", "Images that have not begun.", of, registry=r)
        self.slots_limit = Gauge("ddpm_slots_limit", "Images that may wait or run at once.", of, registry=r)
        self.batch_rows_limit = Gauge("ddpm_batch_rows_limit", "Network rows of a full step.", of, registry=r)
        self.requests = Counter("ddpm_requests", "Accepted requests that ended.", [*of, "outcome"], registry=r)
        self.refused = Counter("ddpm_refused", "Requests that were not accepted.", ["reason"], registry=r)
        self.images = Counter("ddpm_images", "Images drawn.", of, registry=r)
        self.step = Histogram("ddpm_step_seconds", "One step of a batch.", of, buckets=STEP_S, registry=r)
        self.rows = Histogram(
            "ddpm_batch_rows", "Network rows of a step, padding not counted.", of, buckets=ROWS, registry=r
        )
        self.padding = Counter("ddpm_padding_rows", "Network rows that only filled a batch up.", of, registry=r)
        self.wasted = Counter("ddpm_wasted_steps", "Steps of images that nobody got.", of, registry=r)
        self.queue = Histogram("ddpm_queue_seconds", "Until a request's first step.", of, buckets=WAIT_S, registry=r)
        self.wait = Histogram("ddpm_wait_seconds", "Until a request's last step.", of, buckets=WAIT_S, registry=r)
        self.predicted = Histogram(
            "ddpm_wait_predicted_seconds", "The same, as predicted when it was accepted.", of, buckets=WAIT_S,
            registry=r,
        )  # fmt: skip
        self.ratio = Histogram("ddpm_wait_ratio", "Real over predicted wait.", of, buckets=RATIO, registry=r)
        self.jobs = Gauge("ddpm_jobs", "Requests that nobody waits for, in flight or kept.", registry=r)
        self.job_bytes = Gauge("ddpm_job_bytes", "Of their results.", registry=r)
        for reason in REFUSALS:
            self.refused.labels(reason)


class EngineMetrics:
    """What all metrics of a process say of one model, whose engines count together."""

    def __init__(self, metrics: Metrics, model: str) -> None:
        self.registry, self.refused = metrics.registry, metrics.refused
        self._metrics, self._requests, self._model = metrics, metrics.requests, model
        self.images, self.padding = metrics.images.labels(model), metrics.padding.labels(model)
        self.wasted = metrics.wasted.labels(model)
        self.step, self.rows = metrics.step.labels(model), metrics.rows.labels(model)
        self.queue, self.wait = metrics.queue.labels(model), metrics.wait.labels(model)
        self.predicted, self.ratio = metrics.predicted.labels(model), metrics.ratio.labels(model)
        for outcome in ("completed", "cancelled", "failed", "deadline"):
            metrics.requests.labels(model, outcome)

    def watch(self, engines: Sequence[Watched]) -> None:
        """Reads gauges from the model's engines, whenever somebody looks."""
        m, model = self._metrics, self._model
        m.slots_limit.labels(model).set(sum(engine.bounds.slots for engine in engines))
        m.slots_running.labels(model).set_function(lambda: sum(engine.scheduler.running for engine in engines))
        m.slots_waiting.labels(model).set_function(lambda: sum(engine.scheduler.waiting for engine in engines))
        m.batch_rows_limit.labels(model).set_function(lambda: max(engine.rows_limit for engine in engines))

    def ended(self, outcome: str) -> None:
        """An accepted request has ended."""
        self._requests.labels(self._model, outcome).inc()

    def completed(self, images: int, waited_s: float, predicted_s: float) -> None:
        """A request was served."""
        self.images.inc(images)
        self.wait.observe(waited_s)
        self.predicted.observe(predicted_s)
        self.ratio.observe(waited_s / max(predicted_s, 1e-9))
