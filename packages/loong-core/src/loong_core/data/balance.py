"""Moves samples between the rows of a global batch until attention costs each row the same.

Attention inside of a row costs the sum of the squared lengths of its samples, its work, and all ranks wait for the row
of the most. Rows are often exactly full, so no sample can simply move: two rows are split anew, by a search over the
subsets of their samples that fit. Sums are integers and sorts are stable, so every rank finds the same rows.
"""

from __future__ import annotations

import heapq
from bisect import insort
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

EVEN = 0.01
"""Rows are even where the most work is at most this share above the mean; a split that gains less than half of that
share is not worth its search."""

UNITS = 14
"""Parts a row is cut into for a search. Thousands of the subsets of two rows' parts then have the one sum that fits
full rows of 32768 tokens."""

_SPLITS = 2**14
"""Splits of two rows that are compared. Where more fit, these are spread evenly over them."""

_PARTNERS = 6
"""Rows of little work that a row of much work is tried with before it stays as it is."""


class _Unit(NamedTuple):
    """Samples of one row that stay together in a search. Compares by tokens, then by its first sample."""

    tokens: int
    items: tuple[int, ...]
    work: int


def balance(rows: Sequence[np.ndarray], capacity: int) -> list[np.ndarray]:
    """The rows of a global batch with their samples moved so that the largest work of a row is close to the mean.

    Args:
        rows: of each row the lengths of its samples, in tokens; together at most `capacity`.
        capacity: tokens a row has room for.

    Returns:
        Of each row the positions of its samples in the concatenation of `rows`, int64, ascending. Every position occurs
        once. No row is longer than `capacity`, none that held a sample ends without one, and the largest work is not
        larger than before. A pure function of the arguments.
    """
    lengths = np.concatenate([np.zeros(0, dtype=np.int64), *rows]).astype(np.int64).tolist()
    ends = np.cumsum([0, *(len(row) for row in rows)]).tolist()
    held = [list(range(begin, end)) for begin, end in zip(ends, ends[1:], strict=False)]
    assert all(sum(lengths[item] for item in items) <= capacity for items in held), "a row is overfull"
    uneven = sorted((_work(items, lengths), row) for row, items in enumerate(held))
    total = sum(work for work, _ in uneven)
    for _ in range(4 * len(held)):
        if len(uneven) < 2:
            break
        mean, (work, most) = total / len(uneven), uneven.pop()
        if work <= (1 + EVEN) * mean:
            break
        gain = EVEN / 2 * mean
        # Wherever the longest sample stands, its row costs that much.
        hopeless = work - max(lengths[item] for item in held[most]) ** 2 < gain
        for at in range(0 if hopeless else min(_PARTNERS, len(uneven))):
            partner = uneven[at][1]
            parts = _split(held[most], held[partner], lengths, capacity)
            parts_work = [_work(items, lengths) for items in parts]
            if work - max(parts_work) >= gain:
                del uneven[at]
                for row, items, of_row in zip((most, partner), parts, parts_work, strict=True):
                    held[row] = items
                    insort(uneven, (of_row, row))
                break
        else:  # this row stays as it is; the others are made even among themselves
            total -= work
    return [np.array(items, dtype=np.int64) for items in held]


def _work(items: Sequence[int], lengths: Sequence[int]) -> int:
    return sum(lengths[item] ** 2 for item in items)


def _split(first: list[int], second: list[int], lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Two rows with the samples of two, none longer than `capacity`, the larger work as small as was found."""
    units = sorted(_units(first, lengths) + _units(second, lengths), reverse=True)
    # Every split occurs twice, with the rows exchanged. So the longest unit may stay in the first row.
    stays, halves = units[0], (units[1::2], units[2::2])
    tokens = [_subset_sums([unit.tokens for unit in half]) for half in halves]
    work = [_subset_sums([unit.work for unit in half]) for half in halves]
    all_tokens, all_work = sum(unit.tokens for unit in units), sum(unit.work for unit in units)
    # For each subset of one half, those of the other that fit beside it follow each other in the order of tokens.
    order = np.argsort(tokens[1], kind="stable")
    ascending, here = tokens[1][order], stays.tokens + tokens[0]
    begins = np.searchsorted(ascending, all_tokens - capacity - here, side="left")
    counts = np.searchsorted(ascending, capacity - here, side="right") - begins
    ends = np.cumsum(counts)
    fitting = int(ends[-1])
    chosen = np.arange(min(fitting, _SPLITS), dtype=np.int64) * fitting // min(fitting, _SPLITS)
    left = np.searchsorted(ends, chosen, side="right")
    right = order[begins[left] + chosen - (ends - counts)[left]]
    found = stays.work + work[0][left] + work[1][right]
    best = int(np.argmin(np.maximum(found, all_work - found)))
    moved = [
        item
        for half, subset in zip(halves, (int(left[best]), int(right[best])), strict=True)
        for bit, unit in enumerate(half)
        if subset >> bit & 1
        for item in unit.items
    ]
    row = {*stays.items, *moved}
    return [sorted(row), sorted({*first, *second} - row)]


def _units(items: list[int], lengths: Sequence[int]) -> list[_Unit]:
    """The samples of a row as at most `UNITS` units: the two of the fewest tokens are merged until they are so few, so
    the long samples, which decide the work, stay on their own."""
    heap = [_Unit(lengths[item], (item,), lengths[item] ** 2) for item in items]
    heapq.heapify(heap)
    while len(heap) > UNITS:
        one = heapq.heappop(heap)
        other = heap[0]
        heapq.heapreplace(heap, _Unit(one.tokens + other.tokens, one.items + other.items, one.work + other.work))
    return heap


def _subset_sums(values: Sequence[int]) -> np.ndarray:
    """Sums of all subsets, int64 [2**len(values)]; bit `i` of an index says whether value `i` is in."""
    sums = np.zeros(1, dtype=np.int64)
    for value in values:
        sums = np.concatenate([sums, sums + value])
    return sums
