"""Attention work is made even within a global batch: nothing lost, nothing overfull, no row the worse for it."""

from __future__ import annotations

import time
from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_core.data.balance import balance

CAPACITY = 32768

ROWS = st.lists(st.lists(st.integers(1, 40), max_size=30), max_size=7)


def arrays(rows: Sequence[Sequence[int]]) -> list[np.ndarray]:
    return [np.array(row, dtype=np.int64) for row in rows]


def works(rows: Sequence[np.ndarray]) -> list[int]:
    return [int((row.astype(np.int64) ** 2).sum()) for row in rows]


def moved(rows: Sequence[np.ndarray], capacity: int) -> list[np.ndarray]:
    """The balanced rows as lengths; that nothing is lost and nothing is overfull is checked on the way."""
    found = balance(rows, capacity)
    lengths = np.concatenate(rows) if rows else np.zeros(0, dtype=np.int64)
    result = [lengths[row] for row in found]
    assert [len(rows)] == [len(found)]
    assert sorted(item for row in found for item in row.tolist()) == list(range(len(lengths)))
    assert all(row.tolist() == sorted(row.tolist()) and row.dtype == np.int64 for row in found)
    assert all(int(row.sum()) <= capacity for row in result)
    assert all(len(after) > 0 for before, after in zip(rows, found, strict=True) if len(before) > 0)
    assert max(works(result), default=0) <= max(works(rows), default=0)
    return result


def full_rows(count: int, seed: int) -> list[np.ndarray]:
    """Rows without padding, of documents of exponential length, the last of each row cut to fit."""
    generator, rows = np.random.default_rng(seed), []
    for _ in range(count):
        row: list[int] = []
        while left := CAPACITY - sum(row):
            row.append(min(max(int(generator.exponential(2048)), 64), left))
        rows.append(np.array(row, dtype=np.int64))
    return rows


def unevenness(rows: Sequence[np.ndarray]) -> float:
    return max(works(rows)) / (sum(works(rows)) / len(rows))


def attainable(rows: Sequence[np.ndarray]) -> float:
    """No arrangement of full rows is more even: the longest sample's row is filled up with the shortest at best."""
    lengths = np.sort(np.concatenate(rows))
    left, work = CAPACITY - int(lengths[-1]), float(lengths[-1]) ** 2
    for length in lengths.tolist():
        part = min(length, left)
        left, work = left - part, work + length * part
    return max(1.0, work / (sum(works(rows)) / len(rows)))


@given(rows=ROWS, slack=st.integers(0, 60))
@settings(deadline=None)
def test_nothing_is_lost_nothing_is_overfull_and_the_most_work_does_not_grow(rows: list[list[int]], slack: int) -> None:
    capacity = max((sum(row) for row in rows), default=0) + slack
    before = arrays(rows)
    kept = [row.copy() for row in before]
    moved(before, capacity)
    assert all(np.array_equal(one, other) for one, other in zip(before, kept, strict=True))
    again, first = balance(before, capacity), balance(before, capacity)
    assert all(np.array_equal(one, other) for one, other in zip(again, first, strict=True))


@given(
    longest=st.integers(500, 1000), rest=st.lists(st.integers(1, 9), min_size=60, max_size=200), rows=st.integers(2, 6)
)
@settings(deadline=None)
def test_many_short_samples_beside_a_long_one_keep_to_the_rows(longest: int, rest: list[int], rows: int) -> None:
    dealt = [rest[at::rows] for at in range(rows)]
    dealt[0].append(longest)
    moved(arrays(dealt), max(sum(row) for row in dealt))


@pytest.mark.parametrize("count", [2, 4, 8])
def test_full_rows_of_exponential_lengths_become_as_even_as_can_be(count: int) -> None:
    """The figures are means over batches. With more rows a single document is more often more than a row's share."""
    before, after, best, seconds = [], [], [], []
    for seed in range(60):
        rows = full_rows(count, seed)
        began = time.perf_counter()
        balance(rows, CAPACITY)
        seconds.append(time.perf_counter() - began)
        before.append(unevenness(rows))
        after.append(unevenness(moved(rows, CAPACITY)))
        best.append(attainable(rows))
    means = [float(np.mean(values)) for values in (before, after, best)]
    shown = "{:.3f} before, {:.3f} after, {:.3f} attainable".format(*means)
    print(f"{count} rows, most work / mean: {shown}; {1e3 * max(seconds):.0f} ms at most")  # noqa: T201
    assert means[1] < 1.025 * means[2]
    free = [value for value, bound in zip(after, best, strict=True) if bound == 1]
    assert len(free) > 10
    assert float(np.mean(free)) < 1.02


