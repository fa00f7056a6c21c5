"""The reference of the op `rms_norm`."""

from __future__ import annotations

import torch
from torch import Tensor


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * weight` over the last dim: [..., n], [n] -> [..., n] in x's dtype.

    Statistics are float32 (float64 stays); the normalised value is rounded to x's dtype before it is scaled, the order
    of casts in transformers' RMSNorm modules. Source: Zhang and Sennrich, 2019.
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return (weight * normal.to(x.dtype)).to(x.dtype)
