"""The nearest name."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from loong_core.suggest import did_you_mean, edit_distance, nearest

KEYS = ["tp", "pp", "cp", "ep", "sp", "etp", "vpp", "layout", "options", "weight_decay", "lr", "min_lr"]


@pytest.mark.parametrize(
    ("first", "second", "distance"),
    [("", "", 0), ("", "abc", 3), ("lr", "lrr", 1), ("tp", "pt", 1), ("kitten", "sitting", 3), ("ab", "ba", 1)],
)
def test_edit_distance(first: str, second: str, distance: int) -> None:
    assert edit_distance(first, second) == edit_distance(second, first) == distance


@settings(deadline=None)
@given(st.text("abc_", max_size=8), st.text("abc_", max_size=8))
def test_edit_distance_is_bounded_and_zero_only_for_equals(first: str, second: str) -> None:
    distance = edit_distance(first, second)
    assert (distance == 0) == (first == second)
    assert abs(len(first) - len(second)) <= distance <= max(len(first), len(second))


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("lrr", "lr"), ("layuot", "layout"), ("Options", "options"), ("weight-decay", "weight_decay"), ("opt", "options")],
)
def test_nearest(wrong: str, right: str) -> None:
    assert nearest(wrong, KEYS)[0] == right
    assert f"Did you mean {right!r}" in did_you_mean(wrong, KEYS)


def test_equally_near_names_are_all_given_and_far_ones_never() -> None:
    assert set(nearest("xp", KEYS)) == {"tp", "pp", "cp", "ep", "sp"}
    assert nearest("pt", KEYS)[0] == "tp"
    assert nearest("something", KEYS) == []
    assert did_you_mean("something", []) == ""
