"""Bits per dimension: the variational bound of Ho et al. 2020 (arXiv 2006.11239), equations 5 and 13.

The bound is that of the ancestral chain on all T timesteps with the variance that the model's config names, whatever
sampler draws its images. Here t = 0 .. T-1, t = 0 being one noising step (the paper's t = 1).
"""

from __future__ import annotations

import dataclasses
import itertools
import math

import numpy as np
import torch
from torch import Tensor

from ddpm_core import data, diffusion
from ddpm_core.checkpoint import Model
from ddpm_core.denoiser import Denoiser
from ddpm_core.parallel import ONE, Ranks
from ddpm_core.plans import Variance
from ddpm_core.sampling import OnBatch
from ddpm_core.schedules import NoiseSchedule

HALF_BIN = data.LEVEL / 2


@dataclasses.dataclass(frozen=True)
class Bound:
    """Mean over images of the bound on -log2 p(x_0) / (C H W), and its standard error over them."""

    value: float
    standard_error: float
    samples: int
    calls: int  # network calls an image


def prior_kl(x_0: Tensor, alpha_bar: float) -> Tensor:
    """KL(q(x_T | x_0) || N(0, I)), the L_T of equation 5, in nats: (B, C, H, W) in [-1, 1] -> (B,) float64.

    Args:
        x_0: the images.
        alpha_bar: at the last timestep.
    """
    mean_square = alpha_bar * x_0.double().square()
    return (0.5 * (mean_square - alpha_bar - math.log1p(-alpha_bar))).flatten(1).sum(1)


