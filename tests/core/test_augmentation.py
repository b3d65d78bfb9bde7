"""Flips and shifts: what they do to a batch, how often, and that they leave all other randomness alone."""

from __future__ import annotations

import dataclasses

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from ddpm_core import data, schedules
from ddpm_core.augmentation import flip_and_shift
from ddpm_core.losses import DenoisingLoss
from ddpm_core.recipe import Recipe
from ddpm_core.training import Trainer
from ddpm_core.unet import UNet
from tests.networks import DIGITS

SCHEDULE = schedules.cosine(100)
CPU = torch.device("cpu")


def augment(images: Tensor, *, flip: bool = False, shift: int = 0, seed: int = 0) -> Tensor:
    return flip_and_shift(images, flip=flip, shift=shift, generator=torch.Generator().manual_seed(seed))


def images_of(count: int, shape: tuple[int, ...] = (3, 6, 5)) -> Tensor:
    return torch.randint(0, 256, (count, *shape), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def test_half_of_the_images_are_mirrored() -> None:
    """5 standard deviations of a fair coin thrown 4,000 times."""
    images = images_of(1).repeat(4000, 1, 1, 1)
    flipped = (augment(images, flip=True) == images.flip(3)).flatten(1).all(1)
    kept = (augment(images, flip=True) == images).flatten(1).all(1)
    assert torch.equal(flipped, ~kept)
    assert abs(int(flipped.sum()) - 2000) < 5 * 1000**0.5


@pytest.mark.parametrize("flip", [False, True])
def test_every_move_is_equally_likely_and_repeats_the_edge(flip: bool) -> None:
    """Each result is a window of the padded image. Chi-square: mean df, bound df + 5 sqrt(2 df)."""
    image, shift, n = images_of(1), 1, 4500
    padded = F.pad(image.float(), (shift,) * 4, mode="replicate").to(torch.uint8)
    sources = [padded, padded.flip(3)] if flip else [padded]
    windows = [
        source[0, :, top : top + 6, left : left + 5]
        for source in sources for top in range(3) for left in range(3)
    ]  # fmt: skip
    moved = augment(image.repeat(n, 1, 1, 1), flip=flip, shift=shift)
    counts = torch.tensor([int((moved == window).flatten(1).all(1).sum()) for window in windows])
    expected, df = n / len(windows), len(windows) - 1
    assert int(counts.sum()) == n
    assert float(((counts - expected) ** 2 / expected).sum()) < df + 5 * (2 * df) ** 0.5


def test_augmentation_is_a_function_of_its_generator_and_changes_no_argument() -> None:
    images = images_of(50)
    before = images.clone()
    assert torch.equal(augment(images, flip=True, shift=2), augment(images, flip=True, shift=2))
    assert not torch.equal(augment(images, flip=True, shift=2), augment(images, flip=True, shift=2, seed=1))
    assert torch.equal(images, before)


def loss_of(images: Tensor, recipe: Recipe) -> DenoisingLoss:
    whole = data.ImageSet("test", images, torch.zeros(len(images), dtype=torch.long), 1)
    return DenoisingLoss(whole, SCHEDULE, "epsilon", recipe, null_label=None, device=CPU)


def trainer_of(images: Tensor, recipe: Recipe) -> Trainer:
    torch.manual_seed(0)
    net = UNet(dataclasses.replace(DIGITS, sample_size=8, num_class_embeds=None, no_label=False))
    return Trainer(net, loss_of(images, recipe), recipe, device=CPU)


def test_off_is_free_and_on_leaves_timesteps_and_noise_alone() -> None:
    """Mirrored, a symmetric image is itself: the loss is the same to the bit with and without flips."""
    half = images_of(16, (1, 8, 4))
    images = torch.cat([half, half.flip(3)], 3)
    off = trainer_of(images, Recipe(steps=3, batch_size=8))
    on = trainer_of(images, Recipe(steps=3, batch_size=8, flip=True))
    assert loss_of(images, off.recipe).augmented(images, 0) is images
    assert float(on.loss().detach()) == float(off.loss().detach())


def test_each_step_and_seed_moves_images_otherwise() -> None:
    images, seen = images_of(16, (1, 8, 8)), []
    for seed in (0, 1):
        loss = loss_of(images, Recipe(steps=3, batch_size=8, shift=2, seed=seed))
        for step in range(3):
            assert torch.equal(loss.augmented(images[:8], step), loss.augmented(images[:8], step))
            seen.append(loss.augmented(images[:8], step))
    assert len(torch.stack(seen).unique(dim=0)) == 6


def test_an_augmented_run_that_was_resumed_ends_in_the_same_bits() -> None:
    images = images_of(24, (1, 8, 8))
    recipe = Recipe(steps=6, batch_size=8, warmup_steps=0, lr=1e-3, flip=True, shift=2)
    whole, first, second = (trainer_of(images, recipe) for _ in range(3))
    plain = trainer_of(images, dataclasses.replace(recipe, flip=False, shift=0))
    list(whole.train())
    list(plain.train())
    for _ in range(3):
        first.train_step()
    second.load_state_tensors({k: v.clone() for k, v in first.state_tensors().items()}, step=3, elapsed_s=0.0)
    list(second.train())
    assert all(torch.equal(v, second.ema.weights[k]) for k, v in whole.ema.weights.items())
    assert not torch.equal(plain.ema.weights["conv_in.weight"], whole.ema.weights["conv_in.weight"])


def test_a_shift_out_of_the_image_is_refused() -> None:
    with pytest.raises(ValueError, match="shift=8 must be less than the images' 8 x 8 pixels"):
        trainer_of(images_of(8, (1, 8, 8)), Recipe(steps=1, shift=8))
    with pytest.raises(ValueError, match="shift=-1 must be"):
        Recipe(steps=1, shift=-1)
