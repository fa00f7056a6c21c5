"""The reference of the op `linear`. Shape legend: n inputs, m outputs."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x [..., n], weight [m,n], bias [m] or None -> [..., m] in x's dtype."""
    return functional.linear(x, weight, bias)
