"""How many replicas a model wants, by the images that wait. Ray Serve's controller gets this file's code as it is."""

from __future__ import annotations

from typing import Any

from ray.serve.config import AutoscalingContext


class ByWaiting:
    """So many that each makes full steps, and in each so many images wait as are allowed.

    Args:
        waiting: images that may wait in each replica, in full steps.
    """

    def __init__(self, waiting: float) -> None:
        self._waiting = waiting

    def __call__(self, context: AutoscalingContext) -> tuple[float, dict[str, Any]]:
        """The number of replicas, before Ray Serve's own bounds and delays, and no state to keep."""
        found = context.aggregated_metrics or {}
        slots, rows = (list((found.get(name) or {}).values()) for name in ("slots", "rows"))
        if not slots or not rows:
            return context.target_num_replicas, {}
        return sum(slots) / (max(rows) * (1 + self._waiting)), {}
