"""The references of the ops `linear` and `linear_gelu`. Shape legend: n inputs, m outputs."""

from __future__ import annotations

import torch.nn.functional as functional
from torch import Tensor


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`x @ weight.T + bias`: x [..., n], weight [m,n], bias [m] or None -> [..., m] in x's dtype."""
    return functional.linear(x, weight, bias)


def linear_gelu(x: Tensor, weight: Tensor, bias: Tensor, *, dropout: float = 0.0) -> Tensor:
    """`gelu(x @ weight.T + bias)`, GELU in its tanh form (Hendrycks and Gimpel, 2016): x [..., n], weight [m,n], bias
    [m] -> [..., m] in x's dtype, rounded before and after the activation.

    With 0 < `dropout` < 1 results are dropped as in `loong_core.references.dropout.dropout_add`.
    """
    result = functional.gelu(functional.linear(x, weight, bias), approximate="tanh")
    return functional.dropout(result, dropout) if dropout else result
