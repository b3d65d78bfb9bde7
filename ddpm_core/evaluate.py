"""Measures a model and writes its card: `python -m ddpm_core.evaluate --help`.

Prints a table and, as the last line, one JSON object. With --card it writes beside the weights

    <model>/card.json    every figure with its number of images, the floor, hashes, hardware, command
    <model>/README.md    the model card, made from card.json alone
    <model>/samples.png  one row a class
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
from safetensors import SafetensorError
from torch import Tensor
from tqdm import tqdm

from ddpm_core import checkpoint, classifier, data, evaluation, pictures
from ddpm_core.checkpoint import Model
from ddpm_core.evaluation import Evaluation, Protocol
from ddpm_core.train import pick_device

MIN_SAMPLES = 100  # below, FID says nothing and the class balance less
COLUMNS = 10  # of samples.png
ELSEWHERE = ("data_root", "out", "resume")  # of training.json: where files lay on the machine that trained


def build_parser() -> argparse.ArgumentParser:
    defaults = Protocol()
    p = argparse.ArgumentParser(prog="python -m ddpm_core.evaluate", description=(__doc__ or "").split("\n")[0])
    p.add_argument("--model", type=Path, default=Path("weights/mnist"), help="default: %(default)s")
    p.add_argument("--classifier", type=Path, help="the feature space (default: weights/<data>-classifier)")
    p.add_argument("--data", choices=sorted(data.DATASETS), default="mnist", help="default: %(default)s")
    p.add_argument("--data-root", type=Path, default=Path("data"), help="torchvision's root (default: %(default)s)")
    p.add_argument("--download", action="store_true", help="fetch the data set where it is missing")
    p.add_argument("--samples", type=int, default=defaults.samples, help="images (default: %(default)s)")
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
    words += ["--classifier", args.classifier.as_posix(), "--data", args.data, "--samples", str(args.samples)]
    words += ["--sampler", args.sampler]
    words += [] if args.steps is None else ["--steps", str(args.steps)]
    words += ["--guidance-scale", f"{args.guidance_scale:g}", "--seed", str(args.seed), "--device", args.device]
    return shlex.join(words + ["--card"] * args.card)


def hardware(device: torch.device) -> str:
    """What the figures were computed on: the processor's name, and the number of threads where it is the CPU."""
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} (cuda)"
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    name = names[0] if names else platform.processor() or platform.machine()
    return f"{name} ({device.type}, {torch.get_num_threads()} threads)"


