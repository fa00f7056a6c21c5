"""QuACK's products of the op `experts`, one by one and together, at the sizes of Qwen3-30B-A3B.

Rows of the other implementations, with the same shapes, are in `bench/experts.py`.
"""

from __future__ import annotations

import functools
import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from loong_ops import quack_experts
from loong_ops.bench.row import Missing, Row, Thunk
from loong_ops.quack_experts import TILES, Rows
from loong_ops.quack_products import Tile
from loong_ops.quack_products import product as product_of

HIDDEN, INNER, EXPERTS, CHOICES = 2048, 768, 128, 8
TOKENS = (32768, 8192)
SKEW = 8
"""Times the mean: the rows of the hottest expert in the skewed routing."""

_WIDE = (Tile(128, 256), Tile(128, 256, cluster=1), Tile(256, 128), Tile(256, 192), Tile(256, 160))
_TURNS = (Tile(128, 128, pingpong=True), Tile(128, 192, pingpong=True), Tile(128, 192, pingpong=True, cluster=1))
VARIANTS: Mapping[str, tuple[Tile, ...]] = {
    "up": (*_TURNS, Tile(128, 256), Tile(256, 128), Tile(256, 192)),
    "down": (*_WIDE, *_TURNS),
    "d_act": (*_TURNS, Tile(128, 128, pingpong=True, cluster=1), Tile(128, 256), Tile(256, 128)),
    "d_hidden": (*_WIDE, *_TURNS),
    "d_down": (*_WIDE, *_TURNS),
    "d_up": (*_WIDE, *_TURNS),
}
"""Product -> tiles worth a look. By ptxas the gathering ones of 256 rows, and `d_act` wider than 128, spill some."""


