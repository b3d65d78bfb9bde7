"""The model card: README.md, card.json and samples.png beside the weights, all made from one report of figures."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_core import checkpoint, pictures


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
        ("real training images (the floor)", f"{floor['fid']['sets']} x {floor['fid']['samples']:,}",
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


def readme(card: Mapping[str, Any]) -> str:
    """README.md of a model directory, from its card.json and nothing else."""
    model, data_name = card["model"], card["data"]
    channels, height, width = model["image_shape"]
    classes, path = model["classes"], model["path"]
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
from diffusers import DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("{path}", subfolder="unet").eval()
scheduler = DDIMScheduler.from_pretrained("{path}", subfolder="scheduler")
scheduler.set_timesteps(50)
x, labels = torch.randn({count}, {channels}, {height}, {width}), {labels}{note}
with torch.inference_mode():
    for t in scheduler.timesteps:
        x = scheduler.step(unet(x, t, class_labels=labels).sample, t, x).prev_sample
```

With this project:

```python
import torch
from pathlib import Path
from ddpm_core import checkpoint, sampling

model = checkpoint.load_model(Path("{path}"))
images = sampling.generate(model, torch.device("cpu"), range({count}), {asked})
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


def write(directory: Path, card: Mapping[str, Any], images: Tensor, columns: int) -> None:
    """Writes card.json, README.md and, of images (N, C, H, W) uint8, samples.png into a model directory."""
    pictures.save_samples(directory / "samples.png", images, columns)
    checkpoint.write_atomically(directory / "card.json", checkpoint.to_json(card))
    checkpoint.write_atomically(directory / "README.md", readme(card).encode())
