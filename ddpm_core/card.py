"""The model card: README.md, card.json and samples.png beside the weights, all made from one report of figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from ddpm_core import checkpoint, pictures

ROWS = (  # key, heading, factor, decimal places
    ("fid", "FID", 1, 3),
    ("kid", "KID x 1000", 1000, 3),
    ("precision", "precision", 1, 3),
    ("recall", "recall", 1, 3),
    ("label_accuracy", "label accuracy", 1, 4),
    ("nearest_train_distance", "distance to the nearest training image", 1, 2),
    ("near_copies", "share of near copies", 1, 4),
    ("bits_per_dimension", "bits per dimension (floor: of training images)", 1, 3),
)


def _table(rows: Sequence[Sequence[str]]) -> str:
    """Markdown: the first row is the head, the first column is set left, the others right."""
    lines = [rows[0], ["---"] + ["---:"] * (len(rows[0]) - 1), *rows[1:]]
    widths = [max(len(line[k]) for line in lines) for k in range(len(rows[0]))]
    return "\n".join(
        "| " + " | ".join(f"{cell:{'>' if k else '<'}{widths[k]}}" for k, cell in enumerate(line)) + " |"
        for line in lines
    )


def _cell(entry: Mapping[str, Any] | None, factor: float, places: int) -> str:
    if entry is None:
        return "-"
    spread = entry.get("spread", entry.get("standard_error"))
    return f"{entry['value'] * factor:.{places}f}" + (f" ± {spread * factor:.{places}f}" if spread is not None else "")


def results_table(card: Mapping[str, Any]) -> str:
    """The figures of a report, the floor beside them, as a Markdown table."""
    metrics, floor, sampling = card["metrics"], card["floor"], card["sampling"]
    drawn, real = metrics["fid"], floor["fid"]
    head = (
        f"{sampling['sampler']}, {sampling['nfe']} NFE",
        f"generated, {drawn['seeds']} x {drawn['samples']:,}",
        f"the floor: real, {real['sets']} x {real['samples']:,}",
    )
    rows = [
        (heading, _cell(metrics.get(key), factor, places), _cell(floor.get(key), factor, places))
        for key, heading, factor, places in ROWS
        if key in metrics or key in floor
    ]
    return _table([head, *rows])


def _bits_note(card: Mapping[str, Any]) -> list[str]:
    """What bits per dimension are of, where there are any."""
    bound, train_bound = (card[part].get("bits_per_dimension") for part in ("metrics", "floor"))
    if bound is None:
        return []
    condition = "given their labels, " if card["model"]["classes"] else ""
    return [
        f"Bits per dimension: the variational bound of the {card['model']['train_steps']:,}-step ancestral chain, "
        f"{condition}of {bound['samples']:,} test images and, in the floor's column, of {train_bound['samples']:,} "
        f"training images; stratified over t, {bound['calls']} network calls an image, ± the standard error."
    ]


def notes(card: Mapping[str, Any]) -> list[str]:
    """What has to stand under the table for its figures to mean something."""
    metrics, floor, sampling, reference = card["metrics"], card["floor"], card["sampling"], card["reference"]
    balance, bits = metrics["class_balance"], _bits_note(card)
    labels = "with labels of training images" if card["model"].get("needs_label") else "with no label"
    test_images, train_images = reference["test_images"], reference["train_images"]
    near, real_near = metrics["nearest_train_distance"]["value"], floor["nearest_train_distance"]["value"]
    return [
        f"Mean ± standard deviation over {metrics['fid']['seeds']} x {metrics['fid']['samples']:,} images, each set of "
        f"other seeds; the floor over {floor['fid']['sets']} x {floor['fid']['samples']:,} training "
        "images, none of them twice.",
        f"FID, KID (x 1000), precision and recall (k = 3) against the {test_images:,} test images of {card['data']}, "
        f"in the penultimate layer of the classifier with sha256 {card['classifier_sha256']}: comparable only to "
        "figures of the same classifier and, but for KID, the same count, never to those of Inception. FID over the "
        f"floor's: {metrics['fid_over_floor']['value']:.2f}.",
        "Label accuracy: share of images that the classifier reads as the label asked for.",
        "Memorisation, in pixels: the median distance (L2, black to white is 1) from an image to the nearest of the "
        f"{train_images:,} training images, and the share of images as near to one as the nearest 1 % of the "
        f"{test_images:,} test images are. The floor is the test images' own; a model that copies has more. "
        f"Ratio of the two medians: {near / max(real_near, 1e-12):.3f}.",
        *bits,
        f"Class balance of {balance['samples']:,} images drawn {labels}: rarest class "
        f"{balance['rarest_share']:.1%}, commonest {balance['commonest_share']:.1%}, chi-square "
        f"{balance['chi_square']:.1f} with {balance['degrees_of_freedom']} degrees of freedom against the training "
        "set's shares.",
        f"Sampler {sampling['sampler']} ({sampling['method']}), {sampling['steps']} steps, {sampling['nfe']} network "
        f"calls an image, guidance scale {sampling['guidance_scale']:g}, seeds from {sampling['seed']}.",
    ]


SWEEP, SWEEP_PLOT = "sweep.json", "fid_nfe.png"  # beside card.json: what ddpm_core.sweep measured


def read_sweep(directory: Path, sha256: str) -> dict[str, Any] | None:
    """The sweep beside the weights, where there is one of these weights. Raises CheckpointError where it is damaged."""
    path = directory / SWEEP
    sweep = checkpoint.read_json(path) if path.is_file() else {}
    if sweep and ("command" not in sweep or any("eta" not in point for point in sweep["points"])):
        raise checkpoint.CheckpointError(f"{path} is of another version: delete it and run `python -m ddpm_core.sweep`")
    return sweep if sweep.get("sha256") == sha256 and sweep["points"] else None


def line_of(point: Mapping[str, Any]) -> str:
    """The name of a sweep's curve that a point belongs to."""
    name = point["sampler"] + (f" eta {point['eta']:g}" if point["eta"] else "")
    return name if point["spacing"] == "trailing" else f"{name}, {point['spacing']}"


