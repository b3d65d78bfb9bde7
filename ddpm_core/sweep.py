"""Measures FID against network calls for every sampler: `python -m ddpm_core.sweep --help`.

Every point has the same seeds and labels. The cheap ones come first, and each is kept as soon as it is measured: a
sweep that was stopped goes on where it was. A learned plan that was fitted anew is measured anew.
It leaves in the model directory

    <model>/sweep.json   every point with its figures, and the floor
    <model>/fid_nfe.png  FID over NFE, a line a sampler
    <model>/README.md    with both, where there is a card.json

By several processes (`torchrun --nproc-per-node 8 -m ddpm_core.sweep ...`) each draws a share of the images.
"""

from __future__ import annotations

import argparse
import dataclasses
import shlex
import sys
import typing
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from ddpm_core import (
    card,
    checkpoint,
    classifier,
    data,
    data_arguments,
    evaluation,
    pictures,
    samplers,
    sampling,
)  # fmt: skip
from ddpm_core.checkpoint import Model
from ddpm_core.classifier import Classifier
from ddpm_core.evaluate import MIN_SAMPLES
from ddpm_core.noise import MAX_SEED
from ddpm_core.parallel import EXPECTED, Ranks, joined
from ddpm_core.plans import SamplingPlan
from ddpm_core.protocols import asked_labels
from ddpm_core.spacings import Spacing

PROG = "python -m ddpm_core.sweep"

