"""The reference of the op `dropout_add`."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def dropout_add(x: Tensor, residual: Tensor, rate: float) -> Tensor:
    """`residual + dropout(x)`: x and residual [...] alike, 0 <= rate < 1 -> [...] in residual's dtype, computed in
    float32 (float64 stays) and rounded once.

    Each element is dropped with probability `rate`, the others are divided by 1 - rate (Srivastava et al., 2014). What
    is dropped is drawn by torch's generator of the device; at rate 0 nothing is drawn.
    """
    if not rate:
        return (residual + x).to(residual.dtype)
    wide = torch.promote_types(residual.dtype, torch.float32)
    return (residual.to(wide) + functional.dropout(x.to(wide), rate)).to(residual.dtype)
