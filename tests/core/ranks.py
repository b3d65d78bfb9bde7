"""What test_parallel.py holds two processes to: `torchrun -m tests.core.ranks FOLDER`, or facts() in one process.

Each rank's facts go into <FOLDER>/facts.json. The command lines of COMMANDS are carried out as well; what a rank says
in one goes into <FOLDER>/<name>.<rank>.
"""

from __future__ import annotations

import dataclasses
import hashlib
import itertools
import json
import math
import os
import signal
import sys
from collections.abc import Callable, Iterable
from contextlib import redirect_stderr, redirect_stdout
from inspect import unwrap
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from ddpm_core import data, evaluate, likelihood, sampling, sweep, train, training, trajectories
from ddpm_core.losses import DenoisingLoss
from ddpm_core.parallel import Ranks, Told, joined
from ddpm_core.recipe import Recipe
from ddpm_core.schedules import cosine
from ddpm_core.training import Objective, Predict, Trainer
from ddpm_core.trajectories import Chains, TrajectoryLoss
from ddpm_core.unet import UNet
from tests.networks import DIGITS, eight

CPU = torch.device("cpu")
ALL = Recipe(
    steps=25, batch_size=16, lr=2e-3, warmup_steps=5, decay=0.5, timesteps="stratified", min_snr_gamma=5.0,
    label_drop=0.3, guidance_scale=2.0, flip=True, shift=1,
)  # fmt: skip
RECIPES = {"adamw": ALL, "muon": dataclasses.replace(ALL, optimizer="muon")}

HARDWARE = ["--device", "cpu", "--no-compile", "--no-bf16"]
TRAINING = [
    "--data", "digits", "--channels", "8", "16", *HARDWARE, "--recipe", "fast", "--batch-size", "16",
    "--warmup-steps", "3", "--dropout", "0.1", "--steps", "40",
]  # fmt: skip
MEASURED = ["--data", "digits", "--samples", "300", "--device", "cpu"]


train_main = unwrap(train.main)


def interrupted(ranks: Ranks, arguments: list[str]) -> int:
    """train.main(), in the seventh step of which rank 1 alone gets a SIGINT."""
    call = DenoisingLoss.__call__

    def strike(loss: DenoisingLoss, predict: Predict, step: int) -> Tensor:
        if step == 6 and loss.rows.start:
            os.kill(os.getpid(), signal.SIGINT)
        return call(loss, predict, step)

    DenoisingLoss.__call__ = strike
    try:
        return train_main(ranks, arguments)
    finally:
        DenoisingLoss.__call__ = call


COMMANDS: dict[
    str, tuple[Callable[[Ranks, list[str]], int], list[str], int]
] = {  # by name: main(), arguments, exit code
    "train": (train_main, [*TRAINING, "--out", "whole"], 0),
    "interrupted": (interrupted, [*TRAINING, "--out", "halved"], 130),
    "resumed": (train_main, ["--out", "halved", "--resume", "--device", "cpu"], 0),
    "uneven": (train_main, [*TRAINING, "--out", "none", "--batch-size", "15"], 2),
    "unknown": (train_main, ["--colour"], 2),
    "evaluate": (
        unwrap(evaluate.main),
        ["--model", "weights/tiny", *MEASURED, "--sampler", "fast", "--repeats", "1"],
        0,
    ),
    "sweep": (unwrap(sweep.main), ["--model", "weights/two", *MEASURED, "--samplers", "ddim", "--nfe", "2", "3"], 0),
}


def digest(tensors: Iterable[Tensor]) -> str:
    return hashlib.sha256(b"".join(t.detach().contiguous().numpy().tobytes() for t in tensors)).hexdigest()


def trainer_of(recipe: Recipe, ranks: Ranks) -> Trainer:
    images = data.load("digits", Path(), train=True)
    torch.manual_seed(ranks.rank)  # rank 0's weights are to be everybody's
    net = UNet(dataclasses.replace(DIGITS, sample_size=8))
    loss = DenoisingLoss(images, cosine(100), "v_prediction", recipe, null_label=10, device=CPU, ranks=ranks)
    return Trainer(net, loss, recipe, device=CPU, ranks=ranks)


def course(trainer: Trainer) -> dict[str, Any]:
    steps = [(s.loss, s.grad_norm, s.lr) for s in trainer.train()]
    return {
        "steps": steps, "weights": digest(trainer.net.state_dict().values()), "averaged": len(trainer.ema.weights),
    }  # fmt: skip


def spoiled(ranks: Ranks) -> dict[str, Any]:
    """The loss of the last rank is NaN in step 3 of 6."""
    trainer = trainer_of(dataclasses.replace(ALL, steps=6), ranks)
    objective: Objective = trainer.objective

    def spoil(predict: Predict, step: int) -> Tensor:
        bad = step == 2 and ranks.rank == ranks.world - 1
        return objective(predict, step) * (math.nan if bad else 1)

    trainer.objective = spoil
    return {**course(trainer), "skipped": trainer.skipped}