LINES = {**{name: (name, 0.0) for name in (*samplers.SAMPLERS, samplers.LEARNED)}, "ddim eta 0.5": ("ddim", 0.5)}
"""What can be swept, by name: a sampler and its eta. (ddim with eta 1 is ddpm.)"""
NFE = (3, 5, 8, 10, 20, 50, 1000)


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    p = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").split("\n")[0])
    p.add_argument("--model", type=Path, default=Path("weights/mnist"), help="default: %(default)s")
    p.add_argument("--classifier", type=Path, help="the feature space (default: weights/<data>-classifier)")
    data_arguments.add_data_arguments(p)
    p.set_defaults(**data_arguments.DEFAULTS)
    p.add_argument("--samplers", nargs="+", choices=LINES, default=list(LINES), help="default: all")
    p.add_argument("--nfe", nargs="+", type=int, default=NFE, help=f"default: {' '.join(map(str, NFE))}")
    p.add_argument("--max-nfe", type=int, help="leave out what takes more (default: T of the model)")
    p.add_argument("--samples", type=int, default=2000, help="images a point (default: %(default)s)")
    p.add_argument(
        "--spacing",
        choices=typing.get_args(Spacing),
        help="of the timesteps (default: as the model's scheduler has it)",
    )
    p.add_argument("--seed", type=int, default=0, help="of the first image (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    return p


def command_of(args: argparse.Namespace) -> str:
    """The command line that measures the same images, less which points and where the data set lies."""
    words = ["python", "-m", "ddpm_core.sweep", "--model", args.model.as_posix()]
    words += ["--classifier", args.classifier.as_posix(), *data_arguments.words(vars(args))]
    return shlex.join([*words, "--samples", str(args.samples), "--seed", str(args.seed)])


@dataclasses.dataclass(frozen=True)
class Point:
    """What is measured at one place of a sweep."""

    sampler: str
    eta: float
    nfe: int
    spacing: Spacing

    def plan(self, model: Model) -> SamplingPlan:
        """Raises ValueError where the model's schedule does not allow it."""
        return samplers.build(
            model.schedule, self.sampler, self.nfe,
            eta=self.eta, variance=model.scheduler.variance_type,
            spacing=self.spacing, offset=model.scheduler.steps_offset, learned=model.learned,
        )  # fmt: skip


def points(args: argparse.Namespace, model: Model) -> list[Point]:
    """What a command line asks for, the cheapest first. A learned plan has timesteps of its own, and a few lengths."""
    total = model.schedule.num_train_steps
    asked: Spacing = args.spacing or model.scheduler.timestep_spacing
    return [
        Point(sampler, eta, nfe, "trailing" if sampler == samplers.LEARNED else asked)
        for nfe in sorted(set(args.nfe))
        if nfe <= (args.max_nfe or total)
        for sampler, eta in (LINES[line] for line in args.samplers)
        if sampler != samplers.LEARNED or nfe in model.learned
    ]


class Sweep:
    """sweep.json: what every point has in common, and the points so far.

    Raises:
        ValueError: the file's points are of other weights, another classifier, other data, or another number or seed of
            images.
    """

    def __init__(self, path: Path, common: dict[str, Any], command: str) -> None:
        self.path = path
        self.content = checkpoint.read_json(path) if path.is_file() else {}
        stale = any(self.content.get(name) != value for name, value in common.items())
        if stale and not self.content.get("points"):
            self.content = {**common, "floor": None, "points": []}
        self.content["command"] = command
        for name, value in common.items():
            if self.content.get(name) != value:
                raise ValueError(
                    f"{path} was measured with {name} {self.content.get(name)}, this sweep has {value}: "
                    "move the file away to begin a new one"
                )

    def has(self, point: Point, plan: SamplingPlan) -> bool:
        wanted = {**dataclasses.asdict(point), "plan_sha256": plan.sha256}.items()
        return any(wanted <= measured.items() for measured in self.content["points"])

    def keep(self, point: Point, plan: SamplingPlan, figures: dict[str, float]) -> None:
        """In the place of what was measured there with another plan."""
        place = dataclasses.asdict(point)
        others = [measured for measured in self.content["points"] if not place.items() <= measured.items()]
        self.content["points"] = [*others, {**place, "plan_sha256": plan.sha256, **figures}]
        self.save()

    def save(self) -> None:
        checkpoint.write_atomically(self.path, checkpoint.to_json(self.content))

    def draw(self, path: Path) -> None:
        """Writes the picture."""
        lines = defaultdict[str, list[tuple[int, float]]](list)
        for point in sorted(self.content["points"], key=lambda p: p["nfe"]):
            lines[card.line_of(point)].append((point["nfe"], point["fid"]))
        samples, floor = self.content["samples"], self.content["floor"]["fid"]["value"]
        picture = pictures.fid_curves_png(lines, floor, f"FID of {samples:,} images")
        checkpoint.write_atomically(path, picture)


def measure(
    model: Model,
    net: Classifier,
    train: data.ImageSet,
    test: data.ImageSet,
    sweep: Sweep,
    missing: Sequence[tuple[Point, SamplingPlan]],
    device: torch.device,
    ranks: Ranks,
) -> None:
    """Measures points and keeps each of them in the sweep, after the floor; ranks other than 0 only draw."""
    samples, seed = sweep.content["samples"], sweep.content["seed"]
    labels = asked_labels(model, train, samples, seed)

    def draw(plan: SamplingPlan, on_batch: sampling.OnBatch | None = None) -> Tensor:
        seeds = range(seed, seed + samples)
        return sampling.generate(model, device, seeds, labels, plan=plan, on_batch=on_batch, ranks=ranks)

    if ranks.rank:
        for _, plan in missing:
            draw(plan)
        return
    reference_features, _ = evaluation.features(net, test.images)
    if sweep.content["floor"] is None:
        found = evaluation.floor(net, train, samples, seed, reference_features)
        sweep.content["floor"] = {name: dataclasses.asdict(figure) for name, figure in found.items()}
        sweep.save()
    with tqdm(
        total=samples * sum(len(plan) for _, plan in missing), unit="call", unit_scale=True, mininterval=0.5, delay=0.5
    ) as bar:

        def counting(calls: int) -> sampling.OnBatch:
            return lambda images: bar.update(images * calls)

        for point, plan in missing:
            bar.set_description(f"{card.line_of(dataclasses.asdict(point))}, {point.nfe} NFE")
            images = draw(plan, counting(len(plan)))
            sweep.keep(point, plan, evaluation.quality(net, images, labels, reference_features))


def read(
    args: argparse.Namespace, ranks: Ranks
) -> tuple[Model, Classifier, data.ImageSet, data.ImageSet, Sweep, list[tuple[Point, SamplingPlan]], torch.device]:
    """What measure() needs, the points all that were asked for.

    Raises:
        ValueError, OSError: something is not there or does not fit.
    """
    args.classifier = data_arguments.classifier_of(vars(args), args.classifier, "--classifier")
    if args.samples < MIN_SAMPLES:
        raise ValueError(f"--samples {args.samples} is too few to measure anything: {MIN_SAMPLES} or more")
    if min(args.nfe) < 1:
        raise ValueError(f"--nfe {min(args.nfe)} must be 1 or more")
    most = MAX_SEED - args.samples + 1
    if not 0 <= args.seed <= most:
        raise ValueError(f"--seed {args.seed} must be 0 .. {most}")
    model = checkpoint.load_model(args.model)
    if model.distilled_steps is not None:
        raise ValueError(f"{args.model} draws in one way alone: measure it with `python -m ddpm_core.evaluate`")
    loaded = classifier.load(args.classifier)
    device = ranks.device(args.device)
    net = loaded.net.to(device)
    train, test = (data_arguments.load(vars(args), train=part) for part in (True, False))
    evaluation.check_fit(model, net, test)
    wanted = points(args, model)
    if not wanted:
        raise ValueError(
            f"nothing to measure: no --nfe within --max-nfe and T, {model.schedule.num_train_steps}; "
            f"learned plans have {', '.join(map(str, sorted(model.learned))) or 'no'} steps here"
        )
    common = {
        "sha256": model.sha256, "classifier_sha256": loaded.sha256, "data": args.data,
        "data_sha256": [part.facts()["sha256"] for part in (train, test)],
        "samples": args.samples, "seed": args.seed,
    }  # fmt: skip
    sweep = Sweep(args.model / card.SWEEP, common, command_of(args))
    plans = []
    for point in wanted:
        try:
            plans.append((point, point.plan(model)))
        except ValueError as error:
            print(f"left out: {card.line_of(dataclasses.asdict(point))}, {point.nfe} NFE: {error}", file=sys.stderr)
    if not plans:
        raise ValueError("nothing to measure: this model allows none of the points")
    return model, net, train, test, sweep, plans, device


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Measures what is not there yet. Raises what read() raises."""
    load = ranks.hosts_first if args.download else ranks.agree
    model, net, train, test, sweep, plans, device = load(lambda: read(args, ranks))
    missing = [(point, plan) for point, plan in plans if not sweep.has(point, plan)]
    ranks.same(lambda: (sweep.content, [(point, plan.sha256) for point, plan in missing]))
    try:
        measure(model, net, train, test, sweep, missing, device, ranks)
    finally:
        if sweep.content["points"] and ranks.rank == 0:
            sweep.draw(args.model / card.SWEEP_PLOT)
            card.write_readme(args.model)
    print(card.sweep_table(sweep.content))


@joined
def main(ranks: Ranks, argv: list[str] | None = None, prog: str = PROG) -> int:
    args = ranks.parse(build_parser(prog), argv)
    try:
        run(args, ranks)
    except KeyboardInterrupt:
        kept = args.model / card.SWEEP
        print(f"stopped: the same command goes on; what is measured is in {kept}", file=sys.stderr)
        return 130
    except (*EXPECTED, RuntimeError) as error:
        return ranks.refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
