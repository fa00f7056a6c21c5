"""The op `linear` on QuACK's Hopper GEMMs, the weight's gradient by cuBLAS where that keeps more of the card busy.

Shape legend: t rows (all leading dims as one), n inputs, m outputs.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from loong_ops.linear import column_sums, outer
from loong_ops.linear import linear as by_cublas
from loong_ops.quack_products import LARGE, Tile, fits, needs_bfloat16, product, rows_of, tile_for, worth
from loong_ops.weight_gradient import delivered, weight_gradient

BUSY = 0.95
"""Share of the card that QuACK's tiles of a weight's gradient must keep busy. On an H200 they reached 711 TFLOP/s at
0.97 (weight [4096,12288]; cuBLAS 651), 614 at 0.81 ([5120,2048]; cuBLAS 683)."""

NARROWEST = 2048
"""The fewest inputs and outputs with which the tiles were measured."""


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, _tiles: Mapping[str, Tile] | None = None
) -> Tensor:
    """As `loong_core.references.linear.linear`, in bfloat16 on a Hopper card.

    x [..., n], weight [m,n], bias [m] or None -> [..., m]. Sums in float32, with the bias, and rounds once. Where n or
    m is no multiple of 8 or less than `NARROWEST`, or the rows are few, cuBLAS computes all of it. `_tiles` are tiles
    for "forward", "inputs" or "weight" (gradients). Raises `Unsupported` for other dtypes.
    """
    needs_bfloat16("linear", "torch", x=x, weight=weight)
    if not fits(*weight.shape) or min(weight.shape) < NARROWEST or not worth(x):
        return by_cublas(x, weight, bias)
    result: Tensor = _Linear.apply(x, weight, bias, _tiles or {})
    return result


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, tiles: Mapping[str, Tile]) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.tiles = tiles
        rows = rows_of(x)
        out = rows.new_empty(len(rows), len(weight))
        if len(rows):
            options = {} if bias is None else {"rowvec_bias": rows_of(bias)}
            tile = tiles.get("forward") or tile_for(len(out), out.shape[1], rows.shape[1])
            product(rows, rows_of(weight), out, tile, **options)
        return out.view(*x.shape[:-1], len(weight))

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, bias = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad[:3]
        d_out = rows_of(gradient)
        d_x = d_weight = d_bias = None
        if needs_x:
            d_x = d_out.new_empty(len(d_out), weight.shape[1])
            if len(d_out):
                tile = ctx.tiles.get("inputs") or tile_for(len(d_x), d_x.shape[1], len(weight))
                product(d_out, rows_of(weight).t(), d_x, tile)
            d_x = d_x.view(x.shape)
        if needs_weight:
            tile = ctx.tiles.get("weight") or (LARGE if LARGE.busy(*weight.shape) >= BUSY else None)
            d_weight = weight_gradient(weight, partial(_outer, d_out, rows_of(x), tile))
        if needs_bias:
            d_bias = delivered(bias, column_sums(d_out))
        return d_x, d_weight, d_bias, None


def _outer(left: Tensor, right: Tensor, tile: Tile | None, out: Tensor, add: bool) -> None:
    """out [m,n] (+)= left [t,m]^T @ right [t,n]; without a tile by torch."""
    if tile is None or not len(left):
        outer(left, right, out, add)
    else:
        product(left.t(), right.t(), out, tile, add_to_output=add)
