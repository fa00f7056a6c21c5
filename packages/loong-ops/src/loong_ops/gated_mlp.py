"""The op `gated_mlp` where no library fuses its products with the activation: those of `linear`, and a pass between."""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from loong_ops.geglu import geglu
from loong_ops.linear import linear
from loong_ops.swiglu import swiglu


def gated_mlp(x: Tensor, up: Tensor, down: Tensor, *, activation: Literal["silu", "gelu"] = "silu") -> Tensor:
    """As `loong_core.references.mlp.gated_mlp`, with the activation in one pass: x [..., n], up [2f,n], down [m,f] ->
    [..., m] in x's dtype."""
    gated = swiglu if activation == "silu" else geglu
    return linear(gated(linear(x, up)), down)
