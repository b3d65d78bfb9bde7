"""What this very machine does: how long a step takes against its rows, and whether a row's bits are its own.

Nothing promises that a row of a network call has the same bits whatever the batch is, so it is tried: images of every
kind, alone and in batches, at other places, beside others and beside NaN, to the last bit of the last x. Where sizes
matter, calls are padded to a multiple of rows at which they do not, in the end to one fixed size.
"""

from __future__ import annotations

import hashlib
import statistics
import time
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from app.engine.request import Exactness, GenerateParams, Start
from app.engine.runner import Row, Runner
from app.engine.steptime import StepTime, sizes

MOST_ROWS = {"cpu": 32, "accelerator": 256}  # of a step; the best number is looked for below
MOST_FLOPS = {"cpu": 4e10, "accelerator": 1e13}  # of a step: large networks fill a device with few rows
PINNED_ROWS = {"cpu": 8, "accelerator": 64}  # of every call, where rows keep their bits in no other way
ROUNDS = 7  # of timed steps, as far as they take no longer than
ROUNDS_S = 5.0
LONGEST_S = 0.25  # a step that takes so long is the last size tried: clients join and leave between steps
STEPS = 3  # of the chains that are compared: with noise, with noise and history, and the last


def prepare(
    runner: Runner, exact: bool, batch_rows: int | None, brief: bool = False
) -> tuple[Exactness, StepTime, int]:
    """What an engine has to know before it serves: exactness, the step time, and the network rows of a full step.

    Args:
        runner: is padded as exactness wants it.
        exact: whether to look; without it nothing is promised and nothing padded.
        batch_rows: of a full step; None: as many as the measured step time recommends.
        brief: as few as PINNED_ROWS, which is a fraction of the check. The bits are those of an engine of more rows,
            whatever its multiple: no size up to here changes them, and that multiple is no larger.
    """
    kind = "cpu" if runner.device.type == "cpu" else "accelerator"
    affordable = max(1, int(MOST_FLOPS[kind] / runner.flops))
    most = batch_rows or min((PINNED_ROWS if brief else MOST_ROWS)[kind], affordable)
    guided = 2 if runner.info.guidance else 1  # network rows that the costliest image needs
    pin = max(min(PINNED_ROWS[kind], affordable), guided)
    exactness = find_exactness(runner, max(most, guided), pin) if exact else Exactness(False, 1, ())
    step_time = measure(runner, min(most, exactness.most_rows))
    rows = batch_rows or step_time.enough_rows()
    return exactness, step_time, min(rows + runner.padding(rows), exactness.most_rows)


def measure(runner: Runner, most: int) -> StepTime:
    """Times steps of 1, 2, 4, ... `most` network rows, round after round, as far as a step stays short.

    Every round sees all sizes, and their medians count: a machine that others use is slow for some rounds, not for some
    sizes.
    """
    took: dict[int, list[float]] = {}
    tried, start = sizes(most), time.perf_counter()
    for _ in range(ROUNDS):
        if took and time.perf_counter() - start > ROUNDS_S:
            break
        for size in tried:
            seconds = _one_step_s(runner, size)
            if seconds > LONGEST_S and (seconds := _one_step_s(runner, size)) > LONGEST_S:
                tried = [other for other in tried if other <= size]
            took.setdefault(size + runner.padding(size), []).append(seconds)
            if size == tried[-1]:
                break
    return StepTime([(rows, statistics.median(found)) for rows, found in sorted(took.items())])


def _one_step_s(runner: Runner, size: int) -> float:
    params = GenerateParams("measure", (0,), (runner.info.plain_label,), "ddim", 1, 0.0, 1.0)
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
        if (fingerprint := _own_bits(runner, rows)) is not None:
            return Exactness(True, multiple, rows, fingerprint)
    runner.pad_to(1)
    return Exactness(False, 1, rows)


def _compared(most: int) -> tuple[int, ...]:
    """Numbers of rows to compare: all where they are few, then some of every magnitude."""
    powers = [2**k for k in range(5, 17)]
    return tuple(
        sorted(n for n in {*range(1, 33), *powers, *(3 * p // 2 for p in powers), most - 1, most} if 0 < n <= most)
    )


def _own_bits(runner: Runner, sizes: Sequence[int]) -> str | None:
    """A hash of the bits that every kind of image has, alone and in batches of these numbers of network rows.

    None: they differ.
    """
    kinds = [kind for kind in _kinds(runner) if kind.network_rows <= max(sizes)]
    alone = [_run(runner, [_copy(kind)])[0] for kind in kinds]
    for size in sizes:
        batches: list[tuple[list[int], int | None]] = [
            (_mixed(kinds, size - 1, first=size), size % 3)
        ]  # and NaN at another place
        if size & (size - 1) == 0:
            batches.append(([0] * size, None))  # of one kind, as one request's images are
        for chosen, spoiled_at in batches:
            rows = [_copy(kinds[k]) for k in chosen]
            spoiled = [] if spoiled_at is None else [_copy(kinds[0])]
            at = spoiled_at or 0
            found = _run(runner, [*rows[:at], *spoiled, *rows[at:]], spoiled)
            del found[min(at, len(rows)) : min(at, len(rows)) + len(spoiled)]
            if any(not _same(alone[k], x) for k, x in zip(chosen, found, strict=True)):
                return None
    return hashlib.sha256(b"".join(x.tobytes() for x in alone)).hexdigest()[:12]


def _mixed(kinds: Sequence[Row], network_rows: int, first: int) -> list[int]:
    """Kinds in turn that have so many network rows together."""
    chosen: list[int] = []
    rows = 0
    while rows < network_rows:
        k = (first + len(chosen)) % len(kinds)
        if rows + kinds[k].network_rows > network_rows:
            k = 0  # the cheapest
        chosen.append(k)
        rows += kinds[k].network_rows
    return chosen


def _kinds(runner: Runner) -> list[Row]:
    """Images that differ in all that rows can differ in, timesteps too; the first is the cheapest."""
    info = runner.info
    steps, last = min(STEPS, info.num_train_steps), info.num_train_steps - 1
    grey = np.full(info.image_shape, 96, np.uint8)
    how = [
        ("dpmpp_2m", 0.0, 1.0, None),
        ("ddpm", 0.0, 1.0, last * 3 // 4),
        ("ddim", 0.7, 1.0, last // 2),
        ("ipndm", 0.0, 1.0, last // 3),
        *([("dpmpp_2m", 0.0, 2.5, last // 4), ("ddpm", 0.0, 4.0, last // 8)] if info.guidance else []),
    ]
    kinds = []
    for seed, (sampler, eta, scale, t) in enumerate(how):
        start = None if t is None else Start(grey, max(t, steps - 1))
        label = seed % info.num_classes if info.num_classes else None
        params = GenerateParams("check", (seed,), (label,), sampler, steps, eta, scale, start=start)
        kinds.append(runner.row(params, 0))
    return kinds


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
