"""Offline training: `python -m ddpm_core.train --help`. Writes a run directory (runs.py), to be resumed and served."""

from __future__ import annotations

import dataclasses
import math
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from ddpm_core import checkpoint, data, train_options
from ddpm_core.network import pick_device
from ddpm_core.runs import Run, RunDirectory
from ddpm_core.train_options import show_duration
from ddpm_core.training import StepStats, Trainer, TrainingDiverged
from ddpm_core.unet import UNet

LOG_EVERY = 25  # steps between two lines of metrics.jsonl


def announce(run: Run, trainer: Trainer, images: data.ImageSet, out: Path) -> None:
    """Says what will be trained, on what, and for about how long; measures a step for that and leaves no trace."""
    r = run.recipe
    parameters = sum(p.numel() for p in trainer.net.parameters())
    names = ", ".join(f"{label}: {name}" for label, name in enumerate(images.class_names))
    print(
        f"net    U-Net {'/'.join(map(str, run.unet.block_out_channels))}, {parameters:,} parameters, "
        f"{run.scheduler.prediction_type}, {run.scheduler.beta_schedule} schedule\n"
        f"data   {run.data}: {len(images.images):,} images {tuple(images.images.shape[1:])}, "
        f"{images.num_classes or 'no'} classes{f' ({names})' if names else ''}\n"
        f"on     {trainer.device}, {torch.get_num_threads()} threads, {'bfloat16' if trainer.bf16 else 'float32'}"
        f"{', compiled (the first step takes a minute)' if run.compile else ''}",
        flush=True,
    )
    for _ in range(2):  # the first one warms up
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
    print(f"for    {length}\nto     {out}", flush=True)


def train(run: Run, trainer: Trainer, directory: RunDirectory, log: list[StepStats], save_every: float) -> bool:
    """Trains to the end or to the first SIGINT or SIGTERM, saving as it goes. Returns whether it came to the end."""
    stop = False

    def on_signal(signum: int, frame: object) -> None:
        nonlocal stop
        if stop:
            raise KeyboardInterrupt
        stop = True
        print("\nstopping after this step; once more to stop at once", file=sys.stderr, flush=True)

    previous = {s: signal.signal(s, on_signal) for s in (signal.SIGINT, signal.SIGTERM)}
    bar = tqdm(total=1.0, initial=trainer.progress, bar_format="{percentage:3.0f}% |{bar:20}| {desc}", mininterval=0.5)
    first_step, first_time, first_progress = trainer.step, time.monotonic(), trainer.progress
    saved_at, loss_mean = first_time, math.nan
    try:
        for stats in trainer.train():
            now = time.monotonic()
            loss_mean = stats.loss if math.isnan(loss_mean) else 0.98 * loss_mean + 0.02 * stats.loss
            if stats.step % LOG_EVERY == 0:
                log.append(stats)
            rate = (stats.step - first_step) * run.recipe.batch_size / (now - first_time)
            left_s = (now - first_time) * (1 - stats.progress) / max(stats.progress - first_progress, 1e-9)
            bar.set_description_str(
                f"step {stats.step:,}  loss {loss_mean:.4f}  {rate:.0f} images/s  {show_duration(left_s)} left",
                False,
            )
            bar.update(stats.progress - bar.n)
            if stop:
                break
            if now - saved_at >= save_every:
                directory.save(trainer, run, log)
                saved_at = time.monotonic()
    finally:
        bar.close()
        for signum, handler in previous.items():
            signal.signal(signum, handler)
    directory.save(trainer, run, log)
    return not stop


def main(argv: list[str] | None = None) -> int:
    args = train_options.build_parser().parse_args(argv)
    directory = RunDirectory(args.out)
    resume = f"resume with: python -m ddpm_core.train --out {args.out} --resume"
    try:
        if not args.resume and directory.state.exists():
            raise FileExistsError(
                f"{args.out} already holds a run: add --resume to go on with it, or name another --out"
            )
        run, images = train_options.old_run(args, directory) if args.resume else train_options.new_run(args)
        run = dataclasses.replace(run, **{k: vars(args)[k] for k in ("bf16", "compile") if k in args})
        torch.manual_seed(run.recipe.seed)  # the initial weights
        net = checkpoint.load_model(args.init).net.requires_grad_() if "init" in args else UNet(run.unet)
        null_label = run.unet.num_classes if run.unet.num_class_embeds else None
        trainer = Trainer(
            net, run.scheduler.schedule(), run.scheduler.prediction_type, images, run.recipe,
            null_label=null_label, device=pick_device(args.device), compile_net=run.compile, bf16=run.bf16,
        )  # fmt: skip
        log = directory.load(trainer) if args.resume else []
        checkpoint.write_atomically(directory.config, checkpoint.to_json(run.to_dict()))
        announce(run, trainer, images, args.out)
        finished = train(run, trainer, directory, log, args.save_every)
    except TrainingDiverged as error:
        print(f"error: {error}\n{resume}", file=sys.stderr)
        return 1
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        if directory.state.exists():
            print(f"stopped; what came after the last checkpoint is lost. {resume}", file=sys.stderr)
        return 130
    print(f"{'done' if finished else 'saved'} at step {trainer.step:,}: {args.out}/samples.png, {args.out}/model")
    if not finished:
        print(resume)
    return 0 if finished else 130


if __name__ == "__main__":
    sys.exit(main())
