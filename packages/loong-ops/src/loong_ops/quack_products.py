"""QuACK's Hopper GEMMs as the ops here call them: tiles by size, operands as tensor maps want them, sums into buffers.

QuACK wants gates and values in alternating columns; weights here hold all gates, then all values. Its `concat_layout`
reads such a weight, and writes such a gradient, through a tensor map that alternates. So only what nobody else sees,
the projected rows and their gradient, has alternating columns.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch
from torch import Tensor

from loong_core.errors import Unsupported

ALIGNMENT = 8
"""Sizes must be multiples of this many bfloat16 numbers (16 bytes, what a tensor map can step over)."""
UNITS = 132
"""Streaming multiprocessors of an H200: output tiles that are computed at once."""


FEWEST = 16384
"""Rows from which products are QuACK's. The tiles here were measured at 32,768; where below that cuBLAS gets ahead,
which knows more tiles and can split sums, was not. So this is a cautious guess."""


class Tile(NamedTuple):
    """The tile of one thread block, and whether two warp groups take turns (`pingpong`) or share a tile."""

    rows: int
    columns: int
    pingpong: bool = False
    cluster: int = 2

    def __str__(self) -> str:
        return f"{self.rows}x{self.columns},{'turns' if self.pingpong else 'together'},c{self.cluster}"

    def busy(self, rows: int, columns: int) -> float:
        """Share of the card's work that goes into an output of this size: the rest is tiles that stick out over its
        edges, and units that have nothing to do while the last tiles are computed."""
        tiles = -(-rows // self.rows) * -(-columns // self.columns)
        return rows * columns / (self.rows * self.columns * UNITS * -(-tiles // UNITS)) if tiles else 0.0


LARGE, LONG = Tile(256, 192), Tile(128, 256)
SHORT = 2048


def tile_for(rows: int, columns: int, summed: int) -> Tile:
    """The tile of a plain product: [rows,summed] times [summed,columns].

    On an H200 with 32,768 tokens, `LARGE` against `LONG`, TFLOP/s: weight [24576,4096] 715:701 (its inputs' gradient
    701:701), [4096,12288] 679:665 (687:673, its own gradient 711:667), [6144,4096] 676:654 (665:666), but [5120,2048]
    653:692 (648:691). Few rows may leave `LARGE` with too few tiles.
    """
    if min(columns, summed) <= SHORT or LARGE.busy(rows, columns) < 0.93 * LONG.busy(rows, columns):
        return LONG
    return LARGE


def needs_bfloat16(op: str, other: str, **tensors: Tensor) -> None:
    """Raise `Unsupported` for tensors of other dtypes, naming the `other` implementation that takes them."""
    for name, tensor in tensors.items():
        if tensor.dtype != torch.bfloat16:
            raise Unsupported(
                f"{op}.quack computes in bfloat16, but {name} is {str(tensor.dtype).removeprefix('torch.')}. "
                f"Set `precision: bf16`, or choose another implementation: `ops: {{{op}: {other}}}`."
            )


def fits(*sizes: int) -> bool:
    """Whether tensor maps can step over rows of these sizes."""
    return all(size > 0 and size % ALIGNMENT == 0 for size in sizes)


def worth(x: Tensor) -> bool:
    """Whether x [..., n] has enough rows (or none, which is quickest said). Never in a CUDA graph, where
    these products have not been seen to work: the one run that had rows enough for them ended out of memory while
    capturing, for a reason that was not established."""
    if x.is_cuda and torch.cuda.is_current_stream_capturing():
        return False
    return x.numel() >= FEWEST * x.shape[-1] or not x.numel()


def plain(tensor: Tensor) -> Tensor:
    """Contiguous and without history: tensors that require gradients cannot be handed over through DLPack."""
    return tensor.detach().contiguous()


def rows_of(tensor: Tensor) -> Tensor:
    """[..., n] as rows [t,n] that a tensor map can read: whole, 16 bytes apart or multiples of it, from such an address
    on; without a copy where they lie so. Without history."""
    rows = tensor.detach().reshape(-1, tensor.shape[-1])
    if rows.stride(1) == 1 and rows.stride(0) % ALIGNMENT == 0 and rows.data_ptr() % 16 == 0:
        return rows
    return rows.clone(memory_format=torch.contiguous_format)


def product(left: Tensor, right: Tensor, out: Tensor, tile: Tile, **options: Any) -> None:
    """out = left @ right^T, for matrices or for stacks of them, in float32 and rounded once; `options` are QuACK's."""
    from quack.gemm import gemm

    gemm(left, right, out, None, None, tile.rows, tile.columns, tile.cluster, 1, pingpong=tile.pingpong, **options)


@functools.cache
def config(tile: Tile) -> Any:
    """The same object for the same tile: QuACK remembers a call's plan under the identity of its configuration."""
    from quack.gemm_config import GemmConfig

    return GemmConfig(
        tile_m=tile.rows,
        tile_n=tile.columns,
        pingpong=tile.pingpong,
        is_dynamic_persistent=False,
        cluster_m=tile.cluster,
        cluster_n=1,
    )
