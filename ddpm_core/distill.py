"""Distills a model into one of few network calls: `python -m ddpm_core.distill --help`. Writes a run directory.

The student begins with the teacher's weights and is trained for DDIM with few steps (trajectories.py). The config of
its scheduler says so, and the service draws with it in no other way. No data set is needed: it learns from what the
teacher makes of noise. The chains are drawn first, into <out>/chains, where the same command finds them when it is
stopped before its first checkpoint, and --resume after that.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ddpm_core import checkpoint, record, run_options, training_loop, trajectories
from ddpm_core.checkpoint import Model
from ddpm_core.parallel import Ranks, joined
from ddpm_core.runs import DistillationRun, Run, RunDirectory
from ddpm_core.training import Trainer
from ddpm_core.trajectories import Chains, TrajectoryLoss
from ddpm_core.unet import UNet

PROG = "python -m ddpm_core.distill"

RECIPE: dict[str, Any] = {
    "batch_size": 64, "optimizer": "muon", "lr": 1e-3, "warmup_steps": 50, "decay": 1.0, "adam_betas": (0.9, 0.99),
    "ema_decay": 0.9995,
}  # fmt: skip
EPOCHS = 10


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(
        prog=prog,
        description="Train a student of few network calls from a model. Ctrl-C saves and says how to resume.",
        argument_default=argparse.SUPPRESS,
    )
    run_options.add_run_arguments(p.add_argument_group("run"), Path("runs/student"))
    what = p.add_argument_group("what is learned")
    what.add_argument("--model", type=Path, help="the teacher's directory (default: weights/mnist)")
    what.add_argument("--nfe", type=int, help=f"network calls of the student (default: {Chains.nfe})")
    what.add_argument("--teacher-nfe", type=int, help=f"of the teacher (default: {Chains.teacher_nfe})")
    what.add_argument("--chains", type=int, help=f"of the teacher to learn from (default: {Chains.chains})")
    how = p.add_argument_group("recipe")
    run_options.add_recipe_arguments(how, (n for n in trajectories.OF_RECIPE if n not in ("steps", "time_budget_s")))
    return p


def new_run(args: argparse.Namespace) -> tuple[DistillationRun, Model]:
    """The run that a command line asks for, and its teacher."""
    chains = Chains(**{f.name: getattr(args, f.name) for f in dataclasses.fields(Chains) if f.name in args})
    path = getattr(args, "model", Path("weights/mnist"))
    teacher = checkpoint.load_model(path)
    if teacher.distilled_steps is not None:
        raise ValueError(f"{path} is a student itself: name a model that draws with many calls")
    if teacher.scheduler.prediction_type == "epsilon":
        raise ValueError(f"{path} predicts eps, which in pure noise says nothing of x_0: take a model that predicts v")
    chains.plans(teacher.schedule)
    run = DistillationRun(
        dataclasses.replace(teacher.config, dropout=0.0),
        # Nothing is clipped on the way, in training and in use alike: a clipped x_0_hat would have no gradient.
        dataclasses.replace(
            teacher.scheduler,
            clip_sample=False,
            thresholding=False,
            timestep_spacing="trailing",
            distilled_steps=chains.nfe,
        ),
        run_options.recipe_of({**RECIPE, **vars(args)}, chains.chains, EPOCHS),
        **run_options.hardware(args),
        started_from=record.origin(path, teacher),
        teacher=str(path),
        chains=chains,
    )
    return run, teacher


def old_run(args: argparse.Namespace, directory: RunDirectory) -> tuple[DistillationRun, Model]:
    """The run in a directory, with what a command line changes of it, and its teacher."""
    run = run_options.resumed(args, directory, DistillationRun, {"model"})
    run = dataclasses.replace(run, teacher=str(getattr(args, "model", run.teacher)))
    teacher = checkpoint.load_model(Path(run.teacher))
    if teacher.sha256 != run.started_from["sha256"]:
        raise ValueError(f"{run.teacher} is not the teacher that this run began with: name it with --model")
    return run, teacher


@joined
def main(ranks: Ranks, argv: list[str] | None = None, prog: str = PROG) -> int:
    args = ranks.parse(build_parser(prog), argv)
    directory = RunDirectory(args.out)

    def prepare() -> tuple[Run, Trainer, str]:
        device = ranks.agree(lambda: ranks.device(args.device))
        run, teacher = ranks.agree(lambda: old_run(args, directory) if args.resume else new_run(args))
        ranks.agree(lambda: ranks.share(run.recipe.batch_size))  # before the work: it may be refused
        which = run.chains
        with tqdm(total=which.chains, desc="the teacher's chains", unit="chain", mininterval=0.5, delay=0.5) as bar:
            network = teacher.network(device)
            chains = trajectories.draw(teacher, network, device, which, directory.path / "chains", bar.update, ranks)
        schedule = run.scheduler.schedule()
        objective = TrajectoryLoss(
            chains, trajectories.labels_of(teacher, range(which.chains)),
            which.plans(schedule)[0], run.scheduler.prediction_type, run.recipe, device=device, ranks=ranks,
        )  # fmt: skip
        net = UNet(run.unet)
        net.load_state_dict(teacher.net.state_dict())
        trainer = Trainer(
            net, objective, run.recipe, device=device, compile_net=run.compile, bf16=run.bf16, ranks=ranks
        )
        on_what = (
            f"data   {which.chains:,} chains of {run.teacher}, {which.teacher_nfe} calls each, "
            f"to be learned in {which.nfe}"
        )
        return run, trainer, on_what

    return training_loop.carry_out(
        prepare, directory, "ddpm_core.distill", ranks, resume=args.resume, save_every=args.save_every
    )


if __name__ == "__main__":
    sys.exit(main())
