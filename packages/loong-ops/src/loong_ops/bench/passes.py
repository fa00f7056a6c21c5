"""The two passes of a differentiable op as thunks, forward as in training: with everything kept that backward needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from loong_ops.bench.row import Thunk

if TYPE_CHECKING:
    from torch import Tensor

Call = tuple[Callable[[], Any], Sequence["Tensor"]]
"""A call of an op, and the inputs whose gradients are wanted; they require one."""


def forward(build: Callable[[], Call]) -> Thunk:
    """The call itself."""
    call, _ = build()
    return call


def backward(build: Callable[[], Call]) -> Thunk:
    """The gradients of all wanted inputs, given one for every differentiable result."""
    import torch

    call, wanted = build()
    found = call()
    results = [part for part in (found if isinstance(found, tuple) else (found,)) if part.requires_grad]
    upstream = [torch.randn_like(part) for part in results]
    return lambda: torch.autograd.grad(results, wanted, upstream, retain_graph=True)
