"""The op `gated_mlp` where no library fuses its products with the activation: those of `linear`, and `swiglu`."""

from __future__ import annotations

from torch import Tensor

from loong_ops.linear import linear
from loong_ops.swiglu import swiglu


def gated_mlp(x: Tensor, up: Tensor, down: Tensor) -> Tensor:
    """As `loong_core.references.mlp.gated_mlp`, with the activation in one pass: x [..., n], up [2f,n], down [m,f] ->
    [..., m] in x's dtype."""
    return linear(swiglu(linear(x, up)), down)
