"""The reverse process: step() is the only place that advances x, sample() runs a plan with it.

generate() goes from seeds and labels to images, for whoever wants them all at once.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_core import data
from ddpm_core.checkpoint import Model
from ddpm_core.denoiser import Denoiser
from ddpm_core.noise import noise
from ddpm_core.parallel import ONE, Ranks
from ddpm_core.plans import SamplingPlan

MOST_CLASSES = 20  # in a picture of a model

OnBatch = Callable[[int], object]
"""Is told how many images have just been finished."""


def step(x: Sequence[Tensor], x_0_hat: Sequence[Tensor], a: Tensor, b: Tensor, d: Tensor, z: Tensor | None) -> Tensor:
    """x' = sum_k (a_k x[i-k] + b_k x_0_hat[i-k]) + d z, row by row.

    A coefficient of 0 leaves its term out, whatever the tensor holds (0 * NaN would be NaN) and to the last bit: a row
    is the same beside rows of samplers that look further back.

    Args:
        x: Ka tensors (B, C, H, W), the newest first.
        x_0_hat: Kb tensors (B, C, H, W), the newest first.
        a: (B, Ka). b: (B, Kb). d: (B,).
        z: (B, C, H, W) standard normal; None where no row has d != 0.

    Returns:
        (B, C, H, W), the next x.
    """

    total = torch.zeros_like(x[0])
    terms = [*zip(b.unbind(1), x_0_hat, strict=True), *zip(a.unbind(1), x, strict=True)]
    for coefficient, tensor in terms if z is None else [*terms, (d, z)]:
        c = coefficient.to(tensor.dtype)[:, None, None, None]
        total = torch.where(c != 0, total + c * tensor, total)
    return total


@dataclasses.dataclass(frozen=True)
class SampleStep:
    """What is known after plan row `index`: the new x and the x_0_hat it came from, both (B, C, H, W)."""

    index: int
    x: Tensor
    x_0_hat: Tensor


def draw_noise(seeds: Sequence[int], k: int, like: Tensor) -> Tensor:
    """Noise number k of each image, (B, C, H, W) in like's type and on its device."""
    shape = tuple(like.shape[1:])
    return torch.stack([noise(seed, k, shape) for seed in seeds]).to(like)


@torch.inference_mode()
def sample(
    denoiser: Denoiser,
    plan: SamplingPlan,
    x: Tensor,
    seeds: Sequence[int],
    *,
    labels: Tensor | None = None,
    guidance_scale: Tensor | None = None,
) -> Iterator[SampleStep]:
    """Runs a plan, yielding after every row; the last x is the image: `*_, last = sample(...)`.

    Args:
        denoiser: x_t -> x_0_hat.
        plan: the sampler.
        x: (B, C, H, W), where the chain starts: x_T, draw_noise(seeds, 0, ...).
        seeds: B seeds; image i's noise depends on seeds[i] and on nothing else.
        labels: (B,) long or None.
        guidance_scale: (B,) or None.
    """
    device = x.device
    t, abar, a, b, d = (torch.from_numpy(v.copy()).to(device) for v in
                        (plan.timesteps, plan.alpha_bars, plan.a, plan.b, plan.d))  # fmt: skip
    rows = len(x)
    xs = [x] * plan.a.shape[1]
    x_0_hats = [torch.zeros_like(x)] * plan.b.shape[1]
    for i in range(len(plan)):
        x_0_hat = denoiser(xs[0], t[i].expand(rows), abar[i].expand(rows), labels, guidance_scale)
        x_0_hats = [x_0_hat, *x_0_hats[:-1]]
        z = draw_noise(seeds, i + 1, x) if plan.d[i] else None
        new = step(xs, x_0_hats, a[i].expand(rows, -1), b[i].expand(rows, -1), d[i].expand(rows), z)
        xs = [new, *xs[:-1]]
        yield SampleStep(i, new, x_0_hat)


