"""The attention of Pi0.5, 8 heads of 256 with one key-value head: the prefix of 14 samples with two and with three
cameras, and the 50 rows of each that see it and themselves. No masks; where lengths are equal cuDNN is beside.

The backward pass counts 2.5 times the FLOPs of the forward pass: it computes the scores once more.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loong_ops.bench.attention import BACKWARD
from loong_ops.bench.row import Missing, Row, Thunk

if TYPE_CHECKING:
    from torch import Tensor

HEADS, GROUPS, WIDTH = 8, 1, 256


@dataclass(frozen=True)
class Case:
    """`samples` sequences of so many queries and so many keys each."""

    samples: int
    queries: int
    keys: int

    @property
    def shape(self) -> str:
        """In the words of a row."""
        return f"s={self.samples} q={self.queries} k={self.keys} h={HEADS} g={GROUPS} d={WIDTH}"

    @property
    def flops(self) -> float:
        """Of a forward pass: two products."""
        return 4.0 * self.samples * self.queries * self.keys * HEADS * WIDTH

    @property
    def bytes(self) -> float:
        """Queries, keys, values and the result, once each, in bfloat16."""
        return 2.0 * self.samples * WIDTH * (2 * self.queries * HEADS + 2 * self.keys * GROUPS)


CASES = (Case(14, 576, 576), Case(14, 968, 968), Case(14, 50, 626), Case(14, 50, 1018))


def rows() -> list[Row]:
    """Every implementation of the op for devices, and cuDNN's, forward and with backward."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    makers: dict[str, Callable[[Case], Callable[..., Any]]] = {"flash4": _flash4, "varlen": _varlen, "cudnn": _cudnn}
    for case in CASES:
        for direction, work, moved in (("forward", 1.0, 1.0), ("both", 1.0 + BACKWARD, 3.5)):
            for name, maker in makers.items():
                yield Row(
                    op="ragged_attention",
                    shape=case.shape,
                    name=name,
                    direction=direction,
                    make=partial(_thunk, case, maker, direction),
                    flops=work * case.flops,
                    bytes=moved * case.bytes,
                )


def _thunk(case: Case, maker: Callable[[Case], Callable[..., Any]], direction: str, device: str = "cuda") -> Thunk:
    """`maker` gives a function of query [q,h,d], key and value [k,g,d] and of both offsets."""
    import torch

    function = maker(case)
    torch.manual_seed(0)
    inputs = [
        torch.randn(case.samples * rows, heads, WIDTH, device=device, dtype=torch.bfloat16, requires_grad=True)
        for rows, heads in ((case.queries, HEADS), (case.keys, GROUPS), (case.keys, GROUPS))
    ]
    numbers = torch.arange(case.samples + 1, device=device, dtype=torch.int32)
    offsets = numbers * case.queries, numbers * case.keys
    if direction == "forward":
        return lambda: function(*inputs, *offsets)
    upstream = torch.randn_like(function(*inputs, *offsets))
    return lambda: torch.autograd.grad(function(*inputs, *offsets), inputs, upstream)


def _op(module: str, package: str, case: Case) -> Callable[..., Tensor]:
    """An implementation of the op with the bounds of the case."""
    if importlib.util.find_spec(package) is None:
        raise Missing(package)
    return partial(importlib.import_module(module).ragged_attention, longest=(case.queries, case.keys))


_flash4 = partial(_op, "loong_ops.flash_ragged_attention", "flash_attn")
_varlen = partial(_op, "loong_core.parallel.varlen_attention", "torch")


def _cudnn(case: Case) -> Callable[..., Tensor]:
    """cuDNN's attention through torch, on views: it wants [s,h,rows,d], all sequences as long."""
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def function(query: Tensor, key: Tensor, value: Tensor, *offsets: Tensor) -> Tensor:
        query, key, value = (part.unflatten(0, (case.samples, -1)).transpose(1, 2) for part in (query, key, value))
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            out = functional.scaled_dot_product_attention(query, key, value, enable_gqa=True)
        return out.transpose(1, 2).flatten(2).flatten(0, 1)

    return function
