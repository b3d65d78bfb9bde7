"""Fits learned plans to a model: `python -m ddpm_core.fit_plans --help`. Writes <model>/learned.json (learned.py).

A plan is kept as soon as it is fitted, beside those of other lengths that are there.

No data set is needed: the plans are held to what the network itself draws with many steps.
"""

from __future__ import annotations

import argparse
import functools
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_core import checkpoint, learned, plans, samplers, sampling, spacings
from ddpm_core.checkpoint import Model
from ddpm_core.network import Network, pick_device
from ddpm_core.parallel import one_process
from ddpm_core.plans import SamplingPlan

PROG = "python -m ddpm_core.fit_plans"

FIRST_SEED = 2**40  # far from those that people and evaluations use


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").split("\n")[0])
    p.add_argument("--model", type=Path, default=Path("weights/mnist"), help="default: %(default)s")
    p.add_argument("--steps", type=int, nargs="+", default=[3, 5, 8], help="of each plan (default: 3 5 8)")
    p.add_argument("--teacher-steps", type=int, default=60, help="of UniPC, whose images are wanted (default: 60)")
    p.add_argument("--images", type=int, default=256, help="to fit on, and as many to check on (default: 256)")
    p.add_argument("--iterations", type=int, default=10, help="of the fit (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return p


def draw(model: Model, network: Network, device: torch.device, seeds: range, plan: SamplingPlan) -> Tensor:
    """Images of a plan, (N, C, H, W) in [-1, 1], on the CPU; labels in turn, "no label" one of them if there is one."""
    x = sampling.draw_noise(seeds, 0, torch.empty(0, *model.config.image_shape, device=device))
    embedded = model.config.num_class_embeds
    labels = torch.arange(len(seeds), device=device) % embedded if embedded else None
    *_, last = sampling.sample(model.denoiser(network), plan, x, seeds, labels=labels)
    return last.x.cpu()


def run(args: argparse.Namespace) -> None:
    """Raises ValueError or OSError where it cannot."""
    most = args.teacher_steps - 1
    if args.images < 1 or args.iterations < 1 or not all(2 <= steps <= most for steps in args.steps):
        raise ValueError(f"images and iterations must be 1 or more, and steps 2 .. {most}, fewer than the teacher's")
    device = pick_device(args.device)
    model = checkpoint.load_model(args.model)
    if model.distilled_steps is not None:
        raise ValueError(
            f"{args.model} is distilled for ddim with {model.distilled_steps} steps: no other plan fits it"
        )
    network = model.network(device)
    fit_seeds = range(FIRST_SEED, FIRST_SEED + args.images)
    check_seeds = range(fit_seeds.stop, fit_seeds.stop + args.images)
    draw_fit, draw_check = (functools.partial(draw, model, network, device, s) for s in (fit_seeds, check_seeds))
    teacher = samplers.build(model.schedule, "unipc", args.teacher_steps, spacing="log_snr")
    wanted, wanted_check = draw_fit(teacher), draw_check(teacher)

    def check(plan: SamplingPlan) -> float:
        return float((draw_check(plan) - wanted_check).flatten(1).square().mean(1).sqrt().mean())

    path = args.model / learned.PLANS_NAME
    found = dict(model.learned)  # of other lengths: they stay
    known = checkpoint.read_json(path).get("fit", {}) if found else {}
    facts: dict[str, Any] = {str(steps): known.get(str(steps)) for steps in found}
    options = {"teacher_steps": args.teacher_steps, "images": args.images, "iterations": args.iterations}
    for steps in args.steps:
        start = spacings.timesteps(model.schedule, steps, "trailing")
        form = learned.Form(plans.dpmpp_2m, model.schedule, start)
        with tqdm(total=args.iterations, desc=f"{steps} steps, {form.size} numbers", mininterval=0.5) as bar:
            for step in learned.fit(form, draw_fit, wanted, args.iterations):
                bar.update(step.iteration - bar.n)
                bar.set_postfix_str(f"difference {step.error:.4f}")
        found[steps] = step.plan
        start_plan = form.plan(np.zeros(form.size))
        facts[str(steps)] = {**options, "difference": check(step.plan), "difference_of_start": check(start_plan)}
        print(f"{steps} steps: {facts[str(steps)]} on {args.images} images that it was not fitted to", flush=True)
        checkpoint.write_atomically(path, checkpoint.to_json(learned.to_json(found, model.sha256, facts)))
    print(f"wrote {path}")
    print(json.dumps(facts))


@one_process
def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    args = build_parser(prog).parse_args(argv)
    try:
        run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, FloatingPointError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
