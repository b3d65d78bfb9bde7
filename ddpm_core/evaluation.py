"""What the images of a model are worth: which ones are drawn, and what they are held against.

FID, KID, precision and recall, label accuracy and class balance live in the feature space of a classifier
(classifier.py), nearness to training images in that of pixels, bits per dimension in none. Every figure carries the
number of images behind it and its spread; beside it stands the floor, the same figure of real images.
"""

from __future__ import annotations

import dataclasses
import statistics
from collections.abc import Sequence

import torch
from torch import Tensor

from ddpm_core import data, metrics
from ddpm_core.checkpoint import Model
from ddpm_core.classifier import Classifier
from ddpm_core.likelihood import Bound
from ddpm_core.metrics import ClassBalance
from ddpm_core.parallel import ONE, Ranks
from ddpm_core.protocols import Protocol, bounds, draw, shuffled
from ddpm_core.sampling import OnBatch

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


@dataclasses.dataclass(frozen=True)
class Figure:
    """Mean and standard deviation (N - 1) of a figure over sets of images; spread is None where there is one set."""

    value: float
    spread: float | None
    sets: int
    samples: int  # a set


def over_sets(sets: Sequence[dict[str, float]], samples: int) -> dict[str, Figure]:
    """Figures of several sets of so many images, by name -> one Figure a name."""
    found = {}
    for name in sets[0]:
        values = [one[name] for one in sets]
        spread = statistics.stdev(values) if len(values) > 1 else None
        found[name] = Figure(statistics.fmean(values), spread, len(values), samples)
    return found


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """A model beside real images.

    generated and floor hold Figures by name: fid, kid, precision, recall, label_accuracy (not of a model that takes no
    labels), nearest_train_distance (median, see metrics.nearest_distances), near_copies. The floor is what sets of as
    many training images reach against the test images; its last two are of the test images against the training set.
    """

    generated: dict[str, Figure]
    floor: dict[str, Figure]
    balance: ClassBalance  # of images drawn without a label, all seeds together, against the shares of the training set
    test_bound: Bound | None  # None: a distilled network, which knows few timesteps, has none
    train_bound: Bound | None  # of images that were trained on: far below test_bound where a model overfits
    nfe: int  # network calls an image, guidance counted twice
    train_images: int
    test_images: int

    @property
    def fid_over_floor(self) -> float:
        return self.generated["fid"].value / max(self.floor["fid"].value, 1e-12)


def floor_sets(train: data.ImageSet, samples: int, seed: int) -> Tensor:
    """(sets, N) indices of disjoint sets of training images, N = samples as far as there are so many."""
    order = shuffled(train, seed)
    n = min(samples, len(order))
    return order[: len(order) // n * n].reshape(-1, n)[:FLOOR_SETS]


def quality(
    classifier_net: Classifier, images: Tensor, labels: Sequence[int | None], reference_features: Tensor
) -> dict[str, float]:
    """Every figure that a classifier's features give of images (N, C, H, W) uint8, by name.

    labels are those asked for; where one of them is None there is no label accuracy.
    """
    found, predicted = features(classifier_net, images)
    precision, recall = metrics.precision_recall(reference_features, found)
    figures = {
        "fid": metrics.frechet_distance(found, reference_features),
        "kid": metrics.kernel_distance(found, reference_features),
        "precision": precision,
        "recall": recall,
    }
    if None not in labels:
        figures["label_accuracy"] = float((predicted == torch.tensor(labels)).double().mean())
    return figures


def floor(
    classifier_net: Classifier, train: data.ImageSet, samples: int, seed: int, reference_features: Tensor
) -> dict[str, Figure]:
    """quality() of real images: of disjoint sets of so many training images."""
    sets = floor_sets(train, samples, seed)
    found = [quality(classifier_net, train.images[i], train.labels[i].tolist(), reference_features) for i in sets]
    return over_sets(found, sets.shape[1])


def evaluate(
    model: Model,
    classifier_net: Classifier,
    train: data.ImageSet,
    test: data.ImageSet,
    protocol: Protocol,
    device: torch.device,
    on_batch: OnBatch | None = None,
    ranks: Ranks = ONE,
) -> Evaluation:
    """Draws images and measures them.

    Args:
        model: what is measured.
        classifier_net: the feature space, on any device.
        train: gives the floor, the expected class shares, and what might have been memorised.
        test: what the figures compare with.
        protocol: how many images, and how.
        device: where the model runs.
        on_batch: called after every batch of images, drawn (repeats * (samples + unlabelled)) or bounded
            (bound_images of either part; none of a distilled model).
        ranks: which draw; this is rank 0, and the others assist().

    Raises:
        ValueError: model, classifier, data set and protocol do not fit each other.
    """
    plan = model.plan(protocol.sampler, protocol.steps)
    if model.null_label is None and protocol.guidance_scale != 1:
        raise ValueError(f'{model.name} knows no "no label": it takes no guidance')
    check_fit(model, classifier_net, test)
    reference_features, _ = features(classifier_net, test.images)
    real_distances = metrics.nearest_distances(test.images, train.images)

    def near(distances: Tensor) -> dict[str, float]:
        copies = metrics.near_copies(distances, real_distances)
        return {"nearest_train_distance": float(distances.median()), "near_copies": copies}

    n, sets, read_as = protocol.samples, [], []
    for asked, images, unlabelled in draw(model, train, protocol, device, on_batch, ranks):
        distances = metrics.nearest_distances(images, train.images)
        sets.append({**quality(classifier_net, images, asked, reference_features), **near(distances)})
        read_as.append(features(classifier_net, unlabelled)[1])
    test_bound, train_bound = bounds(model, (test, train), protocol, device, on_batch, ranks)

    guided = model.null_label is not None and protocol.guidance_scale != 1
    return Evaluation(
        generated=over_sets(sets, n),
        floor={
            **floor(classifier_net, train, n, protocol.seed, reference_features),
            **over_sets([near(real_distances)], len(test.images)),
        },
        balance=metrics.class_balance(
            torch.cat(read_as), test.num_classes, torch.bincount(train.labels, minlength=test.num_classes)
        ),
        test_bound=test_bound,
        train_bound=train_bound,
        nfe=len(plan) * (2 if guided else 1),
        train_images=len(train.images),
        test_images=len(test.images),
    )


def check_fit(model: Model, classifier_net: Classifier, images: data.ImageSet) -> None:
    """Raises ValueError where model, classifier and data set do not go together."""
    shape, channels = tuple(images.images.shape[1:]), next(classifier_net.parameters()).shape[1]
    if tuple(model.config.image_shape) != shape:
        raise ValueError(f"{model.name} draws images of {tuple(model.config.image_shape)}, {images.name} has {shape}")
    if model.takes_labels and model.num_classes != images.num_classes:
        raise ValueError(f"{model.name} has {model.num_classes} classes, {images.name} {images.num_classes}")
    if (channels, classifier_net.head.out_features) != (shape[0], images.num_classes):
        raise ValueError(
            f"the classifier takes {channels} channels and names {classifier_net.head.out_features} classes, "
            f"{images.name} has {shape[0]} and {images.num_classes}"
        )
