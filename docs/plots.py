"""Makes every plot and picture of docs/concepts: `python docs/plots.py [NAME ...]`; a minute or two.

Everything is drawn by the code that it explains, and by the shipped weights. Their images stand where one of a data set
would: whoever reads has the weights, and need not have the data.
"""

from __future__ import annotations

import functools
import io
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")

import numpy as np
import torch
from matplotlib import pyplot as plt
from PIL import Image
from torch import Tensor

from ddpm_core import (
    checkpoint,
    classifier,
    data,
    diffusion,
    likelihood,
    plans,
    samplers,
    sampling,
    schedules,
    spacings,
    unet,
)
from ddpm_core.denoiser import Denoiser
from ddpm_core.noise import noise
from ddpm_core.plans import SamplingPlan
from ddpm_core.schedules import Float64Array, NoiseSchedule

ROOT = Path(__file__).parent.parent
OUT = ROOT / "docs" / "concepts"
CPU = torch.device("cpu")
SCHEDULES = {"linear": schedules.linear(), "scaled_linear": schedules.scaled_linear(), "cosine": schedules.cosine()}
MU, S = 0.3, 0.5  # of the Gaussian data on which every answer is known
STYLE = {"figure.constrained_layout.use": True, "axes.grid": True, "grid.alpha": 0.3, "font.size": 9}


@functools.cache
def model() -> checkpoint.Model:
    return checkpoint.load_model(ROOT / "weights" / "mnist")


@functools.cache
def denoiser() -> Denoiser:
    return model().denoiser(model().network(CPU))


@functools.cache
def drawn(count: int) -> tuple[Tensor, Tensor]:
    """Digits that the model draws: x_0 (count, 1, 28, 28), and their labels 0, 1, ... in turn."""
    labels = [i % 10 for i in range(count)]
    images = data.to_uint8(draw(model().plan("balanced"), range(count), labels))
    return data.to_unit(images), torch.tensor(labels)


def draw(plan: SamplingPlan, seeds: Sequence[int], labels: Sequence[int], guidance_scale: float = 1.0) -> Tensor:
    """Images in [-1, 1]; as sampling.generate, but for the rounding to bytes, with one network for all pictures."""
    scale = torch.full((len(seeds),), guidance_scale)
    *_, last = sampling.sample(
        denoiser(), plan, noises(seeds), seeds, labels=torch.tensor(labels), guidance_scale=scale
    )
    return last.x


def noises(seeds: Sequence[int], k: int = 0) -> Tensor:
    return torch.stack([noise(seed, k, model().config.image_shape) for seed in seeds])


def png(figure: Any) -> bytes:
    """The figure as a PNG of 64 colours, which is half of its bytes, and without the name of who wrote it."""
    buffer, small = io.BytesIO(), io.BytesIO()
    figure.savefig(buffer, dpi=110, metadata={"Software": None})
    plt.close(figure)
    Image.open(buffer).convert("RGB").quantize(64, dither=Image.Dither.NONE).save(small, "PNG", optimize=True)
    return small.getvalue()


