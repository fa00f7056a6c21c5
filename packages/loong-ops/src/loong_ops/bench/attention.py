"""Causal attention with the heads of Qwen3-30B-A3B (and 8B's): whole rows, and rows packed with documents.

FLOPs are those of the causal half within each document, and the backward pass counts 2.5 times the forward pass: it
computes the scores once more, as every implementation here does.
"""

from __future__ import annotations

import importlib
import importlib.util
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from loong_ops.bench.row import Missing, Row, Thunk

if TYPE_CHECKING:
    from torch import Tensor

WIDTH = 128
BACKWARD = 2.5
"""FLOPs of the backward pass, in forward passes."""


@dataclass(frozen=True)
class Case:
    """Rows of `rows` tokens, `batch` of them; `lengths` are the documents packed into one row."""

    rows: int
    batch: int
    heads: int
    groups: int
    lengths: tuple[int, ...] = ()

    @property
    def shape(self) -> str:
        """In the words of a row."""
        packed = f", {len(self.lengths)} documents" if self.lengths else ""
        return f"b={self.batch} s={self.rows} h={self.heads} g={self.groups} d={WIDTH}{packed}"

    @property
    def flops(self) -> float:
        """Of a forward pass: two products, the causal half of each."""
        squares = sum(length**2 for length in self.lengths) or self.batch * self.rows**2
        return 2.0 * squares * self.heads * WIDTH

    @property
    def bytes(self) -> float:
        """Queries, keys, values and the result, once each, in bfloat16."""
        return 2.0 * self.batch * self.rows * WIDTH * (2 * self.heads + 2 * self.groups)


def documents(total: int = 32768, mean: int = 2048, seed: int = 0) -> tuple[int, ...]:
    """Lengths that add up to `total`: exponential, at least 64; the last is cut."""
    generator = random.Random(seed)
    lengths: list[int] = []
    while (left := total - sum(lengths)) > 0:
        lengths.append(min(left, max(64, round(generator.expovariate(1 / mean)))))
    return tuple(lengths)


CASES = (
    Case(4096, 8, 32, 4),
    Case(4096, 1, 32, 4),
    Case(32768, 1, 32, 4, documents()),
    Case(32768, 1, 32, 4),
    Case(32768, 1, 32, 8, documents()),
)


def rows() -> list[Row]:
    """Every implementation of the op, and torch's own kernels, forward and with backward."""
    return list(_rows())


def _rows() -> Iterator[Row]:
    for case in CASES:
        makers: dict[str, Callable[[Case], Callable[..., Any]]] = {
            "flash4": _flash4,
            "transformer_engine": _transformer_engine,
        }
        if not case.lengths:
            makers |= {"torch": _torch, "torch_flash": partial(_sdpa, "FLASH_ATTENTION")}
            makers["torch_cudnn"] = partial(_sdpa, "CUDNN_ATTENTION")
        for direction, work, moved in (("forward", 1.0, 1.0), ("both", 1.0 + BACKWARD, 3.5)):
            for name, maker in makers.items():
                yield Row(
                    op="attention",
                    shape=case.shape,
                    name=name,
                    direction=direction,
                    make=partial(_thunk, case, maker, direction),
                    flops=work * case.flops,
                    bytes=moved * case.bytes,
                )


def _thunk(case: Case, maker: Callable[[Case], Callable[..., Any]], direction: str) -> Thunk:
    """`maker` gives a function of query, key and value, [s,b,...] as layers have them."""
    import torch

    function = maker(case)
    torch.manual_seed(0)
    inputs = [
        torch.randn(case.rows, case.batch, heads, WIDTH, device="cuda", dtype=torch.bfloat16, requires_grad=True)
        for heads in (case.heads, case.groups, case.groups)
    ]
    if direction == "forward":
        return lambda: function(*inputs)
    upstream = torch.randn_like(function(*inputs))
    return lambda: torch.autograd.grad(function(*inputs), inputs, upstream)


def _op(module: str, package: str, case: Case) -> Callable[..., Tensor]:
    """An implementation of the op with the arguments of the case, its packing worked out before the clock runs."""
    if importlib.util.find_spec(package) is None:
        raise Missing(package)
    from loong_core.parallel import segments

    function = importlib.import_module(module).attention
    if not case.lengths:
        return partial(function, scale=WIDTH**-0.5)
    import torch

    numbers = torch.arange(len(case.lengths)).repeat_interleave(torch.tensor(case.lengths))[None]
    on_card = numbers.cuda()
    segments.prepare(numbers, on_card)
    return partial(function, scale=WIDTH**-0.5, segments=(on_card, on_card))


_flash4 = partial(_op, "loong_ops.flash_attention", "flash_attn")
_transformer_engine = partial(_op, "loong_core.parallel.te_attention", "transformer_engine")
_torch = partial(_op, "loong_core.references.attention", "torch")


def _sdpa(kernel: str, case: Case) -> Callable[..., Tensor]:
    """One kernel of torch's, on views: it wants [b,h,s,d]."""
    from torch.nn import functional
    from torch.nn.attention import SDPBackend, sdpa_kernel

    def function(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        with sdpa_kernel(getattr(SDPBackend, kernel)):
            return functional.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

    return function
