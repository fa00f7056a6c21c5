"""Normalisation: formulas, bounds, what is refused. Equality with LeRobot is in test_inputs_parity.py."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from loong_core.errors import DataError
from loong_vla.normalise import Normaliser, normaliser, offsets, relative_mask, relative_statistics

STATISTICS = {
    "action": {
        "min": [-3.0, 0.0, 5.0],
        "max": [1.0, 4.0, 5.0],
        "q01": [-2.0, 1.0, 5.0],
        "q99": [0.0, 3.0, 5.0],
        "mean": [0.5, 2.0, 5.0],
        "std": [2.0, 0.5, 0.0],
    }
}


def made(mode: Any, **more: Any) -> Normaliser:
    return normaliser(mode, STATISTICS, "action", 3, "set", **more)


@pytest.mark.parametrize(
    ("mode", "expected"),
    [("quantiles", [[0.0, 1.0, -1.0]]), ("min_max", [[0.0, 0.5, -1.0]]), ("mean_std", [[-0.75, 2.0, 0.0]])],
)
def test_formulas(mode: Any, expected: Any) -> None:
    np.testing.assert_allclose(made(mode).forward(np.array([[-1.0, 3.0, 5.0]])), expected, atol=1e-6)


@pytest.mark.parametrize("mode", ["quantiles", "min_max", "mean_std", "identity"])
def test_back_and_forth(mode: Any) -> None:
    x = np.random.default_rng(0).normal(size=(4, 5, 3)).astype(np.float32) * 3
    x[..., 2] = 5.0
    found = made(mode)
    assert found.forward(x).dtype == found.backward(x).dtype == np.float32
    np.testing.assert_allclose(found.backward(found.forward(x)), x, atol=1e-5)


def test_zero_range_says_nothing_and_comes_back_as_the_constant() -> None:
    found = made("quantiles")
    assert found.zero_range() == [2] and made("mean_std").zero_range() == [2] and made("identity").zero_range() == []
    assert found.forward(np.array([0.0, 0.0, 7.0]))[2] == -1.0
    assert made("min_max", flat=0.0).forward(np.array([0.0, 0.0, 7.0]))[2] == 0.0
    assert found.backward(np.array([0.0, 0.0, 0.3]))[2] == 5.0


def test_quantiles_of_a_constant_are_no_range() -> None:
    """The histogram's quantiles of equal numbers differ in the tenth digit, and in float32 by its last bit."""
    low, high = 0.3, float(np.nextafter(np.float32(0.3), np.float32(1)))
    found = normaliser("quantiles", {"action": {"q01": [low, -1.0], "q99": [high, 1.0]}}, "action", 2, "set")
    assert found.zero_range() == [0]
    np.testing.assert_array_equal(found.forward(np.array([0.9, 0.5])), np.float32([-1.0, 0.5]))


def test_clip_keeps_both_directions_inside() -> None:
    found = made("min_max", clip=True)
    np.testing.assert_array_equal(found.forward(np.array([9.0, -9.0, 5.0]))[:2], [1.0, -1.0])
    np.testing.assert_array_equal(found.backward(np.array([1.5, -1.5, 0.0]))[:2], [1.0, 0.0])
    assert made("min_max").forward(np.array([9.0, 0, 0]))[0] == 5.0


@pytest.mark.parametrize(
    ("mode", "change", "words"),
    [
        ("quantiles", {"q99": None}, ["`action`", "`set`", "q99", "compute"]),
        ("quantiles", {"q99": [0.0, 1.0]}, ["q99", "2 numbers, not 3"]),
        ("min_max", {"max": [0.0, np.nan, 1.0]}, ["max", "not finite"]),
        ("min_max", {"max": [-9.0, 9.0, 9.0]}, ["min of `action` is greater than max"]),
    ],
)
def test_refused_statistics_are_named(mode: Any, change: Any, words: Any) -> None:
    with pytest.raises(DataError) as error:
        normaliser(mode, {"action": {**STATISTICS["action"], **change}}, "action", 3, "set")
    assert all(word in str(error.value) for word in words), str(error.value)


@pytest.mark.parametrize("statistics", [None, {}])
def test_absent_statistics_are_named(statistics: Any) -> None:
    with pytest.raises(DataError, match="`set` has no statistics of `action`"):
        normaliser("min_max", statistics, "action", 3, "set")


def test_relative_mask_and_offsets() -> None:
    mask = relative_mask(["shoulder", "Gripper.pos", "elbow"], 4, ["gripper", ""])
    assert mask.tolist() == [True, False, True, True]
    np.testing.assert_array_equal(offsets(np.array([[1.0, 2.0, 3.0, 4.0, 5.0]]), mask), [[1.0, 0.0, 3.0, 4.0]])
    with pytest.raises(DataError, match="at least 4 numbers"):
        offsets(np.zeros((1, 3)), mask)
    assert offsets(np.zeros((2, 1)), np.array([True, False])).shape == (2, 2)


def test_relative_statistics_by_step_and_together() -> None:
    state = np.arange(5.0)[:, None].repeat(2, 1)
    action = state + [[10.0, 20.0]]
    mask = np.array([True, False])
    by_step = relative_statistics([(state, action), (state[:2], action[:2])], mask, 3, by_step=True)
    np.testing.assert_allclose(by_step["min"], [[10, 20], [11, 21], [12, 22]])
    np.testing.assert_allclose(by_step["max"], [[10, 22], [11, 23], [12, 24]])
    assert by_step["count"].tolist() == [3, 3, 3]
    together = relative_statistics([(state, action)], mask, 3, by_step=False)
    np.testing.assert_allclose(together["max"], [12, 24])
    with pytest.raises(DataError, match="two chunks of 5 frames"):
        relative_statistics([(state, action)], mask, 5, by_step=True)


def test_steps_have_their_own_bounds() -> None:
    entry = {"min": [[0.0], [10.0]], "max": [[2.0], [20.0]]}
    found = normaliser("min_max", {"action": entry}, "action", 1, "set")
    np.testing.assert_allclose(found.forward(np.array([[1.0], [20.0]])), [[0.0], [1.0]])
    np.testing.assert_allclose(found.backward(np.array([[0.0]])), [[1.0]])
