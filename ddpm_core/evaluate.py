"""Measures a model and writes its card: `python -m ddpm_core.evaluate --help`.

Prints a table and, as the last line, one JSON object. With --card it writes beside the weights

    <model>/card.json    every figure with its number of images, the floor, hashes, hardware, command
    <model>/README.md    the model card, made from card.json alone
    <model>/samples.png  one row a class

By several processes (`torchrun --nproc-per-node 8 -m ddpm_core.evaluate ...`) each draws a share of the images.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import platform
import shlex
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ddpm_core import card, checkpoint, classifier, data, data_arguments, evaluation, record, sampling
from ddpm_core.checkpoint import Model
from ddpm_core.classifier import LoadedClassifier
from ddpm_core.evaluation import Evaluation, Figure
from ddpm_core.likelihood import Bound
from ddpm_core.parallel import EXPECTED, Ranks, joined
from ddpm_core.protocols import Protocol, assist

PROG = "python -m ddpm_core.evaluate"

MIN_SAMPLES = 100  # below, FID says nothing and the class balance less


def build_parser(prog: str = PROG) -> argparse.ArgumentParser:
    defaults = Protocol()
    p = argparse.ArgumentParser(prog=prog, description=(__doc__ or "").split("\n")[0])
    p.add_argument("--model", type=Path, default=Path("weights/mnist"), help="default: %(default)s")
    p.add_argument("--classifier", type=Path, help="the feature space (default: weights/<data>-classifier)")
    data_arguments.add_data_arguments(p)
    p.set_defaults(**data_arguments.DEFAULTS)
    p.add_argument("--samples", type=int, default=defaults.samples, help="images a repeat (default: %(default)s)")
    p.add_argument(
        "--repeats",
        type=int,
        default=defaults.repeats,
        help="sets of samples, each of other seeds (default: %(default)s)",
    )
    p.add_argument("--sampler", default=defaults.sampler, help="sampler or preset (default: %(default)s)")
    p.add_argument("--steps", type=int, help="of the sampler (default: its own)")
    p.add_argument("--guidance-scale", type=float, default=defaults.guidance_scale, help="1: none (default)")
    p.add_argument("--seed", type=int, default=defaults.seed, help="of the first image (default: %(default)s)")
    p.add_argument("--device", default="auto", help="auto, cpu, cuda, cuda:1, ... (default: auto)")
    p.add_argument("--card", action="store_true", help="write card.json, README.md and samples.png into --model")
    return p


def command_of(args: argparse.Namespace) -> str:
    """The command line that gives these figures again, less where the data set lies."""
    words = ["python", "-m", "ddpm_core.evaluate", "--model", args.model.as_posix()]
    words += ["--classifier", args.classifier.as_posix(), *data_arguments.words(vars(args))]
    words += ["--samples", str(args.samples), "--repeats", str(args.repeats)]
    words += ["--sampler", args.sampler]
    words += [] if args.steps is None else ["--steps", str(args.steps)]
    words += ["--guidance-scale", f"{args.guidance_scale:g}", "--seed", str(args.seed), "--device", args.device]
    return shlex.join(words + ["--card"] * args.card)


def hardware(device: torch.device, processes: int = 1) -> str:
    """What the figures were computed on: the processor's name, and the number of threads where it is the CPU."""
    several = f", {processes} processes" if processes > 1 else ""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda{several})"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({device.type}, {torch.get_num_threads()} threads{several})"


def entries(figures: Mapping[str, Figure], counted: str) -> dict[str, Any]:
    """Figures as JSON; counted names what makes one set differ from another."""
    return {
        name: {"value": figure.value, "spread": figure.spread, counted: figure.sets, "samples": figure.samples}
        for name, figure in figures.items()
    }


def bits(bound: Bound | None) -> dict[str, Any]:
    """A likelihood bound as JSON, where there is one."""
    return {} if bound is None else {"bits_per_dimension": dataclasses.asdict(bound)}


