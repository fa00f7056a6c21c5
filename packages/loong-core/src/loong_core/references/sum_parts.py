"""The reference of the op `sum_parts`."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sum_parts(parts: Tensor, out: Tensor) -> None:
    """out [...] = the sum of parts [r,...] over the first axis, what ranks have sent: in float32 (float64 stays),
    rounded once. Both of one dtype, contiguous; without gradients."""
    torch.sum(parts, 0, out=out)
