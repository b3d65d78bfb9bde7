"""How long a step takes against its rows, of this machine or as given: what simulations know of a machine."""

from __future__ import annotations

import dataclasses

from app.engine.runner import Runner
from app.engine.selfcheck import prepare
from app.engine.steptime import StepTime
from benchmarks.machine import MODEL, ROOT


@dataclasses.dataclass(frozen=True)
class Machine:
    """How long a step takes, how many rows it may have, and what a request takes outside of steps."""

    step_time: StepTime
    rows_limit: int
    rows_multiple: int = 1
    outside_s: float = 0.0  # of a request's own time before its first step and after its last

    def seconds(self, rows: int) -> float:
        return self.step_time.seconds(rows + -rows % self.rows_multiple)

    @property
    def capacity(self) -> float:
        """Row-steps a second in full steps."""
        return self.rows_limit / self.seconds(self.rows_limit)

    def requests_per_s(self, work: float) -> float:
        """Those of so many row-steps each that it serves in full steps: load 1."""
        return self.capacity / work

    @property
    def curve_ms(self) -> dict[int, float]:
        return {rows: round(1000 * seconds, 3) for rows, seconds in self.step_time.points}


def this_machine() -> Machine:
    """As the engine finds it at its start."""
    runner = Runner.load(str(ROOT / MODEL), "auto")
    exactness, step_time, rows_limit = prepare(runner, exact=True, batch_rows=None)
    return Machine(step_time, rows_limit, exactness.rows_multiple)


def machine_of(curve: str) -> Machine:
    """From rows:ms,rows:ms,... Raises ValueError."""
    pairs = [pair.split(":") for pair in curve.split(",")]
    step_time = StepTime(sorted((int(rows), float(ms) / 1000) for rows, ms in pairs))
    return Machine(step_time, step_time.enough_rows())
