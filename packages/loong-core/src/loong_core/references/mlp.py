"""The reference of the op `gated_mlp`. Shape legend: n inputs, f inner size, m outputs."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from loong_core.references.activation import geglu, swiglu
from loong_core.references.linear import linear


def gated_mlp(x: Tensor, up: Tensor, down: Tensor, *, activation: Literal["silu", "gelu"] = "silu") -> Tensor:
    """A dense SwiGLU layer, or with `gelu` a GeGLU layer: x [..., n], up [2f,n] (all gates, then all values), down
    [m,f] -> [..., m] in x's dtype.

    Both products and the activation are rounded to x's dtype. Source: Shazeer, 2020 (arXiv 2002.05202).
    """
    gated = swiglu if activation == "silu" else geglu
    return linear(gated(linear(x, up)), down)
