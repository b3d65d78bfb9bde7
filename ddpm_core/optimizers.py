"""What changes the weights: AdamW, or Muon for the layers' matrices and AdamW for the rest."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Literal

import torch
from torch import Tensor, nn

Name = Literal["adamw", "muon"]
OUTER = ("conv_in.weight", "conv_out.weight", "class_embedding.weight")  # first, last, embedding: not for Muon


def as_matrix(weight: Tensor) -> Tensor:
    """A layer's weight as (outputs, inputs), those of a convolution in the order that channels-last memory has."""
    return weight.permute(0, 2, 3, 1).flatten(1) if weight.ndim == 4 else weight


class Muon(torch.optim.Muon):
    """torch's Muon (Jordan et al. 2024), which takes matrices alone, for convolutions too: on views of their weights.

    Its updates are scaled to the size of AdamW's (Liu et al. 2025, arXiv 2502.16982): one learning rate serves both.
    """

    def __init__(self, weights: Iterable[nn.Parameter], *, weight_decay: float) -> None:
        self.views = [(weight, nn.Parameter(as_matrix(weight.detach()))) for weight in weights]
        if any(view.data_ptr() != weight.data_ptr() for weight, view in self.views):
            raise ValueError("a weight is not in channels-last memory: Muon would train a copy of it")
        matrices = [view for _, view in self.views]
        super().__init__(matrices, lr=0.0, weight_decay=weight_decay, adjust_lr_fn="match_rms_adamw")

    def step(self, closure: None = None) -> None:  # type: ignore[override]
        for weight, view in self.views:
            view.grad = None if weight.grad is None else as_matrix(weight.grad)
        super().step(closure)  # type: ignore[no-untyped-call]


def build(
    net: nn.Module, name: Name, *, adam_betas: tuple[float, float], weight_decay: float
) -> list[torch.optim.Optimizer]:
    """The optimizers that together hold every parameter of a network once; their learning rate is 0 until set.

    Args:
        net: its weights in channels-last memory where Muon is asked for.
        name: muon trains what has two dimensions or more, less the first and last layer and embeddings.
        adam_betas, weight_decay: of AdamW; the decay, decoupled, of both.
    """
    inner = {k for k, v in net.named_parameters() if name == "muon" and v.ndim > 1 and k not in OUTER}
    rest = [v for k, v in net.named_parameters() if k not in inner]
    found: list[torch.optim.Optimizer] = []
    if rest:
        found.append(torch.optim.AdamW(rest, lr=0.0, betas=adam_betas, weight_decay=weight_decay, fused=True))
    if inner:
        found.append(Muon((v for k, v in net.named_parameters() if k in inner), weight_decay=weight_decay))
    return found
