"""Sorts the chosen experts of a batch without the host ever learning a count: every offset stays on the device.

Shape legend: t tokens, k experts chosen for each token, e experts held here, p rows (pairs of a token and an expert).
A pair has the number token * k + slot; rows are the pairs held here, sorted by expert, within an expert by number.
The sort is a counting sort: counts of every block of pairs, their running sums over the blocks, where every expert
starts, ranks within a block.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from loong_core.references.experts import Pairs

BLOCK = 128
"""Pairs of one program: ranks within a block are found by comparing all its pairs with each other."""


class Permutation(NamedTuple):
    """Which rows belong to which expert. All int32, on the device of the chosen experts.

    `order` [p]: row -> pair. `position` [t*k]: pair -> row, -1 where another rank holds the expert. `offsets` [e+1]:
    expert -> its first row; rows from offsets[e] on are not used. `heaviest` [e]: the experts by falling number of
    rows. `tiles` [m,3]: the rows cut into tiles of at most `tile` rows, none reaching over two experts, as (expert,
    first row, row after the last); then tiles of the expert -1, of which the first covers the rows that are not used,
    up to `tile` of them, and the others nothing.
    """

    order: Tensor
    position: Tensor
    offsets: Tensor
    heaviest: Tensor
    tiles: Tensor
    tile: int


def count_of(pairs: Pairs, chosen: Tensor) -> int:
    """The number of rows to make room for; the host may wait."""
    if pairs is None:
        return chosen.numel()
    return pairs if isinstance(pairs, int) else pairs()


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
    tiles = empty((triton.cdiv(rows, tile) + experts, 3), dtype=torch.int32)
    chosen = chosen.contiguous()
    _count_kernel[(blocks,)](chosen, counts, pairs, blocks, experts, first, WIDTH=width, BLOCK=BLOCK, num_warps=4)
    _running_sum_kernel[(experts,)](counts, totals, blocks, CHUNK=1024, num_warps=4)
    _tile_kernel[(experts + 1,)](
        totals, offsets, heaviest, tiles, len(tiles), experts, rows, WIDTH=width, TILE=tile, CHUNK=128, num_warps=1
    )
    _place_kernel[(blocks,)](
        chosen, counts, offsets, order, position, pairs, blocks, experts, first, rows, BLOCK=BLOCK, num_warps=4
    )
    return Permutation(order, position, offsets, heaviest, tiles, tile)


@triton.jit
def _local_experts(chosen, numbers, pairs, experts, first):
    """The expert of every pair counted from `first`, and -1 where it is not held here or there is no such pair."""
    local = tl.load(chosen + numbers, mask=numbers < pairs, other=-1).to(tl.int32) - first
    return tl.where((local >= 0) & (local < experts) & (numbers < pairs), local, -1)


@triton.jit(do_not_specialize=["pairs", "blocks", "first"])
def _count_kernel(chosen, counts, pairs, blocks, experts, first, WIDTH: tl.constexpr, BLOCK: tl.constexpr):
    block = tl.program_id(0)
    numbers = block * BLOCK + tl.arange(0, BLOCK)
    local = _local_experts(chosen, numbers, pairs, experts, first)
    columns = tl.arange(0, WIDTH)
    found = tl.histogram(tl.where(local < 0, 0, local), WIDTH, mask=local >= 0)
    tl.store(counts + columns * blocks + block, found, mask=columns < experts)


@triton.jit(do_not_specialize=["blocks"])
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


@triton.jit(do_not_specialize=["slots", "rows"])
def _tile_kernel(
    totals, offsets, heaviest, tiles, slots, experts, rows,
    WIDTH: tl.constexpr, TILE: tl.constexpr, CHUNK: tl.constexpr,
):  # fmt: skip
    """One program for each expert: its offset, its tiles and its place among the heaviest; one for the unused tiles."""
    expert = tl.program_id(0)
    columns = tl.arange(0, WIDTH)
    total = tl.load(totals + columns, mask=columns < experts, other=0)
    earlier = columns < expert
    start = tl.sum(tl.where(earlier, total, 0), 0)
    tile = tl.sum(tl.where(earlier, (total + TILE - 1) // TILE, 0), 0)
    tl.store(offsets + expert, start)
    if expert < experts:
        count = tl.load(totals + expert)
        heavier = (total > count) | ((total == count) & earlier)
        tl.store(heaviest + tl.sum(heavier.to(tl.int32), 0), expert)
        tile_count = (count + TILE - 1) // TILE
        end = start + count
        name = expert
    else:
        tile_count = slots - tile
        end = tl.minimum(start + TILE, rows)
        name = -1
    for chunk in range(0, tile_count, CHUNK):
        index = chunk + tl.arange(0, CHUNK)
        first = tl.minimum(start + index * TILE, end)
        inside = index < tile_count
        slot = tiles + 3 * (tile + index)
        tl.store(slot, tl.zeros((CHUNK,), tl.int32) + name, mask=inside)
        tl.store(slot + 1, first, mask=inside)
        tl.store(slot + 2, tl.minimum(first + TILE, end), mask=inside)


@triton.jit(do_not_specialize=["pairs", "blocks", "first", "rows"])
def _place_kernel(
    chosen, counts, offsets, order, position, pairs, blocks, experts, first, rows, BLOCK: tl.constexpr
):  # fmt: skip
    """Row of a pair: where its expert starts, plus the expert's pairs in blocks before, plus those before it here."""
    block = tl.program_id(0)
    lanes = tl.arange(0, BLOCK)
    numbers = block * BLOCK + lanes
    local = _local_experts(chosen, numbers, pairs, experts, first)
    held = local >= 0
    before = tl.load(offsets + local, mask=held, other=0) + tl.load(counts + local * blocks + block, mask=held, other=0)
    earlier = (local[:, None] == local[None, :]) & (lanes[None, :] < lanes[:, None])
    row = before + tl.sum(earlier.to(tl.int32), 1)
    tl.store(position + numbers, tl.where(held, row, -1), mask=numbers < pairs)
    tl.store(order + row, numbers, mask=held & (row < rows))