@dataclass(frozen=True)
class Case:
    """One routing of `tokens` tokens to EXPERTS experts."""

    tokens: int
    skewed: bool = False

    @property
    def pairs(self) -> int:
        """Rows of all experts."""
        return self.tokens * CHOICES

    @property
    def shape(self) -> str:
        """In the words of a row."""
        routing = f", hottest {SKEW}x the mean" if self.skewed else ""
        return f"t={self.tokens} n={HIDDEN} f={INNER} e={EXPERTS} k={CHOICES}{routing}"

    def chosen(self) -> Tensor:
        """[t,k]: every expert equally often, or the first one for half of the tokens (8 times the mean of t/16)."""
        pair = torch.arange(self.pairs, device="cuda").view(self.tokens, CHOICES)
        even = (pair * 37 + pair // EXPERTS) % EXPERTS
        if not self.skewed:
            return even.to(torch.int32)
        hot = torch.arange(self.tokens, device="cuda") % (EXPERTS // CHOICES) < SKEW
        others = 1 + (pair * 37 + pair // EXPERTS) % (EXPERTS - 1)
        others[:, 0] = torch.where(hot, 0, others[:, 0])
        return others.to(torch.int32)


def rows() -> list[Row]:
    """Each product with each of its tiles, then forward and backward of the whole op, evenly routed and skewed."""
    found = []
    for case in (Case(tokens) for tokens in TOKENS):
        for kind, tiles in VARIANTS.items():
            found += [_product_row(case, kind, tile) for tile in dict.fromkeys((TILES[kind], *tiles))]
    for case in (Case(tokens, skewed) for tokens in TOKENS for skewed in (False, True)):
        work = 2.0 * case.pairs * HIDDEN * 3 * INNER
        weights = 2 * EXPERTS * 3 * INNER * HIDDEN
        found += [
            Row(
                op="experts",
                shape=case.shape,
                name="quack",
                direction=direction,
                make=functools.partial(whole, case, direction),
                flops=work * factor,
                bytes=factor * (weights + 4.0 * case.tokens * HIDDEN),
            )
            for direction, factor in (("forward", 1), ("backward", 2))
        ]
    return found


def _product_row(case: Case, kind: str, tile: Tile) -> Row:
    headline = tile == TILES[kind]
    columns = 2 * INNER if kind in ("up", "d_hidden", "d_up") else INNER
    return Row(
        op="experts",
        shape=f"{kind}: {case.shape}",
        name="quack" if headline else f"quack[{tile}]",
        direction="forward" if kind in ("up", "down") else "backward",
        make=functools.partial(product, case, kind, tile),
        flops=2.0 * case.pairs * HIDDEN * columns,
        bytes=_bytes(case, kind),
        headline=headline,
    )


def _bytes(case: Case, kind: str) -> float:
    """What a product reads and writes at least, each number once; tokens, not rows, where rows are gathered."""
    tokens, rows, weight = case.tokens * HIDDEN, case.pairs, EXPERTS * HIDDEN * INNER
    return {
        "up": 2.0 * (tokens + 2 * weight + 3 * rows * INNER),
        "down": 2.0 * (rows * INNER + weight + rows * HIDDEN),
        "d_act": 2.0 * (tokens + weight + 5 * rows * INNER),
        "d_hidden": 2.0 * (2 * rows * INNER + 2 * weight + rows * HIDDEN),
        "d_down": 2.0 * (tokens + rows * INNER) + 8.0 * weight,
        "d_up": 2.0 * (tokens + 2 * rows * INNER) + 16.0 * weight,
    }[kind]


def inputs(case: Case) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """hidden [t,n], up [e,2f,n], down [e,n,f], weights [t,k] and chosen [t,k] on the card."""
    torch.manual_seed(0)
    hidden = torch.randn(case.tokens, HIDDEN, device="cuda", dtype=torch.bfloat16)
    up = torch.randn(EXPERTS, 2 * INNER, HIDDEN, device="cuda", dtype=torch.bfloat16) * HIDDEN**-0.5
    down = torch.randn(EXPERTS, HIDDEN, INNER, device="cuda", dtype=torch.bfloat16) * INNER**-0.5
    weights = torch.rand(case.tokens, CHOICES, device="cuda")
    return hidden, up, down, weights / weights.sum(1, keepdim=True), case.chosen()


def product(case: Case, kind: str, tile: Tile) -> Thunk:
    """One product on inputs of its own."""
    _check()
    hidden, up, down, weights, chosen = inputs(case)
    sorted_rows = quack_experts._sorted_rows(weights, chosen, EXPERTS, 0)
    offsets = sorted_rows.offsets
    if kind == "up":
        return lambda: quack_experts._gated(hidden, up, sorted_rows, True, tile)
    if kind == "d_act":
        gate_up = _rows_like(case, 2 * INNER)
        return lambda: quack_experts._d_gated(hidden, down, gate_up, sorted_rows, True, tile)
    if kind in ("d_up", "d_down"):
        return _gradient_thunk(case, kind, tile, hidden, up if kind == "d_up" else down, sorted_rows)
    out = _rows_like(case, HIDDEN)
    if kind == "down":
        act = _rows_like(case, INNER)
        return lambda: product_of(act, down, out, tile, cu_seqlens_m=offsets)
    grad = _rows_like(case, 2 * INNER)
    return lambda: product_of(grad, up.mT, out, tile, cu_seqlens_m=offsets, concat_layout=("B",))


def _gradient_thunk(case: Case, kind: str, tile: Tile, gathered: Tensor, weight: Tensor, sorted_rows: Rows) -> Thunk:
    alternating = kind == "d_up"
    grad = _rows_like(case, 2 * INNER if alternating else INNER)
    weight.requires_grad_()
    weight.main_grad = torch.zeros(weight.shape, device="cuda")  # type: ignore[attr-defined]
    return lambda: quack_experts._weight_gradient(weight, gathered, grad, sorted_rows, tile, alternating=alternating)


def _rows_like(case: Case, columns: int) -> Tensor:
    return torch.randn(case.pairs, columns, device="cuda", dtype=torch.bfloat16)


def whole(case: Case, direction: str) -> Thunk:
    """The op forward (keeping what backward needs), or its backward alone, into float32 buffers."""
    _check()
    *tensors, chosen = inputs(case)
    for tensor in tensors:
        tensor.requires_grad_()
    for weight in tensors[1:3]:
        weight.main_grad = torch.zeros(weight.shape, device="cuda")  # type: ignore[attr-defined]
    hidden, up, down, weights = tensors
    if direction == "forward":
        return lambda: quack_experts.experts(hidden, up, down, weights, chosen)
    result = quack_experts.experts(hidden, up, down, weights, chosen)
    grad = torch.randn_like(result)

    def backward() -> None:
        hidden.grad = weights.grad = None  # otherwise autograd would add to them, which is not the op's work
        result.backward(grad, retain_graph=True)

    return backward


def _check() -> None:
    if importlib.util.find_spec("quack") is None:
        raise Missing("quack-kernels")
