"""Carrying a training out: what is said before it, progress, signals, checkpoints, and how it ends.

Every rank (parallel.py) goes the same way; rank 0 is heard, and saves.
"""

from __future__ import annotations

import math
import signal
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm

from ddpm_core import checkpoint
from ddpm_core.parallel import EXPECTED, Ranks
from ddpm_core.runs import Run, RunDirectory, TrainingRun
from ddpm_core.training import StepStats, Trainer, TrainingDiverged

LOG_EVERY = 25  # steps between two lines of metrics.jsonl


def show_duration(seconds: float) -> str:
    return (
        f"{seconds:.0f} s"
        if seconds < 120
        else f"{seconds / 60:.0f} min"
        if seconds < 7200
        else f"{seconds / 3600:.1f} h"
    )


def announce(run: Run, trainer: Trainer, on_what: str, directory: RunDirectory) -> None:
    """Says what will be trained, on what, and for about how long; measures a step for that and leaves no trace."""
    r, ranks = run.recipe, trainer.ranks
    parameters = sum(p.numel() for p in trainer.net.parameters())
    print(
        f"net    U-Net {'/'.join(map(str, run.unet.block_out_channels))}, {parameters:,} parameters, "
        f"{run.scheduler.prediction_type}, {run.scheduler.beta_schedule} schedule\n"
        f"{on_what}\n"
        f"on     {f'{ranks.world} processes, each ' if ranks.world > 1 else ''}{trainer.device}, "
        f"{torch.get_num_threads()} threads, {'bfloat16' if trainer.bf16 else 'float32'}"
        f"{', compiled (the first step takes a minute)' if run.compile else ''}",
        flush=True,
    )
    if len(run.processes) > 1:
        print(f"       by {', then '.join(map(str, run.processes))} processes: the same course, to other last digits")
    for _ in range(2):  # the first one warms up; after it the ranks know in which order they will sum gradients
        start = time.monotonic()
        trainer.loss().backward()  # type: ignore[no-untyped-call]
        trainer.net.zero_grad()
        if trainer.device.type == "cuda":
            torch.cuda.synchronize(trainer.device)
        step_s = time.monotonic() - start
    if r.steps:
        left = max(r.steps - trainer.step, 0)
        length = f"{left:,} steps of {r.batch_size} images, about {show_duration(left * step_s)}"
    else:
        left_s = max(r.time_budget_s - trainer.elapsed_s, 0)
        length = f"{show_duration(left_s)}, about {left_s / step_s:,.0f} steps of {r.batch_size} images"
    print(f"for    {length}\nto     {directory.path}", flush=True)


def train(run: Run, trainer: Trainer, directory: RunDirectory, log: list[StepStats], save_every: float) -> bool:
    """Trains to the end or to the first SIGINT or SIGTERM, saving as it goes. Returns whether it came to the end."""
    speaks = trainer.ranks.rank == 0

    def on_signal(signum: int, frame: object) -> None:
        if trainer.stop:
            raise KeyboardInterrupt
        trainer.stop = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=1.0, initial=trainer.progress, bar_format="{percentage:3.0f}% |{bar:20}| {desc}", mininterval=0.5)
    first_step, first_time, first_progress = trainer.step, time.monotonic(), trainer.progress
    saved_at, loss_mean, lost = first_time, math.nan, False
    try:
        for stats in trainer.train():
            now = time.monotonic()
            loss_mean = stats.loss if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * stats.loss
            if stats.step % LOG_EVERY == 0:
                log.append(stats)
            rate = (stats.step - first_step) * run.recipe.batch_size / (now - first_time)
            left_s = (now - first_time) * (1 - stats.progress) / max(stats.progress - first_progress, 1e-9)
            bar.set_description_str(
                f"step {stats.step:,}  loss {loss_mean:.4f}  {rate:.0f} images/s  {show_duration(left_s)} left"
                f"{f'  {trainer.skipped:,} skipped' if trainer.skipped else ''}",
                False,
            )
            bar.update(stats.progress - bar.n)
            if trainer.stopping:
                break
            if speaks and now - saved_at >= save_every:
                directory.save(trainer, run, log)
                saved_at = time.monotonic()
    except RuntimeError as error:
        lost = trainer.ranks.lost(error)
        raise
    finally:
        bar.close()
        for signum, handler in previous.items() if not lost else ():  # torchrun's SIGTERM follows, with more to be said
            signal.signal(signum, handler)
    if speaks:
        directory.save(trainer, run, log)
    return not trainer.stopping


