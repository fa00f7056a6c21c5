"""The reference of the op `experts`.

Shape legend: t tokens, k experts chosen for each token, e experts held here, n hidden size, f size of an expert.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from loong_core.references.activation import swiglu

Pairs = int | Callable[[], int] | None
"""How many entries of `chosen` are held here, or what tells it and may have the host wait: an op asks when it needs it.
None: unknown, or all of them."""


def experts(
    hidden: Tensor,
    up: Tensor,
    down: Tensor,
    weights: Tensor,
    chosen: Tensor,
    *,
    first: int = 0,
    pairs: Pairs = None,
) -> Tensor:
    """Every token through its experts, summed with its weights: hidden [t,n] -> [t,n] in hidden's dtype.

    up [e,2f,n] and down [e,n,f] are the SwiGLU experts `first` to `first` + e - 1; weights [t,k] and chosen [t,k]
    (integers) say for each token which experts serve it. Experts held elsewhere add nothing here, so that the results
    of ranks that hold different experts add up; `pairs` is for ops that make room for what is held here (`Pairs`). Sums
    are float32 (float64 stays).
    """
    total = hidden.new_zeros(hidden.shape, dtype=torch.float64 if hidden.dtype == torch.float64 else torch.float32)
    for index, (gate_up, out) in enumerate(zip(up.unbind(0), down.unbind(0), strict=True)):
        token, slot = (chosen == first + index).nonzero(as_tuple=True)
        result = swiglu(hidden[token] @ gate_up.t()) @ out.t()
        total = total.index_add(0, token, result.to(total.dtype) * weights[token, slot, None].to(total.dtype))
    return total.to(hidden.dtype)
