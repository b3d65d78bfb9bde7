"""The forward process and the conversions between eps, x_0 and v: pure functions, no state.

Every function takes alpha_bar or beta as (B,) tensors or floats and broadcasts them over (B, C, H, W); callers index
the schedule's float64 tables, so that this file needs no table of its own.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Prediction = Literal["epsilon", "sample", "v_prediction"]  # the names of diffusers' prediction_type


def _per_row(value: Tensor | float, like: Tensor) -> Tensor:
    """A float or (B,) -> (B, 1, 1, 1) in like's type, rounded only once, from float64."""
    tensor = torch.as_tensor(value, dtype=torch.float64, device=like.device)
    return tensor.reshape(-1, *[1] * (like.ndim - 1))


def q_sample(x_0: Tensor, eps: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) eps, a sample of q(x_t | x_0); equation 4 of Ho et al. 2020.

    Args:
        x_0: (B, C, H, W) images in [-1, 1].
        eps: (B, C, H, W) standard normal noise.
        alpha_bar: (B,) or a number, 0 .. 1.
    """
    abar = _per_row(alpha_bar, x_0)
    return abar.sqrt().to(x_0.dtype) * x_0 + (1 - abar).sqrt().to(x_0.dtype) * eps


def q_step(x_prev: Tensor, eps: Tensor, beta: Tensor | float) -> Tensor:
    """One noising step, a sample of q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t I); equation 2."""
    return q_sample(x_prev, eps, 1 - _per_row(beta, x_prev).flatten())


def posterior(
    x_0: Tensor, x_t: Tensor, alpha_bar: Tensor | float, alpha_bar_prev: Tensor | float
) -> tuple[Tensor, Tensor]:
    """Mean and variance of q(x_s | x_t, x_0) for s before t; equations 6 and 7 of Ho et al. 2020.

    Args:
        x_0, x_t: (B, C, H, W).
        alpha_bar: (B,) or a number; alpha_bar at t.
        alpha_bar_prev: the same at s; 1 where s is the clean image.

    Returns:
        The mean (B, C, H, W) and the variance (B, 1, 1, 1). Any s < t serves, not only t - 1.
    """
    abar, abar_prev = _per_row(alpha_bar, x_t), _per_row(alpha_bar_prev, x_t)
    alpha = abar / abar_prev
    beta = 1 - alpha
    coef_0 = abar_prev.sqrt() * beta / (1 - abar)
    coef_t = alpha.sqrt() * (1 - abar_prev) / (1 - abar)
    variance = beta * (1 - abar_prev) / (1 - abar)
    return coef_0.to(x_t.dtype) * x_0 + coef_t.to(x_t.dtype) * x_t, variance.to(x_t.dtype)


def target(prediction: Prediction, x_0: Tensor, eps: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """What a network of this prediction type is trained to output: eps, x_0 or v.

    v = sqrt(abar) eps - sqrt(1 - abar) x_0; Salimans and Ho 2022, appendix D.
    """
    if prediction == "epsilon":
        return eps
    if prediction == "sample":
        return x_0
    abar = _per_row(alpha_bar, x_0)
    return abar.sqrt().to(x_0.dtype) * eps - (1 - abar).sqrt().to(x_0.dtype) * x_0


def to_x_0(prediction: Prediction, output: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """x_0_hat from what the network said. With alpha_bar = 0 an eps prediction holds no x_0: the result is infinite."""
    if prediction == "sample":
        return output
    abar = _per_row(alpha_bar, x_t)
    signal, noise = abar.sqrt().to(x_t.dtype), (1 - abar).sqrt().to(x_t.dtype)
    if prediction == "epsilon":
        return (x_t - noise * output) / signal
    return signal * x_t - noise * output


def to_eps(x_0: Tensor, x_t: Tensor, alpha_bar: Tensor | float) -> Tensor:
    """The eps that takes x_0 to x_t. With alpha_bar = 1 there is none: the result is not finite."""
    abar = _per_row(alpha_bar, x_t)
    return (x_t - abar.sqrt().to(x_t.dtype) * x_0) / (1 - abar).sqrt().to(x_t.dtype)
