"""The dense products of Qwen3-8B and of Qwen3-30B-A3B's attention: the op `linear` by QuACK, and layers by cuBLAS.

Weights' gradients are added in float32: by QuACK and Transformer Engine into a buffer, by torch in its own way.

Shape legend: t tokens, n inputs, m outputs.
"""

from __future__ import annotations

import importlib.util
from functools import partial
from typing import TYPE_CHECKING

from loong_ops.bench.row import Missing, Row, Thunk
from loong_ops.quack_products import LARGE, LONG, Tile

if TYPE_CHECKING:
    from torch import Tensor

TOKENS = 32768
SIZES: dict[str, tuple[int, int]] = {
    "8B's queries, keys, values": (4096, 6144),
    "8B's attention output": (4096, 4096),
    "8B's gate and up": (4096, 24576),
    "8B's down": (12288, 4096),
    "30B-A3B's queries, keys, values": (2048, 5120),
    "30B-A3B's attention output": (4096, 2048),
}


TILES = (LARGE, LONG, Tile(128, 192, pingpong=True), Tile(256, 128))
"""Tiles worth a look."""


def rows() -> list[Row]:
    """Forward, then forward and both gradients, the weight's added in float32; and each product with other tiles."""
    makers = {"quack": _quack, "transformer_engine": _transformer_engine, "torch": _torch}
    whole = [
        Row(
            op="linear",
            shape=f"t={TOKENS} n={n} m={m} ({what})",
            name=name,
            direction=direction,
            make=partial(maker, n, m, direction),
            flops=products * 2.0 * TOKENS * n * m,
            bytes=moved,
        )
        for what, (n, m) in SIZES.items()
        for direction, products, moved in (
            ("forward", 1, 2.0 * (TOKENS * n + TOKENS * m + n * m)),
            ("both", 3, 2.0 * (3 * TOKENS * n + 2 * TOKENS * m + 2 * n * m) + 8.0 * n * m),
        )
        for name, maker in makers.items()
    ]
    return whole + [
        _product_row(what, n, m, kind, tile)
        for what, (n, m) in SIZES.items()
        for kind in ("forward", "inputs", "weight", "weight, written")
        for tile in (None, *TILES)
    ]


def _product_row(what: str, n: int, m: int, kind: str, tile: Tile | None) -> Row:
    """One product: of forward, or the gradient of the inputs or the weight; without a tile by torch."""
    weights = n * m * (8.0 if kind == "weight" else 4.0 if kind == "weight, written" else 2.0)
    return Row(
        op="linear",
        shape=f"{kind}: t={TOKENS} n={n} m={m} ({what})",
        name="torch" if tile is None else f"quack[{tile}]",
        direction="forward" if kind == "forward" else "backward",
        make=partial(_product, n, m, kind, tile),
        flops=2.0 * TOKENS * n * m,
        bytes=2.0 * TOKENS * (n + m) + weights,
        headline=False,
    )


def _product(n: int, m: int, kind: str, tile: Tile | None) -> Thunk:
    check_quack()
    import torch

    from loong_ops.quack_linear import _outer
    from loong_ops.quack_products import product

    hidden, upstream, weight = _inputs(n, m)
    if kind.startswith("weight"):
        buffer = torch.zeros(m, n, device="cuda")
        return lambda: _outer(upstream, hidden, tile, buffer, kind == "weight")
    left, right = (hidden, weight) if kind == "forward" else (upstream, weight.t())
    out = torch.empty(TOKENS, len(right), device="cuda", dtype=torch.bfloat16)
    if tile is None:
        return lambda: torch.mm(left, right.t(), out=out)
    return lambda: product(left, right, out, tile)


def _inputs(n: int, m: int) -> tuple[Tensor, Tensor, Tensor]:
    """[t,n], its upstream gradient [t,m], and a weight [m,n], in bfloat16."""
    import torch

    torch.manual_seed(0)
    make = partial(torch.randn, device="cuda", dtype=torch.bfloat16)
    return make(TOKENS, n), make(TOKENS, m), make(m, n) * n**-0.5


def _quack(n: int, m: int, direction: str) -> Thunk:
    check_quack()
    import torch

    from loong_ops.quack_linear import linear

    hidden, upstream, weight = _inputs(n, m)
    if direction == "forward":
        return lambda: linear(hidden, weight)
    hidden.requires_grad_()
    weight.requires_grad_()
    weight.main_grad = torch.zeros(m, n, device="cuda")  # type: ignore[attr-defined]

    def both() -> None:
        hidden.grad = None  # otherwise autograd would add to it
        linear(hidden, weight).backward(upstream)

    return both


def check_quack() -> None:
    """Raise `Missing` where QuACK is not installed."""
    if importlib.util.find_spec("quack") is None:
        raise Missing("quack-kernels")


def _torch(n: int, m: int, direction: str) -> Thunk:
    import torch

    hidden, upstream, weight = _inputs(n, m)
    if direction == "forward":
        return lambda: torch.nn.functional.linear(hidden, weight)
    buffer = torch.zeros(m, n, device="cuda")

    def both() -> tuple[Tensor, Tensor]:
        result = torch.nn.functional.linear(hidden, weight)
        buffer.add_(upstream.t() @ hidden)
        return result, upstream @ weight

    return both


def _transformer_engine(n: int, m: int, direction: str) -> Thunk:
    if importlib.util.find_spec("transformer_engine") is None:
        raise Missing("transformer_engine")
    import torch
    from transformer_engine.pytorch import Linear

    hidden, upstream, weight = _inputs(n, m)
    layer = Linear(n, m, bias=False, params_dtype=torch.bfloat16, fuse_wgrad_accumulation=True, device="cuda")
    layer.weight.data.copy_(weight)
    layer.weight.main_grad = torch.zeros(m, n, device="cuda")
    hidden.requires_grad_()
    if direction == "forward":
        return lambda: layer(hidden)

    def both() -> None:
        hidden.grad = None  # otherwise autograd would add to it
        layer(hidden).backward(upstream)

    return both
