"""The learning rate: closed forms at the corners, and what must hold at every step."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loong_core.recipe import OptimSection
from loong_core.train.schedule import learning_rate

SHAPES = ("constant", "cosine", "linear", "wsd")


def rates(steps: int, **section: object) -> list[float]:
    optim = OptimSection.model_validate(section)
    return [learning_rate(optim, step, steps) for step in range(1, steps + 1)]


def test_values_by_hand() -> None:
    assert rates(4, lr=8.0, warmup=4, schedule="constant") == [2.0, 4.0, 6.0, 8.0]
    assert rates(6, lr=4.0, min_lr=0.0, warmup=2, schedule="linear") == [2.0, 4.0, 3.0, 2.0, 1.0, 0.0]
    assert rates(6, lr=4.0, warmup=2, schedule="cosine")[3] == pytest.approx(2.0)
    assert rates(3, lr=1e-3, warmup=0, schedule="constant") == [1e-3] * 3
    assert rates(20, lr=1.0, min_lr=0.5, warmup=0, schedule="wsd") == [1.0] * 18 + [0.75, 0.5]


@pytest.mark.parametrize("schedule", SHAPES)
def test_warm_up_longer_than_the_run(schedule: str) -> None:
    assert rates(2, lr=1.0, warmup=8, schedule=schedule) == [1 / 8, 2 / 8]


@pytest.mark.parametrize("schedule", SHAPES)
def test_zero_stays_zero(schedule: str) -> None:
    assert set(rates(7, lr=0.0, warmup=3, schedule=schedule)) == {0.0}


@given(
    schedule=st.sampled_from(SHAPES),
    steps=st.integers(1, 300),
    warmup=st.integers(0, 400),
    lr=st.floats(1e-6, 1.0),
    share=st.floats(0, 1),
)
def test_rises_to_the_peak_and_falls_to_the_end(
    schedule: str, steps: int, warmup: int, lr: float, share: float
) -> None:
    least = lr * share
    found = rates(steps, lr=lr, min_lr=least, warmup=warmup, schedule=schedule)
    top = min(warmup, steps)
    assert found[:top] == sorted(found[:top])
    after = found[max(top - 1, 0) :] if top else found
    assert all(left >= right * (1 - 1e-12) for left, right in zip(after, after[1:], strict=False))
    assert max(found) <= lr * (1 + 1e-12)
    if warmup <= steps and warmup > 0:
        assert found[warmup - 1] == pytest.approx(lr)
    if warmup < steps and schedule != "constant":
        assert found[-1] == pytest.approx(least)
    assert all(value >= least * (1 - 1e-12) for value in found[top:])


@given(schedule=st.sampled_from(SHAPES), steps=st.integers(2, 200))
def test_no_jumps_after_warm_up(schedule: str, steps: int) -> None:
    found = rates(steps, lr=1.0, warmup=0, schedule=schedule)
    decay = max(1, -(-steps // 10)) if schedule == "wsd" else steps
    assert all(abs(left - right) <= 2.0 / decay for left, right in zip(found, found[1:], strict=False))
