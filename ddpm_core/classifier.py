"""The classifier whose features the metrics live in, and its training: `python -m ddpm_core.classifier --help`.

Inception features mean nothing on digits, so FID, label accuracy and class balance are measured in the penultimate
layer of a network trained on the data set itself. Figures are comparable only between runs that use the same weights:
every report names their sha256.
"""

from __future__ import annotations

import argparse
import dataclasses
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save
from torch import Tensor, nn
from torch.nn import functional as F

from ddpm_core import checkpoint, data, data_arguments
from ddpm_core.parallel import one_process

PROG = "python -m ddpm_core.classifier"

FEATURES = 128


class Classifier(nn.Module):
    """Convolutions to FEATURES numbers an image, then one linear layer to the classes."""

    def __init__(self, channels: int, num_classes: int) -> None:
        super().__init__()

        def block(c_in: int, c_out: int, stride: int) -> nn.Sequential:
            return nn.Sequential(nn.Conv2d(c_in, c_out, 3, stride, 1, bias=False), nn.BatchNorm2d(c_out), nn.ReLU())

        self.body = nn.Sequential(
            block(channels, 32, 1), block(32, 32, 2), block(32, 64, 1), block(64, 64, 2), block(64, FEATURES, 1),
            nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * FEATURES, FEATURES), nn.ReLU(),
        )  # fmt: skip
        self.head = nn.Linear(FEATURES, num_classes)

    def features(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> (B, FEATURES), the penultimate layer."""
        out: Tensor = self.body(x)
        return out

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) in [-1, 1] -> logits (B, num_classes)."""
        out: Tensor = self.head(F.dropout(self.features(x), 0.3, self.training))
        return out


def augment(x: Tensor, generator: torch.Generator) -> Tensor:
    """Small random rotations, scalings and shifts, edges filled with the image's border."""
    n = len(x)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(n, generator=generator)

    angle, size = uniform(-0.2, 0.2), uniform(0.9, 1.1)
    cos, sin = angle.cos() * size, angle.sin() * size
    rows = [torch.stack([cos, -sin, uniform(-0.1, 0.1)], 1), torch.stack([sin, cos, uniform(-0.1, 0.1)], 1)]
    grid = F.affine_grid(torch.stack(rows, 1), list(x.shape), align_corners=False)
    return F.grid_sample(x, grid, padding_mode="border", align_corners=False)


@torch.no_grad()
def accuracy(net: Classifier, images: data.ImageSet) -> float:
    """Share of images whose label the network names."""
    net.eval()
    right = 0
    for i in range(0, len(images.images), 500):
        predicted = net(data.to_unit(images.images[i : i + 500])).argmax(1)
        right += int((predicted == images.labels[i : i + 500]).sum())
    return right / len(images.images)


def fit(images: data.ImageSet, *, epochs: int, batch_size: int = 128, lr: float = 3e-3, seed: int = 0) -> Classifier:
    """Trains a classifier: AdamW, one learning-rate cycle, augmentation. The same seed gives the same weights.

    Raises:
        ValueError: the images have fewer than two classes.
    """
    if images.num_classes < 2:
        raise ValueError(f"{images.name} has {images.num_classes} classes; a classifier needs 2 or more")
    batch_size = min(batch_size, len(images.images))
    with torch.random.fork_rng([]):
        torch.manual_seed(seed)
        net = Classifier(images.images.shape[1], images.num_classes).to(memory_format=torch.channels_last).train()
        generator = torch.Generator().manual_seed(seed)
        steps = epochs * (len(images.images) // batch_size)
        optimizer = torch.optim.AdamW(net.parameters(), lr=lr, weight_decay=0.05)
        lr_schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=max(steps, 2))
        for epoch in range(epochs):
            order = torch.randperm(len(images.images), generator=generator)
            for i in range(0, len(order) - batch_size + 1, batch_size):
                index = order[i : i + batch_size]
                x = augment(data.to_unit(images.images[index]), generator)
                loss = F.cross_entropy(net(x), images.labels[index], label_smoothing=0.05)
                optimizer.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                optimizer.step()
                lr_schedule.step()
            print(f"epoch {epoch + 1}/{epochs}  loss {float(loss.detach()):.4f}", flush=True)
    return net.eval().requires_grad_(False)


@dataclasses.dataclass(frozen=True)
class LoadedClassifier:
    """A classifier from disk and the sha256 that names its feature space."""

    net: Classifier
    sha256: str


def load(directory: Path) -> LoadedClassifier:
    """Reads what `python -m ddpm_core.classifier` wrote. Raises CheckpointError where it cannot."""
    card = checkpoint.read_json(directory / "card.json")
    path = directory / "classifier.safetensors"
    if not path.is_file():
        raise checkpoint.CheckpointError(f"{path} is missing: train it with `python -m ddpm_core.classifier`")
    digest = checkpoint.sha256_of(path)
    if digest != card.get("sha256"):
        raise checkpoint.CheckpointError(f"{path} has sha256 {digest}, its card.json says {card.get('sha256')}")
    try:
        net = Classifier(card["channels"], card["num_classes"])
        net.load_state_dict(load_file(path))
    except (KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise checkpoint.CheckpointError(f"{directory}: the weights do not fit card.json: {error!r}") from error
    return LoadedClassifier(net.to(memory_format=torch.channels_last).eval().requires_grad_(False), digest)


@one_process
def main(argv: list[str] | None = None, prog: str = PROG) -> int:
    parser = argparse.ArgumentParser(prog=prog, description=__doc__.split("\n")[0])
    data_arguments.add_data_arguments(parser)
    parser.set_defaults(**data_arguments.DEFAULTS)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=None, help="default: weights/<data>-classifier")
    args = parser.parse_args(argv)
    try:
        out = data_arguments.classifier_of(vars(args), args.out, "--out")
        train, test = (data_arguments.load(vars(args), train=part) for part in (True, False))
        net = fit(train, epochs=args.epochs, seed=args.seed)
        content = save({k: v.contiguous() for k, v in net.state_dict().items()})
        checkpoint.write_atomically(out / "classifier.safetensors", content)
        card = {
            "data": args.data,
            "channels": train.images.shape[1],
            "num_classes": train.num_classes,
            "features": FEATURES,
            "epochs": args.epochs,
            "seed": args.seed,
            "train_images": len(train.images),
            "test_images": len(test.images),
            "test_accuracy": accuracy(net, test),
            "sha256": checkpoint.sha256_of(out / "classifier.safetensors"),
        }
        checkpoint.write_atomically(out / "card.json", checkpoint.to_json(card))
    except (OSError, ValueError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{out}: test accuracy {card['test_accuracy']:.4f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
