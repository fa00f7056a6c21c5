"""The stopwatch of the start-up: every second belongs to a part, across processes."""

from __future__ import annotations

import pytest

from loong_core import startup
from loong_core.startup import Startup


class Clock:
    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 1_000.0
        monkeypatch.setattr(startup.time, "time", lambda: self.now)

    def passes(self, seconds: float) -> None:
        self.now += seconds


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


def measured(clock: Clock) -> Startup:
    watch = Startup()
    for part, seconds in [("checks", 0.5), ("imports", 2.0), ("data", 0.04), ("imports", 1.25)]:
        clock.passes(seconds)
        watch.mark(part)
    return watch


def test_parts_add_up(clock: Clock) -> None:
    watch = measured(clock)
    assert watch.parts == pytest.approx({"checks": 0.5, "imports": 3.25, "data": 0.04})
    assert watch.line() == "start-up 3.8 s: checks 0.5, imports 3.2"


def test_another_process_goes_on(clock: Clock) -> None:
    text = measured(clock).dump()
    clock.passes(3.0)
    watch = Startup.read(text)
    watch.mark("launch")
    assert watch.parts["launch"] == pytest.approx(3.0) and watch.parts["checks"] == pytest.approx(0.5)


@pytest.mark.parametrize("text", [None, "", "{", "[]", "1", '{"parts": {}}', '{"parts": [], "last": 0}'])
def test_nothing_handed_on(text: str | None, clock: Clock) -> None:
    watch = Startup.read(text)
    clock.passes(1.0)
    watch.mark("launch")
    assert watch.parts == {"launch": 1.0}


def test_nothing_measured() -> None:
    assert Startup().line() == "start-up 0.0 s"


def test_a_clock_that_is_set_back_takes_nothing_off(clock: Clock) -> None:
    watch = measured(clock)
    clock.passes(-100.0)
    watch.mark("device")
    clock.passes(1.0)
    watch.mark("device")
    assert watch.parts["device"] == 1.0
