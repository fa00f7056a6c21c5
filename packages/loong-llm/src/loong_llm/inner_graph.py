"""Graphs of autograd inside of a step of it, for code that decides itself when a part of backward runs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.graph import GradientEdge


def gradients(output: GradientEdge, inputs: Sequence[Tensor], gradient: Tensor) -> list[Any]:
    """Of each input its gradient, None where it needs none, or an op has brought that to its buffer itself."""
    wanted = [tensor for tensor in inputs if tensor.requires_grad]
    found = iter(torch.autograd.grad(output, wanted, gradient, allow_unused=True))
    return [next(found) if tensor.requires_grad else None for tensor in inputs]