def last_checkpoint(directory: RunDirectory) -> str:
    step = directory.saved_step()
    return "there is no checkpoint yet" if step is None else f"the checkpoint of step {step:,} is whole"


def carry_out(
    prepare: Callable[[], tuple[Run, Trainer, str]],
    directory: RunDirectory,
    module: str,
    ranks: Ranks,
    *,
    resume: bool,
    save_every: float,
) -> int:
    """A whole training, from its preparation to the exit code of the command that it is.

    Args:
        prepare: makes the run, its trainer, and the line that says what is learned from; called by every rank.
        directory: where the run is, or will be.
        module: what `python -m` names, to say how to resume.
        ranks: the processes that train.
        resume: go on with what is in the directory.
        save_every: seconds between checkpoints.
    """
    again = f"{ranks.launcher} -m {module} --out {directory.path} --resume"

    def begin() -> None:
        if not resume and directory.state.exists():
            raise FileExistsError(
                f"{directory.path} already holds a run: add --resume to go on with it, or name another --out"
            )

    try:
        ranks.agree(begin)
        run, trainer, on_what = prepare()
        log = ranks.agree(lambda: directory.load(trainer) if resume else [])
        what = {k: v for k, v in run.to_dict().items() if k not in run.PLACES}
        ranks.same(lambda: (what, trainer.step, trainer.device.type))
        run = run.trained_by(ranks.world)
        if ranks.rank == 0:
            checkpoint.clear_temporaries(directory.path)
            checkpoint.write_atomically(directory.config, checkpoint.to_json(run.to_dict()))
        announce(run, trainer, on_what, directory)
        finished = train(run, trainer, directory, log, save_every)
    except TrainingDiverged as error:
        instead = "begin another run with a lower --lr or a longer --warmup-steps"
        if directory.state.exists():
            instead = f"--resume would come to the same: {instead} in another --out"
            if isinstance(run, TrainingRun):
                instead += f", from these weights with --init {directory.model}"
        print(f"error: {error}; {last_checkpoint(directory)}; {instead}", file=sys.stderr)
        ranks.settle()
        return 1
    except checkpoint.WriteError as error:
        go_on = f"go on with: {again}" if directory.state.exists() else "give the same command again"
        print(f"error: {error}; {last_checkpoint(directory)}; free space, then {go_on}", file=sys.stderr)
        return 1
    except EXPECTED as error:
        return ranks.refuse(error)
    except RuntimeError as error:
        if ranks.lost(error) and directory.state.exists():
            print(f"{last_checkpoint(directory)}; go on with: {again}", file=sys.stderr)
        return ranks.refuse(error)
    except KeyboardInterrupt:
        if directory.state.exists():
            print(f"stopped; what came after the last checkpoint is lost. resume with: {again}", file=sys.stderr)
        else:
            print("stopped before the first checkpoint: the same command begins anew", file=sys.stderr)
        return 130
    where = f"{directory.path}/samples.png, {directory.model}"
    skipped = f" ({trainer.skipped:,} skipped, their loss or gradient not being finite)" if trainer.skipped else ""
    print(f"{'done' if finished else 'saved'} at step {trainer.step:,}{skipped}: {where}")
    if not finished:
        print(f"resume with: {again}")
    ranks.settle()
    return 0 if finished else 130