def test_rows_with_padding_become_even() -> None:
    generator = np.random.default_rng(1)
    found = []
    for _ in range(20):
        rows = [row[generator.permutation(len(row))][1:] for row in full_rows(4, int(generator.integers(2**32)))]
        after = works(moved(rows, CAPACITY))
        longest = max(int(row.max()) for row in rows)
        found.append(max(after) / max(longest**2, float(np.mean(after))))
    assert float(np.mean(found)) < 1.05


def test_samples_move_where_they_could_not_be_swapped_one_for_one() -> None:
    rows = arrays([[6, 6], [4, 4, 2, 2], [6, 6], [4, 4, 2, 2]])
    assert works(moved(rows, 12)) == [56, 56, 56, 56]
    # One long against sixteen short: the short ones move together.
    many = [np.full(16, 2048), np.full(256, 128), np.full(256, 128), np.full(256, 128)]
    assert unevenness(many) > 3
    assert unevenness(moved(many, CAPACITY)) < 1.01


def test_a_sample_that_is_more_than_a_share_is_freed_of_others_and_the_rest_is_made_even() -> None:
    rows = arrays([[1000, 400, 400], [100] * 10, [700, 100], [100] * 4])
    after = moved(rows, 1800)
    assert after[0].tolist() == [1000]
    assert max(works(after[1:])) < 1.05 * 700**2
    alone = arrays([[1800], [900, 300, 600], [300] * 6])
    after = moved(alone, 1800)
    assert after[0].tolist() == [1800]
    assert works(after[1:]) == [900**2 + 3 * 300**2, 600**2 + 4 * 300**2]


def test_rows_that_cannot_be_improved_stay_as_they_are() -> None:
    for rows in (
        [],
        [[]],
        [[], []],
        [[3, 1, 2]],
        [[7], [2], [5]],
        [[4, 2], [4, 2], [2, 4]],
        [[9], [1, 1, 1]],
    ):
        flat = iter(range(99))
        expected = [[next(flat) for _ in row] for row in rows]
        assert [row.tolist() for row in balance(arrays(rows), 10)] == expected


def test_a_row_without_samples_receives_some() -> None:
    assert works(moved(arrays([[], [5, 5], []]), 10)) == [25, 25, 0]
    assert sorted(works(moved(arrays([[], [3, 3, 3, 3], []]), 12))) == [9, 9, 18]


def test_lengths_may_be_narrow_and_works_beyond_32_bits() -> None:
    long = [row.astype(np.int32) * 40 for row in full_rows(4, 3)]
    assert max(works(long)) > 2**36
    assert unevenness(moved(long, CAPACITY * 40)) < 1.03


def test_an_overfull_row_is_our_bug() -> None:
    with pytest.raises(AssertionError, match="overfull"):
        balance(arrays([[3, 8], [2]]), 10)


def test_thousands_of_short_samples_and_hundreds_of_rows_take_no_time() -> None:
    """The time is reported, not judged: what is judged is that all of them were balanced."""
    generator = np.random.default_rng(0)
    short, many = [generator.integers(8, 64, 800) for _ in range(16)], full_rows(256, 0)
    short[0].sort()
    short[0][:300] = 8
    for name, rows, best in (("short samples", short, 1.0), ("samples", many, attainable(many))):
        began = time.perf_counter()
        balance(rows, CAPACITY)
        print(f"{len(rows)} rows, {sum(map(len, rows))} {name}: {time.perf_counter() - began:.2f} s")  # noqa: T201
        assert unevenness(moved(rows, CAPACITY)) < min(1.08 * best, unevenness(rows))


def test_the_rows_are_the_recorded_ones() -> None:
    """A change here would put samples into other rows in every run that is resumed with a newer version."""
    rows = arrays([[9, 3, 4], [2, 2, 5, 7], [1, 6, 1, 8], [3] * 5])
    assert [row.tolist() for row in balance(rows, 16)] == [
        [0, 3, 9, 13],
        [6, 11, 14, 15],
        [1, 4, 10, 12],
        [2, 5, 7, 8],
    ]
    many = arrays([[64 + (at * at * 2477 + row * 911) % (700 * row + 500) for at in range(20)] for row in range(6)])
    fullest = max(int(row.sum()) for row in many)
    for capacity, expected in ((fullest, 486_397), (fullest + 2000, 468_009)):
        items = np.concatenate(balance(many, capacity))
        assert int((items * np.arange(len(items))).sum()) == expected
