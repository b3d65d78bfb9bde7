"""Figures of sets of images, from their features or their pixels: tensors in, numbers out.

Nothing here knows models. Pairs are gone through in chunks, so that beside the images as
float32 (190 MB for MNIST's 60,000) only a few hundred MB are needed.
"""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ddpm_core import data

CHUNK = 500  # rows of a matrix of pairs that are there at once


def _check_features(a: Tensor, b: Tensor, least: int) -> None:
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (N, F) and (M, F) with one F, not {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < least:
        raise ValueError(f"each set needs at least {least} images, not {len(a)} and {len(b)}")


def frechet_distance(a: Tensor, b: Tensor) -> float:
    """The FID of Heusel et al. 2017 (arXiv 1706.08500), equation 6, of two sets of features.

    |m_a - m_b|^2 + tr(S_a + S_b - 2 (S_a S_b)^{1/2}), covariances with N - 1. S_a S_b has the eigenvalues of the
    symmetric S_a^{1/2} S_b S_a^{1/2}, so the last trace is the sum of their roots. The estimate is biased upward, the
    more the fewer images: compare figures of equal N only.

    Args:
        a: (N, F). b: (M, F).

    Raises:
        ValueError: a set of fewer than two, or sets of different F.
    """
    _check_features(a, b, least=2)
    (mean_a, cov_a), (mean_b, cov_b) = _moments(a), _moments(b)
    values, vectors = torch.linalg.eigh(cov_a)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T
    product = root @ cov_b @ root
    trace_of_root = torch.linalg.eigvalsh((product + product.T) / 2).clamp(min=0).sqrt().sum()
    distance = (mean_a - mean_b).square().sum() + cov_a.trace() + cov_b.trace() - 2 * trace_of_root
    return max(float(distance), 0.0)  # rounding can take equal sets below zero


def _moments(x: Tensor) -> tuple[Tensor, Tensor]:
    x = x.to(torch.float64)
    mean = x.mean(0)
    centred = x - mean
    return mean, centred.T @ centred / (len(x) - 1)


def kernel_distance(a: Tensor, b: Tensor) -> float:
    """The KID of Binkowski et al. 2018 (arXiv 1801.01401), section 4: unbiased MMD^2, k(x, y) = (x.y / F + 1)^3.

    One U-statistic over all pairs, where the paper takes the mean over small blocks: the same expectation, less
    variance. Its expectation does not depend on N; of sets of one distribution it is 0, so a value may be negative.

    Args:
        a: (N, F). b: (M, F).

    Raises:
        ValueError: a set of fewer than two, or sets of different F.
    """
    _check_features(a, b, least=2)
    a, b = a.to(torch.float64), b.to(torch.float64)
    n, m = len(a), len(b)
    within_a = (_kernel_sum(a, a) - _kernel(a.square().sum(1), a.shape[1])) / (n * (n - 1))
    within_b = (_kernel_sum(b, b) - _kernel(b.square().sum(1), b.shape[1])) / (m * (m - 1))
    return within_a + within_b - 2 * _kernel_sum(a, b) / (n * m)


def _kernel(products: Tensor, features: int) -> float:
    base = products / features + 1
    return float((base * base * base).sum())


def _kernel_sum(a: Tensor, b: Tensor) -> float:
    return sum(_kernel(chunk @ b.T, a.shape[1]) for chunk in torch.split(a, CHUNK))


def precision_recall(real: Tensor, generated: Tensor, *, k: int = 3) -> tuple[float, float]:
    """Improved precision and recall; Kynkaanniemi et al. 2019 (arXiv 1904.06991), equations 1 and 2.

    The manifold of a set is the union of balls round its points, each as far as that point's k-th nearest other.
    Precision is the share of generated points in the manifold of the real ones, recall the reverse. Both depend on N.

    Args:
        real: (N, F). generated: (M, F).
        k: which neighbour; 3 in the paper.

    Raises:
        ValueError: a set of k points or fewer, or sets of different F.
    """
    _check_features(real, generated, least=k + 1)
    real, generated = real.to(torch.float32), generated.to(torch.float32)
    real_radii, radii = _radii(real, k), _radii(generated, k)
    inside, covered = 0, torch.zeros(len(real), dtype=torch.bool)
    for points, reach in zip(torch.split(generated, CHUNK), torch.split(radii, CHUNK), strict=True):
        distances = torch.cdist(points, real)
        inside += int((distances <= real_radii).any(1).sum())
        covered |= (distances <= reach[:, None]).any(0)
    return inside / len(generated), float(covered.double().mean())


def _radii(x: Tensor, k: int) -> Tensor:
    """(N,) from each point to its k-th nearest other; the nearest of all is the point itself."""
    return torch.cat([torch.cdist(part, x).topk(k + 1, largest=False).values[:, -1] for part in torch.split(x, CHUNK)])


def nearest_distances(images: Tensor, references: Tensor) -> Tensor:
    """From each image to the nearest reference: L2 over pixels, where black to white counts as 1.

    Args:
        images: (N, C, H, W) uint8. references: (M, C, H, W) uint8, at least one.

    Returns:
        (N,) float64.

    Raises:
        ValueError: images of another shape, or no reference.
    """
    if images.shape[1:] != references.shape[1:] or not len(references):
        raise ValueError(f"images {tuple(images.shape)} cannot be held against references {tuple(references.shape)}")
    flat = data.to_unit(references).flatten(1) / 2
    squares, found = flat.square().sum(1), [torch.empty(0, dtype=torch.float64)]
    for part in torch.split(images, CHUNK):
        points = data.to_unit(part).flatten(1) / 2
        nearest = torch.addmm(squares, points, flat.T, alpha=-2).argmin(1)
        # |a|^2 - 2 ab + |b|^2 finds the neighbour, but rounds a distance of 0 to something else
        found.append((points - flat[nearest]).double().square().sum(1).sqrt())
    return torch.cat(found)


def near_copies(distances: Tensor, real_distances: Tensor, *, quantile: float = 0.01) -> float:
    """Share of generated images as near to a training image as the nearest 1 % of unseen real images are.

    A generator that memorises nothing and draws like the data has about 0.01, one that copies its training images 1.
    Images that are plainer than real ones (blurred, say) lie nearer without being copies: read it beside precision and
    recall.

    Args:
        distances: (N,) from generated images to the nearest training image, nearest_distances(...).
        real_distances: (M,) the same of images that were not trained on.
        quantile: of real_distances, which images of that set count as near.
    """
    return float((distances <= torch.quantile(real_distances, quantile)).double().mean())


@dataclasses.dataclass(frozen=True)
class ClassBalance:
    """How images are spread over the classes.

    chi_square is sum (count - expected)^2 / expected. Under the expected shares it stays below 27.9 in 99.9 % of
    cases where degrees_of_freedom = 9 (ten classes); its mean is degrees_of_freedom.
    """

    samples: int
    counts: tuple[int, ...]
    rarest_share: float
    commonest_share: float
    chi_square: float
    degrees_of_freedom: int


def class_balance(labels: Tensor, num_classes: int, expected_shares: Tensor | None = None) -> ClassBalance:
    """Counts labels by class.

    Args:
        labels: (N,) long, 0 .. num_classes - 1.
        num_classes: two or more.
        expected_shares: (num_classes,), all positive, as those of the training set; None: equal ones.

    Raises:
        ValueError: no labels, one outside its range, or shares that are none.
    """
    if num_classes < 2 or not len(labels):
        raise ValueError(f"class balance needs labels and at least 2 classes, not {len(labels)} and {num_classes}")
    if labels.min() < 0 or labels.max() >= num_classes:
        raise ValueError(f"labels must be 0 .. {num_classes - 1}")
    shares = torch.ones(num_classes) if expected_shares is None else expected_shares
    shares = shares.to(torch.float64) / shares.sum()
    if len(shares) != num_classes or not bool((shares > 0).all()):
        raise ValueError(f"expected_shares must be {num_classes} positive numbers")
    counts = torch.bincount(labels, minlength=num_classes)
    expected = shares * len(labels)
    return ClassBalance(
        samples=len(labels),
        counts=tuple(int(c) for c in counts),
        rarest_share=int(counts.min()) / len(labels),
        commonest_share=int(counts.max()) / len(labels),
        chi_square=float(((counts - expected).square() / expected).sum()),
        degrees_of_freedom=num_classes - 1,
    )
