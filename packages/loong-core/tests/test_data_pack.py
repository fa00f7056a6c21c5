"""Packing: nothing lost, nothing overfull, order kept where it was asked for."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_core.data.pack import Rows, best_fit, efficiency, next_fit, one_per_row

LENGTHS = st.lists(st.integers(1, 32), max_size=200).map(lambda values: np.array(values, dtype=np.int64))


@pytest.mark.parametrize("pack", [next_fit, best_fit, lambda lengths, capacity: best_fit(lengths, capacity, window=3)])
@given(lengths=LENGTHS)
@settings(deadline=None)
def test_every_sample_is_in_one_row_and_no_row_is_overfull(
    pack: Callable[[np.ndarray, int], Rows], lengths: np.ndarray
) -> None:
    rows = pack(lengths, 32)
    assert sorted(rows.items.tolist()) == list(range(len(lengths)))
    sums = [int(lengths[rows.items[a:b]].sum()) for a, b in zip(rows.starts, rows.starts[1:], strict=False)]
    assert all(0 < total <= 32 for total in sums)
    assert len(sums) == len(rows)


@given(lengths=LENGTHS)
@settings(deadline=None)
def test_next_fit_keeps_the_order_and_opens_a_row_only_when_it_must(lengths: np.ndarray) -> None:
    rows = next_fit(lengths, 32)
    assert rows.items.tolist() == list(range(len(lengths)))
    for row in range(len(rows) - 1):
        total = int(lengths[rows.starts[row] : rows.starts[row + 1]].sum())
        assert total + int(lengths[rows.starts[row + 1]]) > 32


def test_best_fit_takes_the_fullest_row_that_has_room() -> None:
    rows = best_fit(np.array([5, 7, 3, 2, 3]), 10)
    groups = [rows.items[a:b].tolist() for a, b in zip(rows.starts, rows.starts[1:], strict=False)]
    assert groups == [[0, 3, 4], [1, 2]]


def test_a_full_window_closes_the_fullest_row() -> None:
    rows = best_fit(np.array([6, 8, 7, 2]), 10, window=2)
    groups = [rows.items[a:b].tolist() for a, b in zip(rows.starts, rows.starts[1:], strict=False)]
    assert groups == [[0], [1], [2, 3]]


def test_best_fit_wastes_little() -> None:
    lengths = np.random.default_rng(0).lognormal(5, 0.8, 20_000).astype(np.int64).clip(1, 2048)
    assert efficiency(lengths, len(best_fit(lengths, 2048)), 2048) > 0.97


def test_a_sample_longer_than_a_row_is_our_bug() -> None:
    for pack in (next_fit, best_fit):
        with pytest.raises(AssertionError, match="longer than a row"):
            pack(np.array([3, 11]), 10)


def test_one_per_row() -> None:
    rows = one_per_row(3)
    assert (rows.items.tolist(), rows.starts.tolist(), len(rows)) == ([0, 1, 2], [0, 1, 2, 3], 3)
