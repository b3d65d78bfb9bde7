"""What this very machine does: how long a step takes against its rows, and whether a row's bits are its own.

Nothing promises that a row of a network call has the same bits whatever the batch is, so it is tried: images of every
kind, alone and in batches, at other places, beside others and beside NaN, to the last bit of the last x. Where sizes
matter, calls are padded to a multiple of rows at which they do not, in the end to one fixed size.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.engine.request import Exactness, GenerateParams
from app.engine.runner import Row, Runner
from app.engine.steptime import StepTime, sizes

ROUNDS = 3  # of timed steps, two of each size; the fastest counts: others may use this machine just now
LONGEST_S = 0.25  # a step that takes so long is the last size tried: clients join and leave between steps
STEPS = 2  # of the chains that are compared: one with noise and history, and the last


def measure(runner: Runner, most: int) -> StepTime:
    """Times steps of 1, 2, 4, ... `most` network rows, round after round, as far as a step stays short."""
    fastest: dict[int, float] = {}
    tried = sizes(most)
    for _ in range(ROUNDS):
        for size in tried:
            took = min(_one_step_s(runner, size), _one_step_s(runner, size))
            padded = size + runner.padding(size)
            fastest[padded] = min(took, fastest.get(padded, math.inf))
            if took > LONGEST_S:
                tried = [other for other in tried if other <= size]
                break
    return StepTime(sorted(fastest.items()))


def _one_step_s(runner: Runner, size: int) -> float:
    params = GenerateParams("measure", (0,), (None,), "ddim", 1, 0.0, 1.0)
    rows = [runner.row(params, 0) for _ in range(size)]
    for row in rows:
        runner.begin(row)
    start = time.perf_counter()
    failed = runner.advance(rows)
    took = time.perf_counter() - start
    for row in rows:
        runner.release(row)
    if failed:
        raise RuntimeError(f"a step of {size} rows failed") from next(iter(failed.values()))
    return took


def find_exactness(runner: Runner, most: int, pin: int) -> Exactness:
    """Tries multiples of rows, 1 first, until no compared bit differs; the runner pads to what is found.

    What is found must not hang on how fast the machine was at this start: nothing here looks at a clock.

    Args:
        runner: what is checked.
        most: the most network rows that a call may have.
        pin: the one size that calls have where no multiple below it serves.
    """
    for multiple in sizes(pin):
        rows = _compared(most if multiple < pin else pin)
        runner.pad_to(multiple)
        if _bits_are_own(runner, rows):
            return Exactness(True, multiple, rows)
    runner.pad_to(1)
    return Exactness(False, 1, rows)


def _compared(most: int) -> tuple[int, ...]:
    """Numbers of rows to compare: all where they are few, then some of every magnitude."""
    powers = [2**k for k in range(4, 17)]
    return tuple(
        sorted(n for n in {*range(1, 17), *powers, *(3 * p // 2 for p in powers), most - 1, most} if n <= most)
    )


def _bits_are_own(runner: Runner, sizes: Sequence[int]) -> bool:
    """Whether every kind of image has the same bits alone and in batches of these numbers of network rows."""
    kinds = [kind for kind in _kinds(runner) if kind.network_rows <= max(sizes)]
    alone = [_run(runner, [_copy(kind)])[0] for kind in kinds]
    for size in sizes:
        chosen, rows, turn = [], 0, size  # another kind stands first in every size
        while rows < size - (size > 2):
            k = turn % len(kinds) if rows + kinds[turn % len(kinds)].network_rows <= size else 0
            chosen.append(k)
            rows += kinds[k].network_rows
            turn += 1
        batch = [_copy(kinds[k]) for k in chosen]
        spoiled = [_copy(kinds[0])] if rows < size else []
        place = size % (len(batch) + 1)
        found = _run(runner, [*batch[:place], *spoiled, *batch[place:]], spoiled)
        if spoiled:
            del found[place]
        if any(not _same(alone[k], x) for k, x in zip(chosen, found, strict=True)):
            return False
    return True


def _kinds(runner: Runner) -> list[Row]:
    """Images that differ in all that rows can differ in; the first is the cheapest."""
    steps, classes = min(STEPS, runner.info.num_train_steps), runner.info.num_classes
    how = [
        ("dpmpp_2m", 0.0, 1.0),
        ("ddpm", 0.0, 1.0),
        ("ddim", 0.7, 1.0),
        *([("dpmpp_2m", 0.0, 2.5), ("ddpm", 0.0, 4.0)] if classes else []),
    ]
    return [
        runner.row(GenerateParams("check", (seed,), (seed % classes if classes else None,), name, steps, eta, scale), 0)
        for seed, (name, eta, scale) in enumerate(how)
    ]


def _copy(row: Row) -> Row:
    return Row(row.seed, row.label, row.guidance_scale, row.plan, row.start)


def _run(runner: Runner, rows: Sequence[Row], spoiled: Sequence[Row] = ()) -> list[NDArray[np.float32]]:
    """Runs images together to their end; the x of each. Spoiled ones hold NaN from the start."""
    for row in rows:
        runner.begin(row)
    for row in spoiled:
        runner.spoil(row)
    try:
        while not rows[0].finished:
            if failed := runner.advance(rows):
                raise RuntimeError("a step of the self-check failed") from next(iter(failed.values()))
        return list(runner.x(rows))
    finally:
        for row in rows:
            runner.release(row)


def _same(a: NDArray[np.float32], b: NDArray[np.float32]) -> bool:
    return bool(np.array_equal(a.view(np.uint32), b.view(np.uint32)))
