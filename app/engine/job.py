"""A request inside the engine: its images, what its client is told on the way, and its answer."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections.abc import Callable, Mapping
from concurrent.futures import Future

import numpy as np
from numpy.typing import NDArray

from app.engine.request import Frames, GenerateParams, Progress, Result
from app.engine.runner import Row, to_pixels

log = logging.getLogger("app.engine")

OnProgress = Callable[[Progress], None]

Kept = tuple[NDArray[np.float32], NDArray[np.float32]]
"""x and x_0_hat of an image after a step, (C, H, W)."""

NEWS_S = 0.5  # a client that waits hears at most so often of its place


@dataclasses.dataclass(eq=False)
class Job:
    """A request in the engine. Times are of the engine's clock."""

    params: GenerateParams
    rows: list[Row]
    on_progress: OnProgress | None
    submitted: float
    predicted_s: float
    future: Future[Result] = dataclasses.field(default_factory=Future)
    x: dict[int, NDArray[np.float32]] = dataclasses.field(default_factory=dict)  # of the images that are done
    kept: dict[tuple[int, int], Kept] = dataclasses.field(default_factory=dict)  # by step and image
    begun: float = math.nan  # its first step
    _told: tuple[int, int] = (-1, -1)  # of which step and place its client knows
    _told_at: float = -math.inf

    def __post_init__(self) -> None:
        self.future.set_running_or_notify_cancel()  # nobody but the engine ends it

    @property
    def id(self) -> str:
        """In the engine; clients and logs know it by params.request_id."""
        return self.params.key

    @property
    def deadline(self) -> float:
        return math.inf if self.params.deadline_s is None else self.submitted + self.params.deadline_s

    @property
    def waits(self) -> bool:
        """Whether no image has begun."""
        return math.isnan(self.begun)

    @property
    def steps_made(self) -> int:
        """By all its images together."""
        return sum(row.done for row in self.rows)

    def wants_preview(self, row: Row) -> bool:
        """Whether its client wants to see x_0_hat after the step that an image has just made."""
        every = self.params.previews
        return bool(self.on_progress and every) and row.done % every == 0

    def wants_news(self, now: float) -> bool:
        """Whether its client waits and has not heard of its place lately."""
        return self.on_progress is not None and self.waits and now - self._told_at >= NEWS_S

    def tell(self, now: float, position: int, eta_s: float, previews: Mapping[int, NDArray[np.uint8]]) -> None:
        """Tells the client how far the request is, where there is news. A client that cannot hear is no error here."""
        self._told_at = now
        news = self.steps_made // self.params.slots, position
        if self.on_progress is None or (news == self._told and not previews):
            return
        self._told = news
        try:
            shown = tuple(sorted(previews.items()))
            self.on_progress(Progress(news[0], self.params.steps, position, eta_s, previews=shown))
        except Exception:
            log.exception("progress could not be told", extra={"request_id": self.params.request_id})
            self.on_progress = None

    def result(self, now: float) -> Result:
        """The answer, once every image is done."""
        x = np.stack([self.x[index] for index in range(self.params.slots)])
        return Result(x, to_pixels(x), self.begun - self.submitted, now - self.begun, self._frames())

    def _frames(self) -> Frames | None:
        steps, images = self.params.frames, range(self.params.slots)
        if not steps:
            return None
        x, x_0_hat = (np.stack([[self.kept[s, i][part] for i in images] for s in steps]) for part in (0, 1))
        return Frames(steps, np.append(self.rows[0].plan.alpha_bars, 1.0)[list(steps)], x, x_0_hat)