def report(model: Model, classifier_sha256: str, args: argparse.Namespace, evaluated: Evaluation) -> dict[str, Any]:
    """The figures as one JSON object: each in an entry that holds its number of images."""
    plan = model.plan(args.sampler, args.steps)
    parameters = sum(p.numel() for p in model.net.parameters())
    return {
        "model": {
            "name": model.name,
            "sha256": model.sha256,
            "parameters": parameters,
            "image_shape": list(model.config.image_shape),
            "classes": model.config.num_classes,
            "prediction_type": model.scheduler.prediction_type,
            "beta_schedule": model.scheduler.beta_schedule,
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
        "metrics": {
            **evaluated.generated.to_dict(),
            "fid_over_floor": {"value": evaluated.fid_over_floor, "samples": evaluated.generated.samples},
            "class_balance": dataclasses.asdict(evaluated.balance),
        },
        "floor": evaluated.floor.to_dict(),
    }


def _accuracy(entry: Mapping[str, Any]) -> str:
    return "-" if entry["value"] is None else f"{entry['value']:.4f}"


def results_table(card: Mapping[str, Any]) -> str:
    """The figures of a report, the floor beside them, as a Markdown table."""
    metrics, floor, sampling = card["metrics"], card["floor"], card["sampling"]
    rows = [
        ("images", "count", "FID", "label accuracy"),
        ("---", "---:", "---:", "---:"),
        (f"generated, {sampling['sampler']}, {sampling['nfe']} NFE", f"{metrics['fid']['samples']:,}",
         f"{metrics['fid']['value']:.3f}", _accuracy(metrics["label_accuracy"])),
        ("real training images (the floor)", f"{floor['fid']['samples']:,}",
         f"{floor['fid']['value']:.3f}", _accuracy(floor["label_accuracy"])),
    ]  # fmt: skip
    widths = [max(len(row[k]) for row in rows) for k in range(4)]
    return "\n".join(
        "| " + " | ".join(row[k].ljust(widths[k]) if k == 0 else row[k].rjust(widths[k]) for k in range(4)) + " |"
        for row in rows
    )


def notes(card: Mapping[str, Any]) -> list[str]:
    """What has to stand under the table for its figures to mean something."""
    metrics, sampling, balance = card["metrics"], card["sampling"], card["metrics"]["class_balance"]
    return [
        f"FID against the {metrics['fid']['reference_samples']:,} test images of {card['data']}, in the penultimate "
        f"layer of the classifier with sha256 {card['classifier_sha256']}: comparable only to figures of the same "
        f"classifier and count, never to Inception FID. Ratio to the floor: {metrics['fid_over_floor']['value']:.2f} "
        f"({metrics['fid_over_floor']['samples']:,} images).",
        f"Label accuracy: share of {metrics['label_accuracy']['samples']:,} images that the classifier reads as the "
        "label asked for.",
        f"Class balance of {balance['samples']:,} images drawn with no label: rarest class "
        f"{balance['rarest_share']:.1%}, commonest {balance['commonest_share']:.1%}, chi-square "
        f"{balance['chi_square']:.1f} with {balance['degrees_of_freedom']} degrees of freedom against the training "
        "set's shares.",
        f"Sampler {sampling['sampler']} ({sampling['method']}), {sampling['steps']} steps, {sampling['nfe']} network "
        f"calls an image, guidance scale {sampling['guidance_scale']:g}, seeds from {sampling['seed']}.",
    ]


def _flat(value: object, prefix: str = "") -> list[tuple[str, str]]:
    """('recipe.lr', '0.002') for every leaf of a JSON object."""
    if isinstance(value, dict):
        return [pair for k, v in value.items() for pair in _flat(v, f"{prefix}.{k}" if prefix else str(k))]
    return [(prefix, value if isinstance(value, str) else json.dumps(value))]


def model_card(card: Mapping[str, Any]) -> str:
    """README.md of a model directory, from its card.json and nothing else."""
    model, data_name = card["model"], card["data"]
    channels, height, width = model["image_shape"]
    classes, path = model["classes"], f"weights/{model['name']}"
    labels = f"torch.arange({classes})" if classes else "None"
    count = classes or 10
    asked = f"list(range({count}))" if classes else f"[None] * {count}"
    note = f'  # {classes} means "no label"' if classes else ""
    kind = f'class-conditional, {classes} classes and "no label"' if classes else "unconditional"
    training = "\n".join(f"- {key}: {value}" for key, value in _flat(card["training"]))
    return f"""\
---
license: mit
library_name: diffusers
pipeline_tag: unconditional-image-generation
tags:
- ddpm
- diffusion
- pytorch
- image-generation
- {data_name}
---

# {model["name"]}

A denoising diffusion probabilistic model (Ho et al. 2020) of the data set `{data_name}`: a U-Net of
{model["parameters"]:,} parameters for images of {channels} x {height} x {width}, {kind}, prediction type
`{model["prediction_type"]}`, noise schedule `{model["beta_schedule"]}`. Weights: safetensors, sha256
`{model["sha256"]}`.

![one row a class](samples.png)

## Use

With diffusers:

```python
import torch
from diffusers import DDPMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("{path}", subfolder="unet").eval()
scheduler = DDPMScheduler.from_pretrained("{path}", subfolder="scheduler")
scheduler.set_timesteps(100)
x, labels = torch.randn({count}, {channels}, {height}, {width}), {labels}{note}
with torch.inference_mode():
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
```

With this project:

```python
import torch
from pathlib import Path
from ddpm_core import checkpoint, evaluation

model = checkpoint.load_model(Path("{path}"))
images = evaluation.generate(model, torch.device("cpu"), range({count}), {asked}, "balanced")
```

`images` is uint8, ({count}, {channels}, {height}, {width}). To serve it over HTTP: `DDPM_MODEL={path} python -m app`.

## Results

{results_table(card)}

{chr(10).join(f"- {note}" for note in notes(card))}

Measured on {card["hardware"]} by

```
{card["command"]}
```

plus `--data-root` where the data set lies elsewhere. All figures, with their numbers of images, are in `card.json`.

## Training

{training or "Not recorded."}

## Limits and intended use

For teaching, tests and measurements of diffusion code. It draws what `{data_name}` shows, at {height} x {width} pixels,
and nothing else; some images are malformed or read as another class than the one asked for (1 - label accuracy). Do not
use its images as if they were real ones of the data set, nor train a classifier that matters on them.
"""


def samples_by_class(images: Tensor, classes: int) -> tuple[Tensor, int]:
    """The first images of each class, one row a class, and the number of columns; image i has class i % classes."""
    rows = classes or COLUMNS
    columns = min(COLUMNS, len(images) // rows)
    return torch.cat([images[row::rows][:columns] for row in range(rows)]), columns


def write_card(directory: Path, card: Mapping[str, Any], images: Tensor) -> None:
    """Writes card.json, README.md and samples.png into a model directory."""
    picture, columns = samples_by_class(images, card["model"]["classes"])
    pictures.save_samples(directory / "samples.png", data.to_unit(picture), columns)
    checkpoint.write_atomically(directory / "card.json", checkpoint.to_json(card))
    checkpoint.write_atomically(directory / "README.md", model_card(card).encode())


def load_classifier(directory: Path) -> classifier.LoadedClassifier:
    """classifier.load, with every way it can fail as a CheckpointError."""
    try:
        return classifier.load(directory)
    except KeyError as error:
        raise checkpoint.CheckpointError(f"{directory / 'card.json'} has no field {error}") from error
    except (RuntimeError, TypeError, SafetensorError) as error:
        raise checkpoint.CheckpointError(f"{directory}: the weights do not fit card.json: {error}") from error


def usable_device(name: str) -> torch.device:
    """pick_device, and a first allocation there. Raises ValueError where this machine has no such device."""
    try:
        device = pick_device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for the device
        raise ValueError(f"--device {name}: {str(error).splitlines()[0]}") from error
    return device


def run(args: argparse.Namespace) -> None:
    """Evaluates and prints. Raises ValueError or OSError where something asked for is not there or does not fit."""
    protocol = Protocol(args.samples, args.sampler, args.steps, args.guidance_scale, args.seed)
    if protocol.samples < MIN_SAMPLES:
        raise ValueError(f"--samples {protocol.samples} is too few to measure anything: {MIN_SAMPLES} or more")
    model = checkpoint.load_model(args.model)
    loaded = load_classifier(args.classifier)
    device = usable_device(args.device)
    train, test = (data.load(args.data, args.data_root, train=t, download=args.download) for t in (True, False))
    training_path = args.model / "training.json"
    training = checkpoint.read_json(training_path) if training_path.is_file() else {}
    evaluation.check_fit(model, loaded.net, test, protocol)  # before the long part
    start = time.monotonic()
    with tqdm(total=protocol.samples + protocol.unlabelled, unit="image", mininterval=0.5) as bar:
        evaluated, images = evaluation.evaluate(
            model, loaded.net.to(device), train, test, protocol, device, on_batch=bar.update
        )
    card = {
        **report(model, loaded.sha256, args, evaluated),
        "hardware": hardware(device),
        "seconds": round(time.monotonic() - start, 1),
        "command": command_of(args),
        "training": {k: v for k, v in training.items() if k not in ELSEWHERE},
    }
    if args.card:
        write_card(args.model, card, images)
    print(f"{model.name}, sha256 {model.sha256}\n\n{results_table(card)}\n")
    print("\n".join(notes(card)))
    if args.card:
        print(f"wrote card.json, README.md and samples.png into {args.model}")
    print(json.dumps(card, allow_nan=False))


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    args.classifier = args.classifier or Path("weights") / f"{args.data}-classifier"
    try:
        run(args)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, ImportError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
