"""Sorts the chosen experts of a batch without the host ever learning a count: every offset stays on the device.

Shape legend: t tokens, k experts chosen for each token, e experts held here, p rows (pairs of a token and an expert).
A pair has the number token * k + slot; rows are the pairs held here, sorted by expert, within an expert by number.
The sort is a counting sort in three launches: counts of every block of pairs, their running sums, ranks within a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

BLOCK = 256
"""Pairs of one program: ranks within a block are found by comparing all its pairs with each other."""


class Permutation(NamedTuple):
    """Which rows belong to which expert. All int32, on the device of the chosen experts.

    `order` [p]: row -> pair. `position` [t*k]: pair -> row, -1 where another rank holds the expert. `offsets` [e+1]:
    expert -> its first row; rows from offsets[e] on are not used. `tiles` [m,2]: the rows cut into tiles of `tile`, none
    reaching over two experts, as (expert, first row); unused tiles have the expert -1. `heaviest` [e]: the experts by
    falling number of rows.
    """

    order: Tensor
    position: Tensor
    offsets: Tensor
    tiles: Tensor
    heaviest: Tensor
    tile: int


def sort_by_expert(chosen: Tensor, experts: int, first: int, rows: int, tile: int) -> Permutation:
    """The rows of chosen [t,k] (any integers) that the experts `first` to `first` + `experts` - 1 get.

    `rows` is at least their number; `tile` is the height of the tiles.
    """
    pairs = chosen.numel()
    blocks = triton.cdiv(pairs, BLOCK)
    empty = chosen.new_empty
    width = triton.next_power_of_2(experts)
    counts = empty((experts, blocks), dtype=torch.int32)
    totals = empty(experts, dtype=torch.int32)
    order = empty(rows, dtype=torch.int32)
    position = empty(pairs, dtype=torch.int32)
    offsets = empty(experts + 1, dtype=torch.int32)
    heaviest = empty(experts, dtype=torch.int32)
    tiles = empty((triton.cdiv(rows, tile) + experts, 2), dtype=torch.int32)
    chosen = chosen.contiguous()
    _count_kernel[(blocks,)](chosen, counts, pairs, blocks, experts, first, WIDTH=width, BLOCK=BLOCK, num_warps=4)
    _running_sum_kernel[(experts,)](counts, totals, blocks, CHUNK=1024, num_warps=4)
    _place_kernel[(blocks,)](
        chosen, counts, totals, order, position, pairs, blocks, experts, first, rows,
        WIDTH=width, BLOCK=BLOCK, num_warps=8,
    )  # fmt: skip
    slots = len(tiles)
    _tile_kernel[(triton.cdiv(slots, BLOCK),)](
        totals, offsets, heaviest, tiles, slots, experts, WIDTH=width, TILE=tile, BLOCK=BLOCK, num_warps=8
    )
    return Permutation(order, position, offsets, tiles, heaviest, tile)


@triton.jit
def _local_experts(chosen, numbers, pairs, experts, first):
    """The expert of every pair counted from `first`, and -1 where it is not held here or there is no such pair."""
    local = tl.load(chosen + numbers, mask=numbers < pairs, other=-1).to(tl.int32) - first
    return tl.where((local >= 0) & (local < experts) & (numbers < pairs), local, -1)


@triton.jit
def _count_kernel(chosen, counts, pairs, blocks, experts, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    numbers = block * BLOCK + tl.arange(0, BLOCK)
    local = _local_experts(chosen, numbers, pairs, experts, first)
    columns = tl.arange(0, WIDTH)
    found = tl.histogram(tl.where(local < 0, 0, local), WIDTH, mask=local >= 0)
    tl.store(counts + columns * blocks + block, found, mask=columns < experts)


@triton.jit
def _running_sum_kernel(counts, totals, blocks, CHUNK: tl.constexpr):
    """Replace an expert's count in every block by the sum over the blocks before it."""
    expert = tl.program_id(0)
    total = tl.zeros((), tl.int32)
    for start in range(0, blocks, CHUNK):
        index = start + tl.arange(0, CHUNK)
        here = tl.load(counts + expert * blocks + index, mask=index < blocks, other=0)
        tl.store(counts + expert * blocks + index, total + tl.cumsum(here, 0) - here, mask=index < blocks)
        total += tl.sum(here, 0)
    tl.store(totals + expert, total)


@triton.jit
def _place_kernel(
    chosen, counts, totals, order, position, pairs, blocks, experts, first, rows,
    WIDTH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Row of a pair: where its expert starts, plus the expert's pairs in blocks before, plus those before it here."""
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    numbers = block * BLOCK + lanes
    local = _local_experts(chosen, numbers, pairs, experts, first)
    held = local >= 0
    columns = tl.arange(0, WIDTH)
    total = tl.load(totals + columns, mask=columns < experts, other=0)
    before = tl.load(counts + columns * blocks + block, mask=columns < experts, other=0)
    start = tl.cumsum(total, 0) - total + before
    earlier = (local[:, None] == local[None, :]) & (lanes[None, :] < lanes[:, None])
    rank = tl.sum(earlier.to(tl.int32), 1)
    row = tl.gather(start, tl.where(held, local, 0), 0) + rank
    tl.store(position + numbers, tl.where(held, row, -1), mask=numbers < pairs)
    tl.store(order + row, numbers, mask=held & (row < rows))


@triton.jit
def _tile_kernel(
    totals, offsets, heaviest, tiles, slots, experts, WIDTH: tl.constexpr, TILE: tl.constexpr, BLOCK: tl.constexpr
):
    columns = tl.arange(0, WIDTH)
    total = tl.load(totals + columns, mask=columns < experts, other=0)
    start = tl.cumsum(total, 0) - total
    tile_count = (total + TILE - 1) // TILE
    tile_end = tl.cumsum(tile_count, 0)
    index = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    expert = tl.sum((tile_end[None, :] <= index[:, None]).to(tl.int32), 1)
    used = expert < WIDTH
    clipped = tl.where(used, expert, 0)
    within = index - tl.gather(tile_end - tile_count, clipped, 0)
    row = tl.gather(start, clipped, 0) + within * TILE
    tl.store(tiles + 2 * index, tl.where(used, expert, -1), mask=index < slots)
    tl.store(tiles + 2 * index + 1, tl.where(used, row, 0), mask=index < slots)
    if tl.program_id(0) == 0:
        tl.store(offsets + columns, start, mask=columns < experts)
        tl.store(offsets + columns + 1, start + total, mask=columns < experts)
        heavier = (total[None, :] > total[:, None]) | (
            (total[None, :] == total[:, None]) & (columns[None, :] < columns[:, None])
        )
        rank = tl.sum((heavier & (columns[None, :] < experts)).to(tl.int32), 1)
        tl.store(heaviest + rank, columns, mask=columns < experts)
