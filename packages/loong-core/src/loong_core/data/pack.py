"""Puts samples into rows of equal length; a pure function of the ordered lengths, so every rank finds the same rows."""

from __future__ import annotations

from bisect import bisect_left, insort
from typing import NamedTuple

import numpy as np

WINDOW = 512
"""Open rows best-fit chooses from. 512 leaves 1 to 3 % of padding on usual length distributions."""

_ROW_BITS = 40


class Rows(NamedTuple):
    """`items[starts[i]:starts[i + 1]]` are the positions (in the given order) of the samples of row `i`."""

    items: np.ndarray
    starts: np.ndarray

    def __len__(self) -> int:
        return len(self.starts) - 1


def one_per_row(count: int) -> Rows:
    """Every sample has a row of its own."""
    return Rows(np.arange(count, dtype=np.int64), np.arange(count + 1, dtype=np.int64))


def next_fit(lengths: np.ndarray, capacity: int) -> Rows:
    """Fill rows strictly in order: a sample that does not fit opens the next row. Keeps the order exactly."""
    ends = np.cumsum(lengths, dtype=np.int64)
    starts, filled, at = [0], 0, 0
    while at < len(lengths):
        at = int(np.searchsorted(ends, filled + capacity, side="right"))
        assert at > starts[-1], "a sample is longer than a row"
        starts.append(at)
        filled = int(ends[at - 1])
    return Rows(np.arange(len(lengths), dtype=np.int64), np.array(starts, dtype=np.int64))


def best_fit(lengths: np.ndarray, capacity: int, window: int = WINDOW) -> Rows:
    """Put each sample, in order, into the fullest of at most `window` open rows that still has room for it.

    When none has, a new row is opened and, beyond `window`, the fullest one is closed. Rows come out in the order they
    were opened, samples of a row in the order they came. Takes about a second per million samples.
    """
    assert len(lengths) == 0 or int(lengths.max()) <= capacity, "a sample is longer than a row"
    row_of = np.empty(len(lengths), dtype=np.int64)
    spaces: list[int] = []  # ascending room << _ROW_BITS | row
    rows, mask = 0, (1 << _ROW_BITS) - 1
    for sample, length in enumerate(lengths.tolist()):
        at = bisect_left(spaces, length << _ROW_BITS)
        if at < len(spaces):
            space = spaces.pop(at)
            row, room = space & mask, (space >> _ROW_BITS) - length
        else:
            row, room = rows, capacity - length
            rows += 1
            if len(spaces) >= window:
                del spaces[0]
        if room:
            insort(spaces, room << _ROW_BITS | row)
        row_of[sample] = row
    items = np.argsort(row_of, kind="stable").astype(np.int64)
    starts = np.concatenate([[0], np.cumsum(np.bincount(row_of, minlength=rows))]).astype(np.int64)
    return Rows(items, starts)


def efficiency(lengths: np.ndarray, rows: int, capacity: int) -> float:
    """Share of the tokens of `rows` rows that is not padding."""
    return float(lengths.sum()) / (rows * capacity) if rows else 0.0