def show(axes: Any, image: Tensor) -> None:
    """One image (1, H, W), black at -1 and white at 1; beyond, it is clipped for the eye."""
    axes.imshow(image[0], cmap="gray", vmin=-1, vmax=1, interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.grid(False)


def table(rows: dict[str, Sequence[Tensor]], columns: Sequence[str], *, across: str = "") -> bytes:
    """Images in rows and columns that have names."""
    figure, grid = plt.subplots(
        len(rows), len(columns), figsize=(0.85 * len(columns) + 1.0, 0.9 * len(rows) + 0.35), squeeze=False
    )
    for line, (name, images) in zip(grid, rows.items(), strict=True):
        line[0].set_ylabel(name, rotation=0, ha="right", va="center")
        for axes, image in zip(line, images, strict=True):
            show(axes, image)
    for axes, name in zip(grid[0], columns, strict=True):
        axes.set_title(name, fontsize=9)
    figure.supxlabel(across, fontsize=9)
    return png(figure)


def forward() -> bytes:
    """One digit at rising t, above the shares of signal and noise in it."""
    schedule, shown = model().schedule, [0, 100, 200, 300, 400, 500, 600, 700, 800, 900, 999]
    figure = plt.figure(figsize=(8.6, 3.4))
    layout = figure.add_gridspec(2, len(shown), height_ratios=[1, 2.4])
    x_0, eps = drawn(10)[0][7:8], noises([1])
    for i, t in enumerate(shown):
        axes = figure.add_subplot(layout[0, i])
        show(axes, diffusion.q_sample(x_0, eps, float(schedule.alphas_cumprod[t]))[0])
        axes.set_title(f"t = {t}", fontsize=8)
    axes = figure.add_subplot(layout[1, :])
    abar = schedule.alphas_cumprod
    axes.plot(np.sqrt(abar), label="√ᾱ, the factor of x_0")
    axes.plot(np.sqrt(1 - abar), label="√(1-ᾱ), the factor of eps")
    axes.set(xlabel="timestep t", ylabel="factor", xlim=(-45, 1045))
    axes.set_xticks(shown)
    axes.legend(loc="center left")
    return png(figure)


def schedule_curves() -> bytes:
    """beta, alpha_bar and the log-SNR of the three schedules."""
    figure, (betas, abars, snrs) = plt.subplots(1, 3, figsize=(9, 3))
    for name, schedule in SCHEDULES.items():
        betas.plot(schedule.betas, label=name)
        abars.plot(schedule.alphas_cumprod)
        snrs.plot(schedule.log_snr)
    betas.set(xlabel="timestep t", ylabel="β, variance added by a step", yscale="log")
    abars.set(xlabel="timestep t", ylabel="ᾱ, share of the signal's variance left")
    snrs.set(xlabel="timestep t", ylabel="log SNR (natural logarithm)")
    snrs.axhline(0, color="black", linewidth=0.8, linestyle="--")
    betas.legend()
    return png(figure)


def schedule_images() -> bytes:
    """The same digit and eps by the three schedules."""
    shown, x_0, eps = [100, 200, 300, 400, 500, 600, 700, 800, 999], drawn(10)[0][7:8], noises([1])
    return table(
        {
            name: [diffusion.q_sample(x_0, eps, float(schedule.alphas_cumprod[t]))[0] for t in shown]
            for name, schedule in SCHEDULES.items()
        },
        [f"t = {t}" for t in shown],
    )


def posterior() -> bytes:
    """The factors of the posterior's mean, and its two candidate standard deviations."""
    figure, (factors, deviations) = plt.subplots(1, 2, figsize=(9, 3.2))
    schedule, t = SCHEDULES["cosine"], np.arange(1, 1000)
    plan = samplers.build(schedule, "ddpm")
    factors.plot(plan.timesteps, plan.b[:, 0], label="of x_0")
    factors.plot(plan.timesteps, plan.a[:, 0], label="of x_t")
    factors.set(xlabel="timestep t", ylabel="factor in the mean (cosine)", yscale="log", ylim=(1e-3, 2))
    factors.legend(loc="center")
    for name, colour in (("cosine", "C0"), ("linear", "C1")):
        abar, betas = SCHEDULES[name].alphas_cumprod, SCHEDULES[name].betas
        small = np.sqrt(betas[1:] * (1 - abar[:-1]) / (1 - abar[1:]))
        deviations.plot(t, np.sqrt(betas[1:]), color=colour, label=f"{name}, fixed_large: √β")
        deviations.plot(t, small, color=colour, linestyle="--", label=f"{name}, fixed_small: √β̃")
    deviations.set(xlabel="timestep t", ylabel="standard deviation of z's term", xscale="log", yscale="log")
    deviations.legend()
    return png(figure)


def predictions() -> bytes:
    """What the network makes of one noised digit: eps_hat, x_0_hat, and x_0_hat clipped."""
    shown, x_0, eps = [50, 200, 400, 600, 800, 900, 960, 999], drawn(10)[0][3:4], noises([5])
    rows: dict[str, list[Tensor]] = {"x_t": [], "eps_hat": [], "x_0_hat": [], "x_0_hat,\nno label": []}
    for t in shown:
        abar = torch.tensor([model().schedule.alphas_cumprod[t]])
        x_t, when = diffusion.q_sample(x_0, eps, abar), torch.tensor([float(t)])
        x_0_hat = denoiser()(x_t, when, abar, torch.tensor([3]))
        rows["x_t"].append(x_t[0])
        rows["eps_hat"].append(diffusion.to_eps(x_0_hat, x_t, abar)[0])
        rows["x_0_hat"].append(x_0_hat[0])
        rows["x_0_hat,\nno label"].append(denoiser()(x_t, when, abar)[0])
    return table(rows, [f"t = {t}" for t in shown])


def prediction_errors() -> bytes:
    """How an error of each prediction type reaches x_0_hat, and the errors of this model."""
    figure, (factors, measured) = plt.subplots(1, 2, figsize=(9, 3.2))
    abar = model().schedule.alphas_cumprod
    factors.plot(np.sqrt(1 / abar - 1), label="epsilon: √((1-ᾱ)/ᾱ)")
    factors.plot(np.sqrt(1 - abar), label="v_prediction: √(1-ᾱ)")
    factors.plot(np.ones(len(abar)), label="sample: 1")
    factors.set(xlabel="timestep t", ylabel="error of x_0_hat / error of output", yscale="log", ylim=(1e-2, 1e4))
    factors.legend()
    x_0, labels = drawn(100)
    eps, shown = noises(range(1000, 1100)), np.arange(20, 1000, 60)
    errors = []
    for t in shown:
        rows = torch.full((100,), float(abar[t]), dtype=torch.float64)
        x_t = diffusion.q_sample(x_0, eps, rows)
        v = model_output(x_t, int(t), labels)
        x_0_hat = diffusion.to_x_0("v_prediction", v, x_t, rows)
        wanted = diffusion.target("v_prediction", x_0, eps, rows)
        errors.append([rms(v - wanted), rms(x_0_hat - x_0), rms(diffusion.to_eps(x_0_hat, x_t, rows) - eps)])
    for line, name in zip(np.array(errors).T, ("v", "x_0_hat", "eps_hat"), strict=True):
        measured.plot(shown, line, label=f"{name}")
    measured.set(xlabel="timestep t", ylabel="root mean square error a pixel")
    measured.legend()
    return png(figure)


def model_output(x_t: Tensor, t: int, labels: Tensor) -> Tensor:
    """What the raw network says: v."""
    return denoiser().network(x_t, torch.full((len(x_t),), float(t)), labels)


def rms(difference: Tensor) -> float:
    return float(difference.square().mean().sqrt())


def levels() -> bytes:
    """The U-Net's levels, read from the network itself."""
    net, (_, size, _) = model().net, model().config.image_shape
    figure, axes = plt.subplots(figsize=(8.6, 4.6))
    axes.set(xlim=(-0.05, 10.05), ylim=(0.35, 5.0))
    axes.axis("off")

    def box(x: float, y: float, text: str, colour: str) -> None:
        shape = {"boxstyle": "round,pad=0.5", "facecolor": colour, "edgecolor": "#444444"}
        axes.text(x, y, text, ha="center", va="center", fontsize=8.5, bbox=shape, linespacing=1.5)

    def arrow(start: tuple[float, float], end: tuple[float, float], **style: Any) -> None:
        axes.annotate("", end, start, arrowprops={"arrowstyle": "->", "color": "#444444", "lw": 1.2, **style})

    def blocks(level: Any) -> list[str]:
        kind = " + attention" if len(level.attentions) else ""
        return [f"residual {r.conv1.in_channels} → {r.conv1.out_channels}{kind}" for r in level.resnets]

    pairs = list(zip(net.down_blocks, reversed(net.up_blocks), strict=True))
    for i, (down, up) in enumerate(pairs):
        y, side = 4.0 - 1.25 * i, size >> i
        first = [f"conv {net.conv_in.in_channels} → {net.conv_in.out_channels}"] if i == 0 else []
        last = [f"norm, SiLU, conv {net.conv_out.in_channels} → {net.conv_out.out_channels}"] if i == 0 else []
        box(1.7, y, "\n".join([f"{side} × {side}", *first, *blocks(down)]), "#dbe9f6")
        box(8.3, y, "\n".join([f"{side} × {side}", *blocks(up), *last]), "#dbe9f6")
        arrow((3.1, y), (6.75, y), linestyle="--")
        skips = [r.conv1.in_channels - w for r, w in zip(up.resnets, inner_widths(net, i), strict=True)]
        axes.text(5.0, y + 0.07, f"skips of {', '.join(map(str, reversed(skips)))} channels", ha="center", fontsize=8)
        if i < len(pairs) - 1:
            arrow((1.7, y - 0.42), (1.7, y - 0.80))
            arrow((8.3, y - 0.80), (8.3, y - 0.42))
    lowest = 4.0 - 1.25 * (len(pairs) - 1)
    width = net.mid_block.resnets[0].conv1.in_channels
    box(5.0, lowest - 0.72, f"middle: residual, attention, residual, {width} channels", "#dbe9f6")
    arrow((1.7, lowest - 0.36), (3.0, lowest - 0.72))
    arrow((7.0, lowest - 0.72), (8.3, lowest - 0.42))
    dim = net.config.block_out_channels[0]
    embedding = f"t → {dim} sines and cosines → two layers → {net.config.temb_channels}"
    box(
        5.0,
        4.72,
        f"{embedding};   + row `label` of {net.config.num_class_embeds};   to every residual block",
        "#fdf0d5",
    )
    return png(figure)


def inner_widths(net: unet.UNet, level: int) -> list[int]:
    """Channels that arrive from within at each residual block of one level on the way up, skips not counted in."""
    widths = net.config.block_out_channels
    below = widths[min(level + 1, len(widths) - 1)]
    return [below] + [widths[level]] * net.config.layers_per_block


def embedding() -> bytes:
    """The sinusoidal embedding of all t, and how alike those of two t are."""
    net = model().net
    t = torch.arange(1000, dtype=torch.float32)
    found = unet.sinusoidal_embedding(
        t, net.config.block_out_channels[0], flip_sin_to_cos=net.config.flip_sin_to_cos, freq_shift=0
    )
    figure, (waves, alike) = plt.subplots(1, 2, figsize=(9, 3.2), width_ratios=[1.6, 1])
    shown = waves.imshow(found.T, aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
    waves.set(xlabel="timestep t", ylabel="entry (0-15 cosines, 16-31 sines)")
    waves.grid(False)
    figure.colorbar(shown, ax=waves, label="value")
    with torch.inference_mode():
        learnt = net.time_embedding(found)
    for name, rows in (("sines and cosines", found), ("after the two layers", learnt)):
        unit = torch.nn.functional.normalize(rows, dim=1)
        alike.plot(unit @ unit[500], label=name)
    alike.set(xlabel="timestep t", ylabel="cosine similarity to t = 500")
    alike.legend()
    return png(figure)


def loss_terms() -> bytes:
    """The terms of L_simple and of the bound at every t, of digits that the model drew."""
    (x_0, labels), eps = drawn(50), noises(range(1000, 1050))
    schedule = model().schedule
    shown = np.unique([*np.geomspace(1, 900, 30).astype(int), 930, 950, 970, 985, 993, 997, 999])
    simple, bits = [], []
    for t in shown:
        abar = torch.full((50,), schedule.alphas_cumprod[t], dtype=torch.float64)
        x_t = diffusion.q_sample(x_0, eps, abar)
        x_0_hat = denoiser()(x_t, torch.full((50,), float(t)), abar, labels)
        simple.append(rms(diffusion.to_eps(x_0_hat, x_t, abar) - eps) ** 2)
        terms = likelihood.bound_terms(denoiser(), schedule, "fixed_small", x_0, torch.full((50,), int(t)), eps, labels)
        bits.append(float(terms.mean()) / np.log(2) / x_0[0].numel())
    figure, (left, right) = plt.subplots(1, 2, figsize=(9, 3.2))
    left.plot(shown, simple, marker=".")
    left.set(xlabel="timestep t", ylabel="|eps - eps_hat|² a pixel (eq. 14)", xscale="log", ylim=(0, None))
    right.plot(shown, bits, marker=".")
    right.set(xlabel="timestep t", ylabel="L_t, bits a dimension (eq. 5)", xscale="log", yscale="log")
    return png(figure)


def chain() -> bytes:
    """A digit forming on the ancestral chain: x_t and x_0_hat."""
    shown = [999, 900, 800, 700, 600, 500, 400, 300, 200, 100, 0]
    plan, seed = model().plan("ddpm"), 7
    rows: dict[str, list[Tensor]] = {"x_t": [], "x_0_hat": []}
    x = noises([seed])
    for done in sampling.sample(denoiser(), plan, x, [seed], labels=torch.tensor([5])):
        if plan.timesteps[done.index] in shown:
            rows["x_t"].append(x[0])
            rows["x_0_hat"].append(done.x_0_hat[0])
        x = done.x
    return table(rows, [f"t = {t}" for t in shown])


def eta() -> bytes:
    """DDIM from one x_T with eta 0, 0.5 and 1, with more and more steps."""
    counts, seed = [3, 5, 10, 20, 50, 100, 250], 16
    rows = {
        f"eta = {value:g}": [draw(model().plan("ddim", steps, eta=value), [seed], [2])[0] for steps in counts]
        for value in (0.0, 0.5, 1.0)
    }
    return table(rows, [str(steps) for steps in counts], across="steps of DDIM")


def best(x: Float64Array, abar: float) -> Float64Array:
    """The best x_0_hat for data N(MU, S²)."""
    return MU + np.sqrt(abar) * S**2 / (abar * S**2 + 1 - abar) * (x - np.sqrt(abar) * MU)


def on_ode(start: float, abar_start: float, abar: Float64Array | float) -> Any:
    """Where the probability-flow ODE of N(MU, S²) leads from a state at abar_start."""
    scale = np.sqrt((abar * S**2 + 1 - abar) / (abar_start * S**2 + 1 - abar_start))
    return np.sqrt(abar) * MU + scale * (start - np.sqrt(abar_start) * MU)


def end_of(plan: SamplingPlan, start: float, *, given: int = 0, rows: int | None = None) -> float:
    """The state after so many rows; the first `given` of them are put on the ODE, so that there is a past."""
    x, x_0_hats = [start] * plan.a.shape[1], [0.0] * plan.b.shape[1]
    for i in range(len(plan) if rows is None else rows):
        x_0_hats = [best(x[0], plan.alpha_bars[i]), *x_0_hats[:-1]]
        new = float(np.dot(plan.a[i], x) + np.dot(plan.b[i], x_0_hats))
        if i < given:
            new = on_ode(start, plan.alpha_bars[0], plan.alpha_bars[i + 1])
        x = [new, *x[:-1]]
    return x[0]


SOLVERS: dict[str, tuple[Callable[..., SamplingPlan], int]] = {
    "ddim": (plans.ddim, 1), "dpmpp_2m": (plans.dpmpp_2m, 2), "dpmpp_3m": (plans.dpmpp_3m, 3),
    "unipc": (plans.unipc, 4), "ipndm": (plans.ipndm, 2),
}  # fmt: skip
"""Samplers without noise, and their order."""


def order() -> bytes:
    """Error against steps on Gaussian data: between two fixed times, and from x_T to the image."""
    fine, start = schedules.cosine(20_000), 0.7
    few, many = [20, 40, 80, 160, 320], [3, 5, 10, 20, 50, 100, 200]
    figure, (window, whole) = plt.subplots(1, 2, figsize=(9, 3.6))
    for (name, (build, p)), marker in zip(SOLVERS.items(), "osD^v", strict=True):
        errors = []
        for count in few:
            plan = build(fine, np.linspace(18_000, 12_000, count + 1))
            exact = on_ode(start, plan.alpha_bars[0], plan.alpha_bars[-1])
            errors.append(abs(end_of(plan, start, given=4, rows=count) - exact))
        window.plot(few, errors, marker=marker, markersize=4, label=f"{name}: order {p}")
        errors = []
        for count in many:
            plan = samplers.build(SCHEDULES["cosine"], name, count)
            errors.append(abs(end_of(plan, start) - on_ode(start, plan.alpha_bars[0], 1.0)))
        whole.plot(many, errors, marker=marker, markersize=4, label=name)
    window.set(xlabel="steps from t = 0.9 T to 0.6 T", ylabel="distance from the exact state", xscale="log")
    whole.set(xlabel="network calls from x_T to the image", ylabel="distance from the exact image", xscale="log")
    for axes, counts in ((window, few), (whole, many)):
        axes.set(yscale="log")
        axes.set_xticks(counts, [str(count) for count in counts])
        axes.minorticks_off()
        axes.legend(fontsize=8)
    return png(figure)


def solvers() -> bytes:
    """One x_T by every sampler without noise, with more and more network calls."""
    counts, seed, label = [1, 2, 3, 5, 8, 10, 20, 50], 26, 8
    rows = {name: [draw(model().plan(name, steps), [seed], [label])[0] for steps in counts] for name in SOLVERS}
    return table(rows, [str(steps) for steps in counts], across="network calls an image")


SCALES = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 5.0, 10.0]


def guidance() -> bytes:
    """The same four x_T with rising guidance."""
    seeds, label = [3, 4, 5, 6], 4
    images = [draw(model().plan("dpmpp_2m"), seeds, [label] * 4, scale) for scale in SCALES]
    rows = {f"seed {seed}": [column[i] for column in images] for i, seed in enumerate(seeds)}
    return table(rows, [f"s = {scale:g}" for scale in SCALES])


def guidance_curves() -> bytes:
    """Label accuracy and the spread of the images of a class, against guidance."""
    reader = classifier.load(ROOT / "weights" / "mnist-classifier").net
    labels = torch.arange(100) % 10
    right, spread = [], []
    for scale in SCALES:
        images = draw(model().plan("dpmpp_2m", 6), range(100), labels.tolist(), scale)
        with torch.inference_mode():
            right.append(float((reader(images).argmax(1) == labels).float().mean()))
        spread.append(np.mean([rms(images[labels == c] - images[labels == c].mean(0)) for c in range(10)]))
    figure, (left, other) = plt.subplots(1, 2, figsize=(9, 3))
    left.plot(SCALES, right, marker=".")
    left.set(xlabel="guidance scale s", ylabel="share read as the label asked for", ylim=(0, 1.05))
    other.plot(SCALES, spread, marker=".")
    other.set(xlabel="guidance scale s", ylabel="spread within a class (rms a pixel)", ylim=(0, None))
    for axes in (left, other):
        axes.axvline(1, color="black", linestyle="--", linewidth=0.8)
    return png(figure)


def noise_stream() -> bytes:
    """The noise of three seeds at six places, and how the numbers are spread."""
    figure = plt.figure(figsize=(8.6, 2.8))
    layout = figure.add_gridspec(3, 9)
    for row, seed in enumerate((1, 2, 3)):
        for k in range(6):
            axes = figure.add_subplot(layout[row, k])
            show(axes, noise(seed, k, (1, 28, 28)) / 2)
            if row == 0:
                axes.set_title("k = 0: x_T" if k == 0 else f"k = {k}", fontsize=8)
            if k == 0:
                axes.set_ylabel(f"seed {seed}", rotation=0, ha="right", va="center")
    axes = figure.add_subplot(layout[:, 6:])
    values = torch.cat([noise(seed, k, (784,)) for seed in range(20) for k in range(6)]).numpy()
    axes.hist(values, bins=80, range=(-4, 4), density=True, alpha=0.6, label="94,080 numbers")
    x = np.linspace(-4, 4, 200)
    axes.plot(x, np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi), label="N(0, 1)")
    axes.set(xlabel="value", ylabel="density", ylim=(0, 0.5))
    axes.legend(fontsize=8, loc="upper right")
    return png(figure)