def report(model: Model, classifier_sha256: str, args: argparse.Namespace, evaluated: Evaluation) -> dict[str, Any]:
    """The figures as one JSON object: each in an entry that holds its number of images."""
    plan = model.plan(args.sampler, args.steps)
    parameters = sum(p.numel() for p in model.net.parameters())
    return {
        "model": {
            "name": model.name,
            "path": args.model.as_posix(),
            "sha256": model.sha256,
            "parameters": parameters,
            "image_shape": list(model.config.image_shape),
            "classes": model.num_classes,
            "needs_label": model.needs_label,
            "train_steps": model.schedule.num_train_steps,
            "prediction_type": model.scheduler.prediction_type,
            "beta_schedule": model.scheduler.beta_schedule,
            "distilled_steps": model.distilled_steps,
        },
        "data": args.data,
        "classifier_sha256": classifier_sha256,
        "sampling": {
            "sampler": args.sampler,
            "method": plan.sampler,
            "steps": len(plan),
            "nfe": evaluated.nfe,
            "guidance_scale": args.guidance_scale,
            "seed": args.seed,
        },
        "reference": {"train_images": evaluated.train_images, "test_images": evaluated.test_images},
        "metrics": {
            **entries(evaluated.generated, "seeds"),
            "fid_over_floor": {"value": evaluated.fid_over_floor, "samples": evaluated.generated["fid"].samples},
            **bits(evaluated.test_bound),
            "class_balance": dataclasses.asdict(evaluated.balance),
        },
        "floor": {
            **entries(evaluated.floor, "sets"),
            **bits(evaluated.train_bound),
        },
    }


def read(
    args: argparse.Namespace, ranks: Ranks
) -> tuple[Protocol, Model, LoadedClassifier, torch.device, data.ImageSet, data.ImageSet, dict[str, Any]]:
    """What is measured, by what, where, and how it was trained."""
    args.classifier = data_arguments.classifier_of(vars(args), args.classifier, "--classifier")
    protocol = Protocol(args.samples, args.sampler, args.steps, args.guidance_scale, args.seed, args.repeats)
    if protocol.samples < MIN_SAMPLES:
        raise ValueError(f"--samples {protocol.samples} is too few to measure anything: {MIN_SAMPLES} or more")
    model = checkpoint.load_model(args.model)
    loaded = classifier.load(args.classifier)
    device = ranks.device(args.device)
    train, test = (data_arguments.load(vars(args), train=part) for part in (True, False))
    return protocol, model, loaded, device, train, test, record.training_record(args.model)


def run(args: argparse.Namespace, ranks: Ranks) -> None:
    """Evaluates and prints. Raises ValueError or OSError where something asked for is not there or does not fit."""
    load = ranks.hosts_first if args.download else ranks.agree
    protocol, model, loaded, device, train, test, training = load(lambda: read(args, ranks))
    ranks.same(lambda: (protocol, model.sha256, train.facts(), test.facts()))
    if ranks.rank:
        assist(model, train, test, protocol, device, ranks)
        return
    start = time.monotonic()
    bounded = (
        0 if model.distilled_steps else sum(min(protocol.bound_images, len(part.images)) for part in (train, test))
    )
    total = protocol.repeats * (protocol.samples + protocol.unlabelled) + bounded
    with tqdm(total=total, unit="image", mininterval=0.5, delay=0.5) as bar:
        evaluated = evaluation.evaluate(model, loaded.net.to(device), train, test, protocol, device, bar.update, ranks)
    figures = {
        **report(model, loaded.sha256, args, evaluated),
        "hardware": hardware(device, ranks.world),
        "seconds": round(time.monotonic() - start, 1),
        "command": command_of(args),
        "training": training,
    }
    if args.card:
        card.write(args.model, figures, *sampling.one_row_a_class(model, device, **protocol.how))
    print(f"{model.name}, sha256 {model.sha256}\n\n{card.results_table(figures)}\n")
    print("\n".join(card.notes(figures)))
    if args.card:
        print(f"wrote card.json, README.md and samples.png into {args.model}")
    print(json.dumps(figures, allow_nan=False))


@joined
def main(ranks: Ranks, argv: list[str] | None = None, prog: str = PROG) -> int:
    args = ranks.parse(build_parser(prog), argv)
    try:
        run(args, ranks)
    except KeyboardInterrupt:
        return 130
    except (*EXPECTED, RuntimeError) as error:
        return ranks.refuse(error)
    return 0


if __name__ == "__main__":
    sys.exit(main())