def generate(
    model: Model,
    device: torch.device,
    seeds: Sequence[int],
    labels: Sequence[int | None],
    *,
    sampler: str = "balanced",
    steps: int | None = None,
    eta: float = 0.0,
    guidance_scale: float = 1.0,
    plan: SamplingPlan | None = None,
    batch_size: int = 250,
    on_batch: OnBatch | None = None,
    ranks: Ranks = ONE,
) -> Tensor:
    """Images of a model, one for each seed.

    Args:
        model: what draws them.
        device: where; of network.pick_device, which makes a GPU's images those of the service.
        seeds: N of them; image i's noise depends on seeds[i] and on nothing else.
        labels: N of them; None: "no label", of models that need none.
        sampler: a key of samplers.SAMPLERS or samplers.PRESETS, or samplers.LEARNED.
        steps: of the sampler; None: its own.
        eta: ddim only.
        guidance_scale: of the images that have a label; 1: no guidance.
        plan: on the model's schedule, in the place of sampler, steps and eta.
        batch_size: images at once.
        on_batch: called after every batch, of all ranks one.
        ranks: which draw the batches in turn. The batches are those of one process, and so are the images.

    Returns:
        (N, C, H, W) uint8 on the CPU, on every rank.

    Raises:
        ValueError: seeds and labels differ in number, or the model or the sampler does not take what is asked.
        FloatingPointError: the network returned NaN or infinity.
    """
    if len(seeds) != len(labels):
        raise ValueError(f"{len(seeds)} seeds but {len(labels)} labels")
    null_label = model.null_label
    if not model.takes_labels and (guidance_scale != 1 or any(label is not None for label in labels)):
        raise ValueError(f"{model.name} is unconditional: it takes neither labels nor guidance")
    if model.needs_label and (guidance_scale != 1 or None in labels):
        raise ValueError(f'{model.name} knows no "no label": every image needs a label, and there is no guidance')
    for label in labels:
        if label is not None and not 0 <= label < model.num_classes:
            raise ValueError(f"label={label} must be 0 .. {model.num_classes - 1}")
    denoiser, plan = model.denoiser(model.network(device)), plan or model.plan(sampler, steps, eta=eta)
    like = torch.empty(0, *model.config.image_shape, device=device)
    each = batch_size * ranks.world

    def share() -> Tensor:
        images = [torch.empty(0, *model.config.image_shape, dtype=torch.uint8)]
        for start in range(0, len(seeds), each):
            rows = slice(start + ranks.rank * batch_size, start + (ranks.rank + 1) * batch_size)
            if batch_seeds := seeds[rows]:
                images.append(draw(batch_seeds, labels[rows]))
            if on_batch is not None:
                on_batch(min(each, len(seeds) - start))
        return torch.cat(images)

    def draw(batch_seeds: Sequence[int], batch_labels: Sequence[int | None]) -> Tensor:
        label_tensor = scale = None
        if model.takes_labels:
            indices = [null_label if label is None else label for label in batch_labels]
            label_tensor = torch.tensor(indices, device=device)
            if guidance_scale != 1:
                scales = [1.0 if label is None else guidance_scale for label in batch_labels]
                scale = torch.tensor(scales, device=device)
        x = draw_noise(batch_seeds, 0, like)
        *_, last = sample(denoiser, plan, x, batch_seeds, labels=label_tensor, guidance_scale=scale)
        if not bool(torch.isfinite(last.x).all()):
            raise FloatingPointError(f"{model.name} returned numbers that are not finite")
        return data.to_uint8(last.x).cpu()

    return ranks.in_order(ranks.agree(share), batch_size)


def one_row_a_class(model: Model, device: torch.device, columns: int = 10, **how: Any) -> tuple[Tensor, int]:
    """Images for a picture of the model, row by row: (rows * columns, C, H, W) uint8, and the number of columns.

    A row is a class, of the first MOST_CLASSES; an unconditional model gets as many rows as columns. `how` goes to
    generate().
    """
    classes = min(model.num_classes, MOST_CLASSES)
    labels = [row if classes else None for row in range(classes or columns) for _ in range(columns)]
    return generate(model, device, range(len(labels)), labels, **how), columns
