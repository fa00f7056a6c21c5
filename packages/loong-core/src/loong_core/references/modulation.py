"""The references of the ops `ada_rms_norm`, `residual_ada_rms_norm`, `layer_norm_modulate` and `gated_residual`: norms
and branches that a condition of each sample scales, shifts and gates.

Source: Peebles and Xie, 2023 (DiT, arXiv 2212.09748). Shape legend: b samples, s rows of each, n numbers of a row.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ada_rms_norm(x: Tensor, scale: Tensor, shift: Tensor | None, epsilon: float) -> Tensor:
    """`x / sqrt(mean(x^2) + epsilon) * (1 + scale) + shift` over the last dim: x [b,s,n], scale and shift [b,n] (shift
    None: 0) -> [b,s,n] in x's dtype, computed in float32 (float64 stays) and rounded once."""
    wide = _wide(x)
    normal = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + epsilon)
    return _modulated(normal, scale, shift).to(x.dtype)


def residual_ada_rms_norm(x: Tensor, scale: Tensor, shift: Tensor | None, epsilon: float) -> tuple[Tensor, Tensor]:
    """As `ada_rms_norm`, and x: what a branch of the normed rows is added to."""
    return ada_rms_norm(x, scale, shift, epsilon), x


def layer_norm_modulate(x: Tensor, scale: Tensor, shift: Tensor | None, epsilon: float) -> Tensor:
    """As `ada_rms_norm` of x less its mean over the last dim: a layer norm that has no weights of its own."""
    wide = _wide(x)
    centred = wide - wide.mean(-1, keepdim=True)
    normal = centred * torch.rsqrt(centred.square().mean(-1, keepdim=True) + epsilon)
    return _modulated(normal, scale, shift).to(x.dtype)


def gated_residual(residual: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`residual + gate * x`: residual and x [b,s,n], gate [b,n] -> [b,s,n] in residual's dtype, rounded once."""
    return (_wide(residual) + _wide(gate)[:, None] * _wide(x)).to(residual.dtype)


def _modulated(normal: Tensor, scale: Tensor, shift: Tensor | None) -> Tensor:
    result = normal * (1 + _wide(scale)[:, None])
    return result if shift is None else result + _wide(shift)[:, None]


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.dtype == torch.float64 else x.float()
