"""One call of an op with its definition in float64: what the cases of every op are made of."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

Tensors = Mapping[str, Tensor]
Result = Tensor | tuple[Tensor, ...]
"""What an op returns: one tensor, or several as a (named) tuple."""


@dataclass(frozen=True, kw_only=True)
class OpCase:
    """One call of an op. `tensors` are the differentiable inputs, in positional order; `others` are passed as they are.

    `define(tensors, others)` is the op's definition for float64 tensors; results that it computes without gradient have
    none. `positional` names what follows by position, of `others` and of those `tensors` that come after one of them;
    the rest of `others` are keywords.
    """

    name: str
    tensors: Mapping[str, tuple[int, ...]]
    define: Callable[[Tensors, Mapping[str, Any]], Result]
    others: Mapping[str, Any] = field(default_factory=dict)
    positional: tuple[str, ...] = ()
    spread: float = 1.0

    def draw(self, dtype: torch.dtype, device: str) -> dict[str, Tensor]:
        """The inputs, the same for every call: normal numbers of standard deviation `spread`, rounded to `dtype`."""
        generator = torch.Generator().manual_seed(sum(map(ord, self.name)))
        drawn = {
            name: torch.randn(shape, generator=generator, dtype=torch.float64) * self.spread
            for name, shape in self.tensors.items()
        }
        return {name: tensor.to(dtype).to(device) for name, tensor in drawn.items()}

    def call(self, function: Callable[..., Any], tensors: Tensors) -> Result:
        """`function` on `tensors`, with the other arguments on the tensors' device."""
        device = next(iter(tensors.values())).device
        values = {name: _to(value, device) for name, value in self.others.items()} | dict(tensors)
        first = [values.pop(name) for name in tensors if name not in self.positional]
        positional = [values.pop(name) for name in self.positional]
        result: Result = function(*first, *positional, **values)
        return result

    def exact(self, tensors: Tensors) -> Result:
        """The definition, on float64 tensors of the CPU."""
        return self.define(tensors, self.others)


def handing_through(define: Callable[[Tensors, Mapping[str, Any]], Tensor]) -> Callable[..., tuple[Tensor, Tensor]]:
    """`define` with x as a second result: of an op `residual_...`."""

    def define_both(tensors: Tensors, others: Mapping[str, Any]) -> tuple[Tensor, Tensor]:
        return define(tensors, others), tensors["x"]

    return define_both


def _to(value: Any, device: torch.device) -> Any:
    if isinstance(value, tuple):
        return tuple(_to(part, device) for part in value)
    return value.to(device) if isinstance(value, Tensor) else value
