"""The arithmetic of robot policies: published figures, and what is frozen."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pytest

from loong_core.types import ModelFamily, ModelShape
from loong_vla.flops import IDLE, Seen, forward, repeated, training
from loong_vla.models.groot import GROOT_N17, n17_presets
from loong_vla.models.groot_n16 import GROOT_N16
from loong_vla.models.groot_n16 import presets as n16_presets
from loong_vla.models.pi05 import PI05
from loong_vla.models.pi05 import presets as pi05_presets

REACHED = 790e12


def shape(family: ModelFamily, config: Mapping[str, Any]) -> ModelShape:
    from loong_core.registry import resolve

    found: ModelShape = resolve(family.describe)(family, config)
    return found


@pytest.fixture(scope="module")
def pi05() -> Mapping[str, Any]:
    return shape(PI05, pi05_presets()["pi05"]).fields


@pytest.fixture(scope="module")
def n17() -> Mapping[str, Any]:
    return shape(GROOT_N17, n17_presets()["groot_n17"]).fields


@pytest.mark.parametrize(("seen", "teraflops"), [(Seen(3, 200), 14.04), (Seen(2, 64), 8.44)])
def test_pi05_as_published_implementations_compute_it(pi05: Mapping[str, Any], seen: Seen, teraflops: float) -> None:
    assert 3 * sum(forward(pi05, seen).values()) == pytest.approx(teraflops * 1e12, rel=2e-3)
    assert training(pi05, seen) == pytest.approx(teraflops * 1e12 - 3 * forward(pi05, seen)[IDLE], rel=2e-3)


def test_pi05_without_what_nobody_reads(pi05: Mapping[str, Any]) -> None:
    parts = forward(pi05, Seen(2, 64))
    assert parts[IDLE] == pytest.approx(0.045 * sum(parts.values()), rel=0.1)
    assert parts["vision"] == pytest.approx(0.440e12, rel=0.01)
    assert REACHED / training(pi05, Seen(2, 64)) == pytest.approx(98, abs=2)


def test_groot_n17_as_published_implementations_compute_it(n17: Mapping[str, Any]) -> None:
    parts = forward(n17, Seen(2, 48))
    named = {"vision": 0.350, "language": 0.286, "refiner": 0.072}
    assert {name: parts[name] / 1e12 for name in named} == pytest.approx(named, rel=0.01)
    assert parts["head"] + parts["ends"] + parts[IDLE] == pytest.approx(0.105e12, rel=0.01)
    everything = training(n17, Seen(2, 48)) + 3 * parts[IDLE]
    assert everything == pytest.approx(1.17e12, rel=0.01)


def test_groot_n16_trains_the_top_of_its_language_model() -> None:
    fields = shape(GROOT_N16, n16_presets()["groot_n16"]).fields
    parts, seen = forward(fields, Seen(2, 48)), Seen(2, 48)
    assert parts["vision"] == pytest.approx(0.446e12, rel=0.015)
    assert parts["refiner"] == 0
    head = parts["head"] + parts["ends"]
    assert training(fields, seen) == pytest.approx(parts["vision"] + 1.5 * parts["language"] + 3 * head)


def test_frozen_parts_have_no_backward_pass(pi05: Mapping[str, Any]) -> None:
    seen = Seen(1, 10)
    parts, whole = forward(pi05, seen), training(pi05, seen)
    assert whole - training({**pi05, "freeze_vision": True}, seen) == pytest.approx(2 * parts["vision"])
    frozen = 2 * (parts["vision"] + parts["prefix"])
    assert whole - training({**pi05, "expert_only": True}, seen) == pytest.approx(frozen)


def test_nothing_is_spent_on_what_is_not_there(pi05: Mapping[str, Any]) -> None:
    parts = forward(pi05, Seen(0, 0))
    assert parts["vision"] == parts["prefix"] == parts[IDLE] == 0
    assert parts["expert"] > 0


def test_recomputation_is_one_more_forward_pass_of_what_is_trained(
    pi05: Mapping[str, Any], n17: Mapping[str, Any]
) -> None:
    seen = Seen(2, 40)
    for fields in (pi05, n17):
        useful = sum(value for part, value in forward(fields, seen).items() if part != IDLE)
        # Forward once and backward twice for what is trained; forward alone for the rest.
        assert repeated(fields, seen) == pytest.approx((training(fields, seen) - useful) / 2)
        assert 0 < repeated(fields, seen) <= useful
