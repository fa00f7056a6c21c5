"""The reference of the op `sum_parts`."""

from __future__ import annotations

import torch
from torch import Tensor


@torch.no_grad()
def sum_parts(parts: Tensor, out: Tensor, own: Tensor | None = None) -> None:
    """out [...] = the sum of parts [r,...] over the first axis, what ranks have sent, and of `own` [...], what this one
    has: in float32 (float64 stays), rounded once. All of one dtype, contiguous; without gradients."""
    torch.sum(parts if own is None else torch.cat([parts, own[None]]), 0, out=out)
