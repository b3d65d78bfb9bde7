"""Training by several processes at one global batch, and what it costs that they talk.

What: images a second of optimizer steps (recipe fast) of weights/mnist's network on random images, by 1, 2, ...
processes; and of several the time of what they tell each other in a step: the three numbers that they decide on, and
the sum of a gradient, which DistributedDataParallel hides behind the backward pass as far as it can.
How: each number of processes is started by torchrun once a round, in an order that turns around; the cores are shared
out among them as threads; medians of a start's steps without the first ones, then of rounds, and in brackets the least
and the most of the rounds. Rates are held against the first number of processes, round by round.
On what: a GPU for each process where there are GPUs, else the CPU.

    python benchmarks/training.py [--processes 1 2 4 8] [--batch-size 64] [--device cpu] [--compile] [--quick]

Three minutes on two cores, half of one with --quick (one round of few steps; its figures mean little).
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import statistics
import subprocess
import sys
from typing import Any

import torch
from torch import distributed

from benchmarks.machine import MODEL, ROOT, busy_cores, print_json, table
from benchmarks.turns import Spread, seconds_of
from ddpm_core.checkpoint import load_model
from ddpm_core.data import ImageSet
from ddpm_core.losses import DenoisingLoss
from ddpm_core.parallel import Ranks, joined
from ddpm_core.recipe import Recipe
from ddpm_core.training import Trainer
from ddpm_core.unet import UNet

WARM_UP = 3  # steps that do not count
TALKS = 50  # of which the median is taken


def trainer_of(args: argparse.Namespace, ranks: Ranks) -> Trainer:
    model = load_model(ROOT / MODEL)
    device = ranks.device(args.device)
    recipe = Recipe(steps=WARM_UP + args.steps, batch_size=args.batch_size, timesteps="stratified", min_snr_gamma=5.0)
    generator = torch.Generator().manual_seed(0)
    pixels = torch.randint(0, 256, (4 * args.batch_size, *model.config.image_shape), generator=generator)
    labels = torch.arange(len(pixels)) % max(model.num_classes, 1)
    images = ImageSet("random", pixels.to(torch.uint8), labels, model.num_classes)
    loss = DenoisingLoss(
        images, model.schedule, model.scheduler.prediction_type, recipe,
        null_label=model.null_label, device=device, ranks=ranks,
    )  # fmt: skip
    torch.manual_seed(0)
    return Trainer(UNet(model.config), loss, recipe, device=device, compile_net=args.compile, ranks=ranks)


def measured(args: argparse.Namespace, ranks: Ranks) -> dict[str, Any]:
    """One start: the rate of its steps, and the time of what the ranks say in one."""
    trainer = trainer_of(args, ranks)
    elapsed, losses = [0.0], []
    for stats in trainer.train():
        elapsed.append(stats.elapsed_s)
        losses.append(stats.loss)
    steps = [after - before for before, after in itertools.pairwise(elapsed)][WARM_UP:]
    found: dict[str, Any] = {"images_per_s": args.batch_size / statistics.median(steps), "loss": losses[-1]}
    if ranks.world > 1:
        gradient = torch.zeros(sum(p.numel() for p in trainer.net.parameters()), device=trainer.device)

        def add() -> None:
            distributed.all_reduce(gradient)
            gradient[0].item()  # waits for a GPU

        found["numbers_ms"] = 1000 * statistics.median(seconds_of(lambda: ranks.sum(1, 2, 3)) for _ in range(TALKS))
        found["gradient_ms"] = 1000 * statistics.median(seconds_of(add) for _ in range(TALKS))
    return found


@joined
def work(ranks: Ranks, args: argparse.Namespace) -> int:
    print(json.dumps(measured(args, ranks)))
    return 0


def started(args: argparse.Namespace, processes: int, threads: int) -> dict[str, Any]:
    """What measured() finds in so many processes."""
    words = ["--batch-size", str(args.batch_size), "--steps", str(args.steps), "--device", args.device]
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command += ["-m", "benchmarks.training", "--worker", *words, *["--compile"] * args.compile]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    out = subprocess.run(command, cwd=ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True).stdout
    found: dict[str, Any] = json.loads(out.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--processes", type=int, nargs="+", default=[1, 2], help="default: 1 2")
    parser.add_argument("--batch-size", type=int, default=64, help="of all processes together (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=30, help="of a start (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=4, help="default: %(default)s")
    parser.add_argument("--device", default="auto", help="auto, cpu, cuda (default: auto)")
    parser.add_argument("--compile", action="store_true", help="torch.compile the step")
    parser.add_argument("--quick", action="store_true", help="shows that everything runs; its figures mean little")
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        work(args)
        return
    if args.quick:
        args.rounds, args.steps = 1, 2

    busy, cores = busy_cores(), len(os.sched_getaffinity(0))
    rounds: list[dict[int, dict[str, Any]]] = []
    for turn in range(args.rounds):
        order = args.processes[:: -1 if turn % 2 else 1]
        rounds.append({n: started(args, n, max(cores // n, 1)) for n in order})
    first, figures = args.processes[0], []
    for n in args.processes:
        found = {
            "processes": n,
            "threads_each": max(cores // n, 1),
            "images_per_s": Spread.of(r[n]["images_per_s"] for r in rounds),
            "times_the_first": Spread.of(r[n]["images_per_s"] / r[first]["images_per_s"] for r in rounds),
            "numbers_ms": Spread.of(r[n]["numbers_ms"] for r in rounds) if n > 1 else None,
            "gradient_ms": Spread.of(r[n]["gradient_ms"] for r in rounds) if n > 1 else None,
        }
        figures.append({**found, "loss": rounds[0][n]["loss"]})
    header = ["processes", "threads each", "images/s", f"times that of {first}", "numbers, ms", "gradient, ms", "loss"]
    print(table(header, [list(of.values()) for of in figures]))
    print_json(
        "training", busy_cores_before=busy, batch_size=args.batch_size, steps=args.steps, compiled=args.compile,
        gpus=torch.cuda.device_count() if args.device != "cpu" else 0,
        figures=[{k: v.json(4) if isinstance(v, Spread) else v for k, v in of.items()} for of in figures],
    )  # fmt: skip


if __name__ == "__main__":
    main()