def stopped(ranks: Ranks) -> int:
    """The last rank is told to stop after step 3: the step after which each does."""
    trainer = trainer_of(ALL, ranks)
    for stats in trainer.train():
        trainer.stop = trainer.stop or (stats.step == 3 and ranks.rank == ranks.world - 1)
        if trainer.stopping:
            break
    return trainer.step


def budgeted(ranks: Ranks) -> dict[str, Any]:
    """Clocks of which rank 0's says that a step takes a tenth of the time there is, and every other's a third."""
    clock = itertools.count(step=3 if ranks.rank else 1)
    real, training.time = training.time, SimpleNamespace(monotonic=lambda: next(clock) / 10)
    try:
        trainer = trainer_of(dataclasses.replace(ALL, steps=0, time_budget_s=0.95), ranks)
        return {**course(trainer), "elapsed_s": trainer.elapsed_s}
    finally:
        training.time = real


def drawn(ranks: Ranks) -> dict[str, Any]:
    """Nine images in batches of two: three rounds of two ranks, the last of one image."""
    model, shares = eight(), list[int]()
    images = sampling.generate(
        model, CPU, range(5, 14), [*range(8), None], sampler="ddpm", steps=4, guidance_scale=2.0,
        batch_size=2, on_batch=shares.append, ranks=ranks,
    )  # fmt: skip
    real = data.load("digits", Path(), train=False)
    bound = likelihood.bits_per_dimension(model, CPU, real.images[:9], real.labels[:9], batch_size=2, ranks=ranks)
    return {"images": images.tolist(), "finished": sum(shares), "bound": dataclasses.asdict(bound)}


def distilled(ranks: Ranks, folder: Path) -> dict[str, Any]:
    model, which, counted = eight(), Chains(18, 2, 4), list[int]()
    chains = trajectories.draw(model, model.network(CPU), CPU, which, folder, counted.append, ranks)
    recipe = Recipe(steps=8, batch_size=8, lr=1e-3, warmup_steps=0, optimizer="muon")
    student, _ = which.plans(model.schedule)
    loss = TrajectoryLoss(
        chains, trajectories.labels_of(model, range(18)), student, "v_prediction", recipe, device=CPU, ranks=ranks
    )
    net = UNet(model.config)
    net.load_state_dict(model.net.state_dict())
    trainer = Trainer(net, loss, recipe, device=CPU, ranks=ranks)
    return {"chains": digest([chains]), "counted": sum(counted), **course(trainer)}


def agreements(ranks: Ranks, folder: Path) -> dict[str, Any]:
    def fail() -> None:
        raise ValueError(f"no  such\nfile on {ranks.rank}" if ranks.rank else "elsewhere")

    def told(work: Callable[[], object]) -> str:
        try:
            work()
        except Told as error:
            return str(error)
        return "nothing"

    def everywhere() -> None:
        raise OSError("a full disk")

    def fetch() -> bool:
        found = (folder / "fetched").exists()
        (folder / "fetched").touch()
        return found

    return {
        "found": ranks.hosts_first(fetch),
        "one": told(lambda: ranks.agree(fail if ranks.rank == ranks.world - 1 else lambda: None)),
        "all": told(lambda: ranks.agree(everywhere)),
        "other": told(lambda: ranks.same(lambda: ranks.rank)),
        "none": told(lambda: ranks.same(lambda: 7)),
    }


def facts(ranks: Ranks, folder: Path) -> dict[str, Any]:
    """What a rank finds. The files go into `folder`."""
    trajectories.FILE_CHAINS = 4
    return {
        "courses": {name: course(trainer_of(recipe, ranks)) for name, recipe in RECIPES.items()},
        "spoiled": spoiled(ranks),
        "stopped": stopped(ranks),
        "budgeted": budgeted(ranks),
        "drawn": drawn(ranks),
        "distilled": distilled(ranks, folder / "chains"),
    }


def carry_out(name: str, ranks: Ranks) -> int:
    """Less the joining and the end of the process, which are had once."""
    main, arguments, _ = COMMANDS[name]
    with open(f"{name}.{ranks.rank}", "w") as file, redirect_stdout(file), redirect_stderr(file), ranks.quiet():
        try:
            return main(ranks, arguments)
        except SystemExit as error:
            return int(error.code or 0)


@joined
def main(ranks: Ranks, folder: Path) -> int:
    os.chdir(folder)
    found = ranks.gather({**facts(ranks, folder), **agreements(ranks, folder)})
    if ranks.rank == 0:
        Path("facts.json").write_text(json.dumps(found))
    for name, (*_, code) in COMMANDS.items():
        assert carry_out(name, ranks) == code, name
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
