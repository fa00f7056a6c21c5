"""The op `gated_mlp` on QuACK's Hopper GEMMs: SwiGLU and its gradient are epilogues of the products.

Kept for backward are the inputs and the projected rows `gate_up`; the activation falls off its gradient once more.
Shape legend: t rows (all leading dims as one), n inputs, f inner size, m outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_ops.gated_mlp import gated_mlp as by_cublas
from loong_ops.quack_products import (
    Tile,
    config,
    fits,
    needs_bfloat16,
    product,
    rows_of,
    tile_for,
    worth,
)
from loong_ops.weight_gradient import weight_gradient

TILES: Mapping[str, Tile] = {"up": Tile(128, 192, pingpong=True), "d_act": Tile(128, 192, pingpong=True)}
"""The products with SwiGLU in their epilogue: 693 and 653 TFLOP/s at the sizes of `bench/gated_mlp.py` on an H200. Of
`d_act` the tiles that two warp groups share have too few registers for an epilogue that reads and writes pairs: 370 to
450 TFLOP/s."""


def gated_mlp(
    x: Tensor,
    up: Tensor,
    down: Tensor,
    *,
    activation: Literal["silu", "gelu"] = "silu",
    _tiles: Mapping[str, Tile] | None = None,
) -> Tensor:
    """As `loong_core.references.mlp.gated_mlp`, in bfloat16 on a Hopper card.

    x [..., n], up [2f,n], down [m,f] -> [..., m]. Products sum in float32; `gate_up`, the activation and the result are
    rounded to bfloat16. Where n, f or m is no multiple of 8, or the rows are few, cuBLAS computes the products; and for
    GELU, whose epilogues took 17.9 ms where cuBLAS and two passes take 17.5 (18,432 rows of Pi0.5, both ways). `_tiles`
    are tiles for "up", "down", "d_act", "d_x", "d_down" or "d_up". Raises `Unsupported` for other dtypes.
    """
    needs_bfloat16("gated_mlp", "torch", x=x, up=up, down=down)
    if activation == "gelu" or not fits(up.shape[1], *down.shape) or not worth(x):
        return by_cublas(x, up, down, activation=activation)
    keep = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in (x, up, down))
    result: Tensor = _GatedMlp.apply(x, up, down, keep, {**TILES, **(_tiles or {})})
    return result


class _GatedMlp(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, up: Tensor, down: Tensor, keep: bool, tiles: Mapping[str, Tile]) -> Tensor:
        rows, ctx.tiles = rows_of(x), tiles
        out = rows.new_empty(len(rows), len(down))
        gate_up: Tensor | None = rows.new_empty(0, len(up))
        if len(rows):
            gate_up, act = _gated(rows, rows_of(up), keep, tiles["up"])
            product(act, rows_of(down), out, tiles.get("down") or tile_for(len(out), out.shape[1], act.shape[1]))
        if keep:
            ctx.save_for_backward(x, up, down, gate_up)
        return out.view(*x.shape[:-1], len(down))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, up, down, gate_up = ctx.saved_tensors
        needs_x, needs_up, needs_down = ctx.needs_input_grad[:3]
        d_out = rows_of(gradient)
        if len(d_out):
            d_gate_up, act = _d_gated(d_out, rows_of(down), gate_up, ctx.tiles["d_act"])
        else:
            d_gate_up, act = gate_up, gate_up[:, : down.shape[1]]
        del gate_up
        d_x = d_up = d_down = None
        if needs_down:
            d_down = weight_gradient(down, partial(_outer, d_out, act, ctx.tiles.get("d_down"), False))
        del act
        if needs_up:
            d_up = weight_gradient(up, partial(_outer, rows_of(x), d_gate_up, ctx.tiles.get("d_up"), True))
        if needs_x:
            d_x = _d_inputs(d_gate_up, rows_of(up), ctx.tiles.get("d_x")).view(x.shape)
        return d_x, d_up, d_down, None, None


def _gated(x: Tensor, up: Tensor, keep: bool, tile: Tile) -> tuple[Tensor | None, Tensor]:
    """x @ up^T with alternating columns [t,2f] (None unless kept), and silu(gate) * value of it [t,f]."""
    from quack.gemm_interface import gemm_gated

    gate_up, act = gemm_gated(
        x,
        up.t(),
        activation="swiglu",
        store_preact=keep,
        config=config(tile),
        tuned=False,
        concat_layout=("B",),
    )
    return gate_up, act


def _d_gated(d_out: Tensor, down: Tensor, gate_up: Tensor, tile: Tile) -> tuple[Tensor, Tensor]:
    """The gradient of `gate_up` [t,2f], columns alternating, and the activation [t,f]."""
    from quack.gemm_interface import gemm_dgated

    d_gate_up, act = gemm_dgated(
        d_out, down, gate_up, activation="swiglu", dynamic_scheduler=False, config=config(tile), tuned=False
    )
    return d_gate_up, act


def _d_inputs(d_gate_up: Tensor, up: Tensor, tile: Tile | None) -> Tensor:
    """d_gate_up [t,2f] with alternating columns @ up [2f,n]."""
    out = d_gate_up.new_empty(len(d_gate_up), up.shape[1])
    if len(out):
        tile = tile or tile_for(len(out), out.shape[1], len(up))
        # Only stacks of matrices may alternate.
        product(d_gate_up[None], up.t()[None], out[None], tile, concat_layout=("B",))
    return out


def _outer(left: Tensor, right: Tensor, tile: Tile | None, alternating: bool, out: Tensor, add: bool) -> None:
    """out [a,b] (+)= left [t,a]^T @ right [t,b]; `alternating`: the columns of `right` do, and out is [b,a]."""
    out = out.t() if alternating else out
    if len(left):
        tile = tile or tile_for(len(out), out.shape[1], len(left))
        concat = ("out",) if alternating else None
        product(left.t()[None], right.t()[None], out[None], tile, add_to_output=add, concat_layout=concat)
    elif not add:
        out.zero_()
