"""How long a step takes against its network rows: measured at start-up, kept true by every step since."""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence

NEAR_BEST = 1.15  # a batch is large enough where an image costs at most this much more than in the best one
WEIGHT = 0.05  # of the newest step in the running average
MOST_SLOWDOWN = 4.0  # that one step may tell of


class StepTime:
    """t(rows) in seconds: a line through measured points, times how much slower the machine has been lately.

    Args:
        points: (network rows, seconds), rows increasing.
    """

    def __init__(self, points: Sequence[tuple[int, float]]) -> None:
        self.points = tuple(points)
        self._rows = [rows for rows, _ in points]
        self._scale = 1.0

    def seconds(self, rows: int) -> float:
        """Of one step with so many network rows."""
        return self._scale * self._measured(rows)

    def _measured(self, rows: int) -> float:
        last_rows, last_s = self.points[-1]
        if rows >= last_rows:
            return last_s * rows / last_rows
        i = bisect.bisect_left(self._rows, rows)
        (r1, s1), (r0, s0) = self.points[i], self.points[max(i - 1, 0)]
        return s1 if r1 == r0 else s0 + (s1 - s0) * (rows - r0) / (r1 - r0)

    def observe(self, rows: int, seconds: float) -> None:
        """A step was made. One that took absurdly long, as in a frozen machine, says little about the next."""
        self._scale += WEIGHT * (min(seconds / self._measured(rows), MOST_SLOWDOWN) - self._scale)

    def enough_rows(self) -> int:
        """The smallest measured batch in which an image costs nearly as little as in the best one."""
        best = min(seconds / rows for rows, seconds in self.points)
        return next(rows for rows, seconds in self.points if seconds / rows <= NEAR_BEST * best)

    def finish_s(self, row_steps: int, longest: int, rows: int, limit: int, *, lately: bool = True) -> float:
        """Seconds of so much work in batches of at most `limit` rows, of which one image takes `longest` steps.

        As fast as the machine has been lately, or as it was when it was measured.
        """
        batch = max(1, min(rows, limit))
        return max(row_steps / batch, longest) * (self.seconds(batch) if lately else self._measured(batch))


def sizes(most: int) -> list[int]:
    """Batch sizes worth measuring: 1, 2, 4, ... most."""
    return [*itertools.takewhile(lambda n: n < most, (2**k for k in range(32))), most]
