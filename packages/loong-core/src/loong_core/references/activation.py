"""The references of the ops `swiglu` and `geglu`."""

from __future__ import annotations

import torch
import torch.nn.functional as functional
from torch import Tensor


def swiglu(x: Tensor) -> Tensor:
    """`silu(gate) * value` of the two halves of the last dim: [..., 2f] -> [..., f] in x's dtype.

    Computed in float32 (float64 stays) and rounded once. Source: Shazeer, 2020 (arXiv 2002.05202).
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    gate, value = wide.chunk(2, dim=-1)
    return (functional.silu(gate) * value).to(x.dtype)


def geglu(x: Tensor) -> Tensor:
    """`gelu(gate) * value` of the two halves of the last dim, GELU in its tanh form: [..., 2f] -> [..., f] in x's
    dtype.

    Computed in float32 (float64 stays) and rounded once. Source: Shazeer, 2020 (arXiv 2002.05202).
    """
    wide = x.double() if x.dtype == torch.float64 else x.float()
    gate, value = wide.chunk(2, dim=-1)
    return (functional.gelu(gate, approximate="tanh") * value).to(x.dtype)
