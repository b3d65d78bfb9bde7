"""From what a network says to x_0_hat: prediction type, classifier-free guidance, clipping. Row by row."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ddpm_core.diffusion import Prediction, to_x_0
from ddpm_core.network import Network


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network of any prediction type as x_0_hat(x_t, t, label)."""

    network: Network
    prediction: Prediction
    clip: float | None  # x_0_hat is clipped to +-clip; None: not at all
    null_label: int | None  # the index that means "no label"; None: the network takes no labels

    def __call__(
        self,
        x_t: Tensor,
        t: Tensor,
        alpha_bar: Tensor,
        labels: Tensor | None = None,
        guidance_scale: Tensor | None = None,
    ) -> Tensor:
        """x_0_hat of every row.

        Args:
            x_t: (B, C, H, W).
            t: (B,), what the network is told.
            alpha_bar: (B,) float64, at t.
            labels: (B,) long; None: "no label" for all.
            guidance_scale: (B,) s of eps_u + s (eps_c - eps_u), Ho and Salimans 2022; None: 1 for all.
                A row with s = 1 costs one network row, any other two.

        Raises:
            ValueError: labels or guidance for a network that takes none.
        """
        guided = None if guidance_scale is None else (guidance_scale != 1).nonzero().flatten()
        if self.null_label is None:
            if labels is not None or (guided is not None and len(guided)):
                raise ValueError("this network is unconditional: it takes neither labels nor guidance")
            output = self.network(x_t, t, None)
        else:
            if labels is None:
                labels = torch.full((len(x_t),), self.null_label, device=x_t.device)
            if guidance_scale is None or guided is None or not len(guided):
                output = self.network(x_t, t, labels)
            else:
                none = torch.full_like(guided, self.null_label)
                both = self.network(torch.cat([x_t, x_t[guided]]), torch.cat([t, t[guided]]), torch.cat([labels, none]))
                output, unconditional = both[: len(x_t)].clone(), both[len(x_t) :]
                s = guidance_scale[guided].to(x_t.dtype)[:, None, None, None]
                output[guided] = unconditional + s * (output[guided] - unconditional)
        x_0_hat = to_x_0(self.prediction, output, x_t, alpha_bar)
        return x_0_hat if self.clip is None else x_0_hat.clamp(-self.clip, self.clip)