def discretised_log_likelihood(x_0: Tensor, mean: Tensor, std: Tensor | float) -> Tensor:
    """log of the mass that N(mean, std^2) puts on each pixel's grey level; equation 13. Never clamped.

    Args:
        x_0: grey levels as data.to_unit has them; the bins of the darkest and the lightest reach to infinity.
        mean: as x_0. std: a number, or broadcast over them.

    Returns:
        As x_0, float64, in nats. Over all 256 levels the exponentials sum to 1.
    """
    offset = x_0.double() - mean.double()
    low = torch.where(x_0 < -1 + HALF_BIN, -math.inf, (offset - HALF_BIN) / std)
    high = torch.where(x_0 > 1 - HALF_BIN, math.inf, (offset + HALF_BIN) / std)
    # in the upper tail both ends round to 1: there the mirrored bin is measured
    low, high = torch.where(offset > 0, -high, low), torch.where(offset > 0, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    mass: Tensor = log_high + torch.log1p(-torch.exp(log_low - log_high))
    return mass


def bound_terms(
    denoiser: Denoiser,
    schedule: NoiseSchedule,
    variance: Variance,
    x_0: Tensor,
    t: Tensor,
    eps: Tensor,
    labels: Tensor | None,
) -> Tensor:
    """The terms of equation 5 that ask the network, one t a row, at x_t of this eps.

    t > 0 is KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)); t = 0 is -log p(x_0 | x_1) of equation 13, whose standard
    deviation is that of the step before it, as in the paper's code: its own posterior has none.

    Args:
        denoiser: x_t -> x_0_hat.
        schedule: T timesteps.
        variance: of p: fixed_small is the posterior variance, fixed_large is beta.
        x_0: (B, C, H, W) in [-1, 1].
        t: (B,) long, 0 .. T-1, all 0 or none.
        eps: (B, C, H, W) standard normal.
        labels: (B,) long or None.

    Returns:
        (B,) float64, in nats.
    """
    alpha_bars = torch.from_numpy(schedule.alphas_cumprod.copy()).to(x_0.device)
    abar = alpha_bars[t]
    x_t = diffusion.q_sample(x_0, eps, abar)
    x_0_hat = denoiser(x_t, t.double(), abar, labels)
    if not t.any():
        return -discretised_log_likelihood(x_0, x_0_hat, _decoder_std(schedule)).flatten(1).sum(1)
    x_0, x_t, x_0_hat = x_0.double(), x_t.double(), x_0_hat.double()
    mean, posterior_variance = diffusion.posterior(x_0, x_t, abar, alpha_bars[t - 1])
    mean_hat, _ = diffusion.posterior(x_0_hat, x_t, abar, alpha_bars[t - 1])
    beta = (1 - abar / alpha_bars[t - 1])[:, None, None, None]
    model_variance = posterior_variance if variance == "fixed_small" else beta
    ratio = posterior_variance / model_variance
    kl = 0.5 * (ratio - 1 - ratio.log() + (mean - mean_hat).square() / model_variance)
    return kl.flatten(1).sum(1)


def _decoder_std(schedule: NoiseSchedule) -> float:
    """Root of the posterior variance of t = 1; of beta_0 where there is no t = 1."""
    betas, alpha_bars = schedule.betas, schedule.alphas_cumprod
    return math.sqrt(betas[1] * (1 - alpha_bars[0]) / (1 - alpha_bars[1]) if len(betas) > 1 else betas[0])


def strata(num_train_steps: int, calls: int) -> list[tuple[int, int]]:
    """0 alone, and 1 .. T-1 cut into at most calls - 1 ranges [low, high), each longer than the last by one factor.

    The terms fall about as 1 / t, so that within such a range they differ by that factor at most.
    """
    count = min(calls, num_train_steps)
    edges = np.maximum(np.floor(np.geomspace(1, num_train_steps, count)), np.arange(1, count + 1)).astype(int).tolist()
    return [(0, 1), *itertools.pairwise(edges)]


@torch.inference_mode()
def bits_per_dimension(
    model: Model,
    device: torch.device,
    images: Tensor,
    labels: Tensor | None,
    *,
    calls: int = 10,
    seed: int = 0,
    batch_size: int = 250,
    on_batch: OnBatch | None = None,
    ranks: Ranks = ONE,
) -> Bound:
    """The bound of images by stratified Monte Carlo over t.

    Each image gets the prior's KL in closed form, the term of t = 0, and one t drawn evenly from each of calls - 1
    ranges of 1 .. T-1, its term counted as often as the range is long: the expectation is the whole sum. Images draw
    their own t and eps, so the standard error over images holds the noise of the estimate and that of their choice.

    Args:
        model: what is measured.
        device: where.
        images: (N, C, H, W) uint8, two or more.
        labels: (N,) long: the bound is on p(x_0 | label). None: "no label", or a model that takes none.
        calls: network calls an image, 2 or more; T and more are the sum itself, with one eps a term.
        seed: of t and eps.
        batch_size: images at once.
        on_batch: called after every batch of images.
        ranks: which bound the batches in turn; each draws the t and eps of all.

    Raises:
        ValueError: fewer than two images or calls.
        FloatingPointError: the network returned NaN or infinity.
    """
    if len(images) < 2 or calls < 2:
        raise ValueError(f"the bound needs at least 2 images and 2 calls an image, not {len(images)} and {calls}")
    denoiser, schedule = model.denoiser(model.network(device)), model.schedule
    ranges = strata(schedule.num_train_steps, calls)
    generator = torch.Generator().manual_seed(seed)

    def share() -> Tensor:
        nats = [torch.empty(0, dtype=torch.float64)]
        for number, start in enumerate(range(0, len(images), batch_size)):
            mine = number % ranks.world == ranks.rank
            x_0 = data.to_unit(images[start : start + batch_size]).to(device)
            batch_labels = None if labels is None else labels[start : start + batch_size].to(device)
            total = prior_kl(x_0, float(schedule.alphas_cumprod[-1]))
            for low, high in ranges:
                t = torch.randint(low, high, (len(x_0),), generator=generator)
                eps = torch.randn(x_0.shape, generator=generator)
                if mine:
                    total += (high - low) * bound_terms(
                        denoiser,
                        schedule,
                        model.scheduler.variance_type,
                        x_0,
                        t.to(device),
                        eps.to(device),
                        batch_labels,
                    )
            if mine:
                nats.append(total.cpu())
            if on_batch is not None:
                on_batch(len(x_0))
        found = torch.cat(nats) / math.log(2) / images[0].numel()
        if not bool(torch.isfinite(found).all()):
            raise FloatingPointError(f"{model.name} returned numbers that are not finite")
        return found

    bits = ranks.in_order(ranks.agree(share), batch_size)
    return Bound(float(bits.mean()), float(bits.std()) / math.sqrt(len(bits)), len(bits), len(ranges))
