"""L_simple, the loss of denoising: what a network is trained on from images, as the recipe has it."""

from __future__ import annotations

import torch
from torch import Tensor

from ddpm_core import augmentation, data, diffusion
from ddpm_core.parallel import ONE, Ranks
from ddpm_core.recipe import Recipe, batch_indices, sample_timesteps, seed_of
from ddpm_core.schedules import NoiseSchedule
from ddpm_core.training import Predict


def snr_weights(prediction: diffusion.Prediction, snr: Tensor, gamma: float) -> Tensor:
    """Min-SNR-gamma weights of the squared error of each prediction type; section 3.4 of Hang et al. 2023. (B,)."""
    clipped = snr.clamp(max=gamma)
    return {"epsilon": clipped / snr, "sample": clipped, "v_prediction": clipped / (snr + 1)}[prediction]


class DenoisingLoss:
    """E ||target - prediction||^2, equation 14 of Ho et al. 2020, weighted and guided where the recipe says so.

    Raises:
        ValueError: the recipe asks for what this network or these images do not allow.
    """

    def __init__(
        self,
        images: data.ImageSet,
        schedule: NoiseSchedule,
        prediction: diffusion.Prediction,
        recipe: Recipe,
        *,
        null_label: int | None,  # None: the network takes no labels
        device: torch.device,
        ranks: Ranks = ONE,
    ) -> None:
        if recipe.guidance_scale != 1 and null_label is None:
            raise ValueError(f"guidance_scale={recipe.guidance_scale} needs a network with labels")
        height, width = images.images.shape[2:]
        if recipe.shift >= min(height, width):
            raise ValueError(f"shift={recipe.shift} must be less than the images' {width} x {height} pixels")
        self.recipe, self.prediction, self.null_label, self.device = recipe, prediction, null_label, device
        # What is random is drawn for the whole batch, so that all ranks draw the same; these rows of it are computed.
        self.rows = ranks.share(recipe.batch_size)
        self.images, self.labels = images.images.to(device), images.labels.to(device)
        self.alphas_cumprod = torch.from_numpy(schedule.alphas_cumprod).to(device)
        self.snr = torch.from_numpy(schedule.snr).to(device)

    def augmented(self, images: Tensor, step: int) -> Tensor:
        """This rank's rows of a batch, (b, C, H, W), moved and mirrored where the recipe says so."""
        r = self.recipe
        if not (r.flip or r.shift):
            return images
        generator = torch.Generator(self.device).manual_seed(seed_of(r.seed, "augmentation", step))
        return augmentation.flip_and_shift(
            images, flip=r.flip, shift=r.shift, generator=generator, batch_size=r.batch_size, part=self.rows
        )

    def __call__(self, predict: Predict, step: int) -> Tensor:
        r, device, rows = self.recipe, self.device, self.rows
        index = batch_indices(r, step, len(self.images))[rows].to(device)
        generator = torch.Generator(device).manual_seed(seed_of(r.seed, "loss", step))
        x_0 = data.to_unit(self.augmented(self.images[index], step))
        t = sample_timesteps(r, len(self.alphas_cumprod), generator)[rows]
        eps = torch.randn((r.batch_size, *x_0.shape[1:]), generator=generator, device=device)[rows]
        alpha_bar = self.alphas_cumprod[t]
        x_t = diffusion.q_sample(x_0, eps, alpha_bar).contiguous(memory_format=torch.channels_last)
        target = diffusion.target(self.prediction, x_0, eps, alpha_bar)
        if self.null_label is None:
            output = predict(x_t, t)
        else:
            drop = torch.rand(r.batch_size, generator=generator, device=device)[rows] < r.label_drop
            labels = torch.where(drop, self.null_label, self.labels[index])
            output = predict(x_t, t, labels)
            if r.guidance_scale != 1:
                with torch.no_grad():
                    unlabelled = predict(x_t, t, torch.full_like(labels, self.null_label))
                target = target + self.guidance(output, unlabelled)
        per_image = (output - target).square().flatten(1).mean(1)
        if r.min_snr_gamma:
            per_image = per_image * snr_weights(self.prediction, self.snr[t], r.min_snr_gamma).float()
        return per_image.mean()

    @torch.no_grad()
    def guidance(self, output: Tensor, unlabelled: Tensor) -> Tensor:
        """What is added to the target of images with a label, so that the network learns its own guided prediction.

        Wanted is g = u + s (c - u), c the mean of the target given the label and u without it. Where the network says
        g already, c + (1 - 1/s) (g - u) = g: so that much of the difference of its own two outputs is added. After
        Tang et al. 2025 (arXiv 2502.12154), whose weight w is 1 - 1/s; 0 where the label was dropped.
        """
        return (1 - 1 / self.recipe.guidance_scale) * (output - unlabelled)
