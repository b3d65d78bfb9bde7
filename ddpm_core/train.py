"""Offline training: `python -m ddpm_core.train --help`. Writes a run directory (runs.py), to be resumed and served.

By several processes at once, each on a part of every batch: `torchrun --nproc-per-node 8 -m ddpm_core.train ...`.
"""

from __future__ import annotations

import sys

import torch

from ddpm_core import checkpoint, train_options, training_loop
from ddpm_core.losses import DenoisingLoss
from ddpm_core.parallel import Ranks, joined
from ddpm_core.runs import Run, RunDirectory
from ddpm_core.training import Trainer
from ddpm_core.unet import UNet


@joined
def main(ranks: Ranks, argv: list[str] | None = None, prog: str = train_options.PROG) -> int:
    args = ranks.parse(train_options.build_parser(prog), argv)
    directory = RunDirectory(args.out)

    def begin() -> tuple[Run, UNet, DenoisingLoss, str]:
        device = ranks.device(args.device)
        run, images = train_options.old_run(args, directory) if args.resume else train_options.new_run(args)
        torch.manual_seed(run.recipe.seed)  # the initial weights
        net = checkpoint.load_model(args.init).net.requires_grad_() if "init" in args else UNet(run.unet)
        objective = DenoisingLoss(
            images, run.scheduler.schedule(), run.scheduler.prediction_type, run.recipe,
            null_label=run.unet.null_label, device=device, ranks=ranks,
        )  # fmt: skip
        names = ", ".join(f"{label}: {name}" for label, name in enumerate(images.class_names))
        on_what = (
            f"data   {run.data}: {len(images.images):,} images {tuple(images.images.shape[1:])}, "
            f"{images.num_classes or 'no'} classes{f' ({names})' if names else ''}"
        )
        return run, net, objective, on_what

    def prepare() -> tuple[Run, Trainer, str]:
        run, net, objective, on_what = (ranks.hosts_first if args.download else ranks.agree)(begin)
        trainer = Trainer(
            net, objective, run.recipe,
            device=objective.device, compile_net=run.compile, bf16=run.bf16, ranks=ranks,
        )  # fmt: skip
        return run, trainer, on_what

    return training_loop.carry_out(
        prepare, directory, "ddpm_core.train", ranks, resume=args.resume, save_every=args.save_every
    )


if __name__ == "__main__":
    sys.exit(main())
