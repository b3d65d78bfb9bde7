"""What the images of a model are worth: Frechet distance, label accuracy, class balance. Tensors in, numbers out.

Every figure is measured in the feature space of a classifier (classifier.py) and carries the number of images behind
it; beside every figure of generated images stands the floor, the same figure of real ones.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from ddpm_core import data
from ddpm_core.checkpoint import Model
from ddpm_core.classifier import Classifier
from ddpm_core.sampling import OnBatch, generate

FEATURE_BATCH = 500
FLOOR_SETS = 5  # one set's FID varies by a third with the choice of its images


@torch.inference_mode()
def features(classifier_net: Classifier, images_uint8: Tensor) -> tuple[Tensor, Tensor]:
    """What a classifier sees in images.

    Args:
        classifier_net: in evaluation mode, on any device.
        images_uint8: (N, C, H, W).

    Returns:
        Features (N, F) float64 and predicted labels (N,) long, both on the CPU.
    """
    device = next(classifier_net.parameters()).device
    found, labels = [], []
    for start in range(0, len(images_uint8), FEATURE_BATCH):
        x = data.to_unit(images_uint8[start : start + FEATURE_BATCH].to(device))
        batch_features = classifier_net.features(x.contiguous(memory_format=torch.channels_last))
        found.append(batch_features.to("cpu", torch.float64))
        labels.append(classifier_net.head(batch_features).argmax(1).cpu())
    return torch.cat(found), torch.cat(labels)


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
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"features must be (N, F) and (M, F) with one F, not {tuple(a.shape)} and {tuple(b.shape)}")
    if min(len(a), len(b)) < 2:
        raise ValueError(f"a covariance needs at least 2 images a set, not {len(a)} and {len(b)}")
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


@dataclasses.dataclass(frozen=True)
class Quality:
    """FID against reference_samples test images, and the share of images whose label the classifier names.

    Of several disjoint sets of images: the means.
    """

    samples: int  # a set
    sets: int
    reference_samples: int
    fid: float
    label_accuracy: float | None  # None: the model takes no labels

    def to_dict(self) -> dict[str, Any]:
        """The two figures by name, each with its number of images."""
        counts = {"samples": self.samples, "sets": self.sets}
        return {
            "fid": {"value": self.fid, **counts, "reference_samples": self.reference_samples},
            "label_accuracy": {"value": self.label_accuracy, **counts},
        }


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model beside real images: the floor is what sets of as many training images reach."""

    generated: Quality
    floor: Quality
    balance: ClassBalance  # of images drawn without a label, against the shares of the training set
    nfe: int  # network calls an image, guidance counted twice

    @property
    def fid_over_floor(self) -> float:
        return self.generated.fid / max(self.floor.fid, 1e-12)


@dataclasses.dataclass(frozen=True)
class Protocol:
    """What is drawn and how.

    Image i of the samples has the seed `seed + i` and the label of a training image, so that the classes have the
    data's own shares: equal shares would cost a perfect model as much FID as the floor has. After them come a fifth as
    many with "no label". The floor is the mean over up to FLOOR_SETS disjoint sets of `samples` training images; where
    there are fewer images, over all of them. Which ones is fixed by `seed`.
    """

    samples: int = 10_000
    sampler: str = "balanced"
    steps: int | None = None
    guidance_scale: float = 1.0
    seed: int = 0

    @property
    def how(self) -> dict[str, Any]:
        """What sampling.generate needs to know besides seeds and labels."""
        return {"sampler": self.sampler, "steps": self.steps, "guidance_scale": self.guidance_scale}

    @property
    def unlabelled(self) -> int:
        """How many images are drawn without a label."""
        return self.samples // 5


def quality(
    classifier_net: Classifier, sets: Sequence[tuple[Tensor, Tensor | None]], reference_features: Tensor
) -> Quality:
    """FID and label accuracy of sets of images (N, C, H, W) uint8 with labels (N,) or none, all of one N."""
    fids, rights = [], []
    for images, labels in sets:
        found, predicted = features(classifier_net, images)
        fids.append(frechet_distance(found, reference_features))
        if labels is not None:
            rights.append(float((predicted == labels).double().mean()))
    return Quality(
        samples=len(sets[0][0]),
        sets=len(sets),
        reference_samples=len(reference_features),
        fid=sum(fids) / len(fids),
        label_accuracy=sum(rights) / len(rights) if rights else None,
    )


def evaluate(
    model: Model,
    classifier_net: Classifier,
    train: data.ImageSet,
    test: data.ImageSet,
    protocol: Protocol,
    device: torch.device,
    on_batch: OnBatch | None = None,
) -> Evaluation:
    """Draws images and measures them.

    Args:
        model: what is measured.
        classifier_net: the feature space, on any device.
        train: gives the floor and the expected class shares.
        test: what FID compares with.
        protocol: how many images, and how.
        device: where the model runs.
        on_batch: called after every batch of samples + unlabelled images.

    Raises:
        ValueError: model, classifier and data set do not fit each other.
    """
    check_fit(model, classifier_net, test, protocol)
    n, classes, labelled = protocol.samples, test.num_classes, model.null_label is not None
    order = torch.randperm(len(train.images), generator=torch.Generator().manual_seed(protocol.seed))
    labels = train.labels[order].repeat(-(-n // len(order)))[:n] if labelled else None
    asked: list[int | None] = [None] * n if labels is None else labels.tolist()
    seeds = range(protocol.seed, protocol.seed + n)
    images = generate(model, device, seeds, asked, **protocol.how, on_batch=on_batch)
    more_seeds = range(seeds.stop, seeds.stop + protocol.unlabelled)
    unlabelled = generate(model, device, more_seeds, [None] * protocol.unlabelled, **protocol.how, on_batch=on_batch)

    reference_features, _ = features(classifier_net, test.images)
    floor_n = min(n, len(order))
    floor_sets = order[: len(order) // floor_n * floor_n].reshape(-1, floor_n)[:FLOOR_SETS]
    shares = torch.bincount(train.labels, minlength=classes)
    guided = labelled and protocol.guidance_scale != 1
    return Evaluation(
        generated=quality(classifier_net, [(images, labels)], reference_features),
        floor=quality(classifier_net, [(train.images[i], train.labels[i]) for i in floor_sets], reference_features),
        balance=class_balance(features(classifier_net, unlabelled)[1], classes, shares),
        nfe=len(model.plan(protocol.sampler, protocol.steps)) * (2 if guided else 1),
    )


def check_fit(model: Model, classifier_net: Classifier, images: data.ImageSet, protocol: Protocol) -> None:
    """Raises ValueError where model, classifier, data set and protocol do not go together."""
    model.plan(protocol.sampler, protocol.steps)
    if model.null_label is None and protocol.guidance_scale != 1:
        raise ValueError(f"{model.name} is unconditional: it takes no guidance")
    shape, channels = tuple(images.images.shape[1:]), next(classifier_net.parameters()).shape[1]
    if tuple(model.config.image_shape) != shape:
        raise ValueError(f"{model.name} draws images of {tuple(model.config.image_shape)}, {images.name} has {shape}")
    if model.null_label is not None and model.config.num_classes != images.num_classes:
        raise ValueError(f"{model.name} has {model.config.num_classes} classes, {images.name} {images.num_classes}")
    if (channels, classifier_net.head.out_features) != (shape[0], images.num_classes):
        raise ValueError(
            f"the classifier takes {channels} channels and names {classifier_net.head.out_features} classes, "
            f"{images.name} has {shape[0]} and {images.num_classes}"
        )
