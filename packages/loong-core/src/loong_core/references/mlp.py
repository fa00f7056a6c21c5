"""The reference of the op `gated_mlp`. Shape legend: n inputs, f inner size, m outputs."""

from __future__ import annotations

from torch import Tensor

from loong_core.references.activation import swiglu
from loong_core.references.linear import linear


def gated_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """A dense SwiGLU layer: x [..., n], up [2f,n] (all gates, then all values), down [m,f] -> [..., m] in x's dtype.

    Both products and the activation are rounded to x's dtype. Source: Shazeer, 2020 (arXiv 2002.05202).
    """
    return linear(swiglu(linear(x, up)), down)
