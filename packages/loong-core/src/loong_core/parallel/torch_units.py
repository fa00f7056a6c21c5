"""What is done to the units of a model before it is sharded: compile them, and compute them again in backward."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import wraps
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.checkpoint import checkpoint

if TYPE_CHECKING:
    from torch import nn

    from loong_core.parallel.torch_options import TorchOptions
    from loong_core.types import ParallelPlan


def prepare_units(units: Sequence[nn.Module], plan: ParallelPlan, options: TorchOptions, device: str) -> None:
    """Replace `forward` of each unit, inside of all hooks on it: sharding gathers parameters outside."""
    compiled = options.compile and torch.device(device).type != "cpu"
    if compiled:
        # Units of one kind share their code; without room for all, the last ones would run uncompiled.
        torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, 2 * len(units))
    for unit in units:
        function: Callable[..., Any] = unit.forward
        if compiled:
            function = torch.compile(function, dynamic=False)
        if plan.recompute == "full":
            function = _again(function)
        if function is not unit.forward:
            unit.forward = function


def _again(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function` with its activations given up after the forward pass, where there will be a backward pass."""

    @wraps(function)
    def forward(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return function(*args, **kwargs)
        return checkpoint(function, *args, use_reentrant=False, **kwargs)

    return forward
