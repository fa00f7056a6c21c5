"""The head and its loss with QuACK's Hopper GEMMs where those are faster than cuBLAS; all else is the Triton op's.

The hidden size decides which are, and what a chunk is.
Shape legend: c tokens of a chunk, h hidden size, w rows of the weight that take part, t tokens, v vocabulary, n ranks.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor

from loong_ops import linear_cross_entropy as triton
from loong_ops.linear_cross_entropy import Products
from loong_ops.quack_products import LARGE, LONG, Tile, fits, needs_bfloat16, product

NARROW = 2048
"""Hidden size up to which all products are QuACK's; above it only that of the hidden states' gradient. Measured on an
H200 with 151,936 columns, cuBLAS beside QuACK in TFLOP/s: with h = 2048 and 2816 tokens 662 and 691 (logits), 614 and
660 (hidden states), 629 and 658 (weight); with h = 4096 and 3072 tokens 705 and 691, 696 and 714, 619 and 619."""
TURNS = Tile(128, 192, pingpong=True)
"""Tile of the products with 151,936 rows or columns: one warp group multiplies while the other one stores."""


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    vocabulary: int,
    group: Any = None,
    _chunk: int | None = None,
) -> Tensor:
    """As `loong_ops.linear_cross_entropy`, in bfloat16 on a Hopper card: hidden [t,h], weight [v/n,h], targets [t] ->
    loss [t] in float32. Memory that no tensor map can step over (rows not of 16 bytes or a multiple) is multiplied by
    cuBLAS.

    Raises `Unsupported` for other dtypes, and `DataError` as that one does.
    """
    needs_bfloat16("linear_cross_entropy", "triton", hidden=hidden, weight=weight)
    return triton.linear_cross_entropy(
        hidden, weight, targets, vocabulary=vocabulary, group=group, _chunk=_chunk, _products=_PRODUCTS
    )


class QuackProducts(Products):
    """QuACK's products of a chunk. A gradient in bfloat16 needs no scale, so `alpha` is 1."""

    def tile(self, rows: int, columns: int) -> Tile:
        """The one that keeps the card busier; of equals the larger, which reads less."""
        return max((LARGE, LONG), key=lambda tile: round(tile.busy(rows, columns), 2))

    def logits(self, hidden: Tensor, weight: Tensor, out: Tensor) -> None:
        if hidden.shape[1] > NARROW or not _readable(hidden, weight, out):
            return super().logits(hidden, weight, out)
        product(hidden.detach(), weight.detach(), out, TURNS)

    def hidden_gradient(self, gradient: Tensor, weight: Tensor, out: Tensor, *, alpha: float) -> None:
        if alpha != 1 or not _readable(gradient, weight, out):
            return super().hidden_gradient(gradient, weight, out, alpha=alpha)
        product(gradient, weight.detach().t(), out, self.tile(*out.shape))

    def weight_gradient(self, gradient: Tensor, hidden: Tensor, out: Tensor, *, alpha: float, add: bool) -> None:
        if alpha != 1 or hidden.shape[1] > NARROW or not _readable(gradient, hidden, out):
            return super().weight_gradient(gradient, hidden, out, alpha=alpha, add=add)
        product(gradient.t(), hidden.detach().t(), out, TURNS, add_to_output=add)


_PRODUCTS = QuackProducts()


def _readable(*matrices: Tensor) -> bool:
    """Whether tensor maps can step over all of these: contiguous rows of whole 16 bytes, as far apart or multiples of
    it, from such an address on."""
    return all(
        matrix.stride(1) == 1
        and fits(*matrix.shape[1:])
        and matrix.stride(0) * matrix.element_size() % 16 == 0
        and matrix.data_ptr() % 16 == 0
        for matrix in matrices
    )
