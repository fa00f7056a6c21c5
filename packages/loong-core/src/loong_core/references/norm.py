"""The references of the ops `rms_norm`, `layer_norm`, `residual_rms_norm` and `residual_layer_norm`."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dim: [..., n], [n] -> [..., n] in x's dtype.

    Statistics are float32 (float64 stays); the normalised value is rounded to x's dtype before it is scaled, the order
    of casts in transformers' RMSNorm modules. Source: Zhang and Sennrich, 2019.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (weight * normal.to(x.dtype)).to(x.dtype)


def residual_rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> tuple[Tensor, Tensor]:
    """As `rms_norm`, and x: what a branch of the normed rows is added to."""
    return rms_norm(x, weight, epsilon), x


def layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> Tensor:
    """`(x - mean) / sqrt(variance + epsilon) * weight + bias` over the last dim: x [..., n], weight and bias [n] (None:
    1 and 0) -> [..., n] in x's dtype, computed in float32 (float64 stays) and rounded once.

    Source: Ba, Kiros and Hinton, 2016.
    """
    # Widened here: on a CPU torch sums the gradients of bfloat16 weights in bfloat16.
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    scale, shift = (None if tensor is None else tensor.to(dtype) for tensor in (weight, bias))
    return functional.layer_norm(x.to(dtype), x.shape[-1:], scale, shift, epsilon).to(x.dtype)


def residual_layer_norm(x: Tensor, weight: Tensor | None, bias: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """As `layer_norm`, and x: what a branch of the normed rows is added to."""
    return layer_norm(x, weight, bias, epsilon), x