def stops() -> bytes:
    """Where ten steps stop by every spacing, in t and in log-SNR."""
    schedule: NoiseSchedule = model().schedule
    figure, (in_t, in_snr) = plt.subplots(1, 2, figsize=(9, 2.8), sharey=True)
    found = {name: spacings.timesteps(schedule, 10, name) for name in ("leading", "trailing", "linspace", "quadratic")}
    found |= {"log_snr": spacings.timesteps(schedule, 10, "log_snr"), "learned": model().learned[5].timesteps}
    names = [f"{name} ({len(t)})" for name, t in found.items()]
    for y, t in enumerate(found.values()):
        in_t.plot(t, [y] * len(t), "o", markersize=5)
        in_snr.plot(-np.log(1 / schedule.alpha_bar_at(t) - 1), [y] * len(t), "o", markersize=5)
    in_t.set(xlabel="timestep t (the chain goes from right to left)", xlim=(-30, 1030))
    in_t.set_yticks(range(len(names)), names)
    in_t.invert_yaxis()
    in_snr.set(xlabel="log SNR (the chain goes from left to right)")
    return png(figure)


PICTURES: dict[str, Callable[[], bytes]] = {
    "forward.png": forward,
    "schedules.png": schedule_curves,
    "schedule-images.png": schedule_images,
    "posterior.png": posterior,
    "predictions.png": predictions,
    "prediction-errors.png": prediction_errors,
    "unet.png": levels,
    "embedding.png": embedding,
    "loss-terms.png": loss_terms,
    "chain.png": chain,
    "eta.png": eta,
    "order.png": order,
    "solvers.png": solvers,
    "guidance.png": guidance,
    "guidance-curves.png": guidance_curves,
    "noise.png": noise_stream,
    "spacings.png": stops,
}


def make(name: str) -> bytes:
    with plt.rc_context(STYLE):
        return PICTURES[name]()


def main(names: Sequence[str]) -> None:
    for name in names or PICTURES:
        start = time.monotonic()
        content = make(name)
        (OUT / name).write_bytes(content)
        print(f"{name}: {len(content) / 1000:.0f} kB, {time.monotonic() - start:.1f} s", flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