def sweep_table(sweep: Mapping[str, Any]) -> str:
    """FID and, in brackets, label accuracy: a row a sampler, a column an NFE."""
    points = {(line_of(point), point["nfe"]): point for point in sweep["points"]}
    calls = sorted({nfe for _, nfe in points})

    def cell(point: Mapping[str, Any] | None) -> str:
        if point is None:
            return "-"
        accuracy = f" ({point['label_accuracy']:.1%})" if "label_accuracy" in point else ""
        return f"{point['fid']:.3f}{accuracy}"

    rows = [[line, *(cell(points.get((line, nfe))) for nfe in calls)] for line in dict.fromkeys(k for k, _ in points)]
    return _table([["sampler", *(f"{nfe} NFE" for nfe in calls)], *rows])


def _sweep_section(sweep: Mapping[str, Any] | None) -> str:
    if sweep is None:
        return ""
    floor = sweep["floor"]["fid"]
    return f"""\
## FID against network calls

![FID against network calls, a line a sampler]({SWEEP_PLOT})

{sweep_table(sweep)}

FID (label accuracy) of {sweep["samples"]:,} images, the same seeds and labels at every point, by
`{sweep["command"]}`. The floor of
{floor["samples"]:,} real images is {floor["value"]:.3f}: FID is the higher the fewer there are. KID, precision and
recall of every point are in `{SWEEP}`.

"""


def history(training: Mapping[str, Any]) -> list[str]:
    """What training.json records, a line for each training, the oldest first; an average after what it is of."""
    if parts := training.get("average_of"):
        lines = list(dict.fromkeys(line for part in parts for line in history(part["training"])))
        shares = " and ".join(f"{part['share']:g} of {part['sha256'][:12]}" for part in parts)
        return [*lines, f"the average of weights: {shares}"]
    start = training.get("started_from", {})
    facts = {k: v for k, v in training.items() if not isinstance(v, Mapping)} | training.get("recipe", {})
    line = ", ".join(f"{k} {v}" for k, v in facts.items() if v)  # what is 0 or off is left out
    earlier = history(start["training"]) if start else []
    return [*earlier, (f"from {start['sha256'][:12]}: " if start else "") + line] if line else earlier


def readme(card: Mapping[str, Any], sweep: Mapping[str, Any] | None = None) -> str:
    """README.md of a model directory, from its card.json, its sweep.json if there is one, and nothing else."""
    model, data_name = card["model"], card["data"]
    channels, height, width = model["image_shape"]
    classes, path = model["classes"], model["path"]
    labels = f"torch.arange({classes})" if classes else "None"
    count = classes or 10
    asked = f"list(range({count}))" if classes else f"[None] * {count}"
    no_label = classes and not model.get("needs_label")
    note = f'  # {classes} means "no label"' if no_label else ""
    distilled_steps = model.get("distilled_steps")
    steps = distilled_steps or 50
    student = f"""
It is distilled: trained to draw by DDIM with {steps} steps what its teacher draws with more. No other sampler fits
it, it denoises from no other timesteps, and it has no likelihood.
"""
    kind = f"class-conditional, {classes} classes" if classes else "unconditional"
    kind += ' and "no label"' if no_label else ""
    training = "\n".join(f"{number}. {line}" for number, line in enumerate(history(card["training"]), 1))
    if training:
        training += "\n\nWeights are named by the first digits of their sha256; the whole record is in `training.json`."
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
{student if distilled_steps else ""}
![images that it draws](samples.png)

## Use

With diffusers:

```python
import torch
from diffusers import DDIMScheduler, UNet2DModel

unet = UNet2DModel.from_pretrained("{path}", subfolder="unet").eval()
scheduler = DDIMScheduler.from_pretrained("{path}", subfolder="scheduler")
scheduler.set_timesteps({steps})
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

{_sweep_section(sweep)}## Training

{training or "Not recorded."}

## Limits and intended use

For teaching, tests and measurements of diffusion code. It draws what `{data_name}` shows, at {height} x {width} pixels,
and nothing else; some images are malformed or read as another class than the one asked for (1 - label accuracy). Do not
use its images as if they were real ones of the data set, nor train a classifier that matters on them.
"""


def write_readme(directory: Path) -> None:
    """Makes README.md from what lies beside it; does nothing where there is no card.json.

    Raises:
        CheckpointError: card.json or sweep.json cannot be used.
    """
    path = directory / checkpoint.CARD_NAME
    if path.is_file():
        card = checkpoint.read_json(path)
        try:
            text = readme(card, read_sweep(directory, card["model"]["sha256"]))
        except KeyError as error:
            message = f"{path} has no {error}: renew it with `python -m ddpm_core.evaluate --card`"
            raise checkpoint.CheckpointError(message) from error
        checkpoint.write_atomically(directory / "README.md", text.encode())


def write(directory: Path, card: Mapping[str, Any], images: Tensor, columns: int) -> None:
    """Writes card.json, README.md and, of images (N, C, H, W) uint8, samples.png into a model directory."""
    checkpoint.write_atomically(directory / "samples.png", pictures.samples_png(images, columns))
    checkpoint.write_atomically(directory / checkpoint.CARD_NAME, checkpoint.to_json(card))
    write_readme(directory)
