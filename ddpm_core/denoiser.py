"""From what a network says to x_0_hat: prediction type, classifier-free guidance, clipping. Row by row."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from ddpm_core.diffusion import Prediction, to_x_0
from ddpm_core.network import Network


@dataclasses.dataclass(frozen=True)
class Thresholding:
    """Dynamic thresholding of x_0_hat; Saharia et al. 2022 (arXiv 2205.11487), section 2.3."""

    ratio: float  # the quantile s of |x_0_hat|, 0 .. 1, that clips and becomes 1
    most: float  # s is held to 1 .. most

    def __call__(self, x_0_hat: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W), each row by its own s."""
        rows = [torch.quantile(row, self.ratio) for row in x_0_hat.abs().flatten(1)]  # of any number of rows
        s = torch.stack(rows).clamp(1, self.most)[:, None, None, None]
        return x_0_hat.clamp(-s, s) / s


@dataclasses.dataclass(frozen=True)
class Denoiser:
    """A network of any prediction type as x_0_hat(x_t, t, label)."""

    network: Network
    prediction: Prediction
    clip: float | Thresholding | None  # x_0_hat is clipped to +-clip; None: not at all
    null_label: int | None  # the index that means "no label"; None: there is none
    needs_label: bool = False  # the network takes labels and no row may be without one

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
            ValueError: labels for a network that takes none, none for one that needs them, or guidance without a
                "no label".
        """
        guided = None if guidance_scale is None else (guidance_scale != 1).nonzero().flatten()
        if self.null_label is None:
            if guided is not None and len(guided):
                raise ValueError(f"{self._kind}: it takes no guidance")
            if (labels is None) == self.needs_label:
                raise ValueError(f"{self._kind}: {'every row needs one' if self.needs_label else 'it takes no labels'}")
            output = self.network(x_t, t, labels)
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
        if isinstance(self.clip, Thresholding):
            return self.clip(x_0_hat)
        return x_0_hat if self.clip is None else x_0_hat.clamp(-self.clip, self.clip)

    @property
    def _kind(self) -> str:
        return 'this network knows no "no label"' if self.needs_label else "this network is unconditional"
