"""Charts: geometry, gaps, round ticks, and spikes that survive thinning."""

from __future__ import annotations

import xml.etree.ElementTree as ElementTree

import pytest
from hypothesis import given
from hypothesis import strategies as st

from loong_core.train import plot
from loong_core.train.plot import Chart, Series, hover_data, number, svg, thin_out, ticks


def drawn(*series: Series, zero: bool = False) -> ElementTree.Element:
    return ElementTree.fromstring(svg(Chart(title="T", series=series, zero=zero)))


def points(element: ElementTree.Element) -> list[tuple[float, float]]:
    return [tuple(map(float, pair.split(","))) for pair in element.attrib["points"].split()]  # type: ignore[misc]


def line(y: list[float | None], **fields: object) -> Series:
    return Series(name="a", x=list(range(1, len(y) + 1)), y=y, **fields)  # type: ignore[arg-type]


def test_a_line_spans_the_frame_and_rises_upwards() -> None:
    (polyline,) = drawn(line([0.0, 1.0, 2.0])).iter("polyline")
    (x0, y0), (x1, y1), (x2, y2) = points(polyline)
    assert x0 == plot.LEFT and x2 == plot.WIDTH - plot.RIGHT and x1 == pytest.approx((x0 + x2) / 2)
    assert y0 > y1 > y2 and y1 == pytest.approx((y0 + y2) / 2)


def test_a_gap_breaks_the_line_and_a_lonely_value_is_a_dot() -> None:
    picture = drawn(line([1.0, 2.0, None, 3.0, None, 2.0, 1.0]))
    assert [len(points(each)) for each in picture.iter("polyline")] == [2, 2]
    assert len(list(picture.iter("circle"))) == 1


def test_marks() -> None:
    assert len(list(drawn(line([1.0, None, 2.0], marked=True)).iter("circle"))) == 2


@pytest.mark.parametrize("y", [[], [None, None]])
def test_nothing_to_draw_is_said(y: list[float | None]) -> None:
    assert "no values" in "".join(drawn(line(y)).itertext())
    assert hover_data(Chart(title="T", series=(line(y),))) == {}


@pytest.mark.parametrize("y", [[0.0], [5.0], [0.0, 0.0], [-3.0, -3.0], [1e-30, 1e-30], [1e300, -1e300]])
@pytest.mark.parametrize("zero", [False, True])
def test_degenerate_ranges(y: list[float | None], zero: bool) -> None:
    picture = drawn(line(y), zero=zero)
    for each in picture.iter("polyline"):
        assert all(-1 <= value <= plot.HEIGHT + 1 for _, value in points(each))


@given(st.floats(-1e9, 1e9), st.floats(1e-9, 1e9))
def test_ticks_are_inside_and_few(low: float, span: float) -> None:
    high = low + span
    if high <= low:
        return
    found = ticks(low, high)
    tolerance = (high - low) * 1e-6 + abs(low) * 1e-9
    assert 1 <= len(found) <= 8
    assert all(low - tolerance <= value <= high + tolerance for value in found)


def test_ticks_are_round() -> None:
    assert ticks(0, 10) == [0, 2, 4, 6, 8, 10]
    assert ticks(0.03, 0.97) == pytest.approx([0.2, 0.4, 0.6, 0.8])


@pytest.mark.parametrize(
    ("value", "text"),
    [(0, "0"), (0.5, "0.5"), (7977.3, "7977"), (12_345, "12.35k"), (2.5e6, "2.5M"), (3e-5, "3e-05"), (3e10, "30G")],
)
def test_number(value: float, text: str) -> None:
    assert number(value) == text


def test_thinning_keeps_every_spike() -> None:
    values: list[float | None] = [1.0] * 100_000
    values[54_321], values[777], values[9] = 99.0, -5.0, None
    thin = thin_out(line(values))
    assert len(thin.x) <= 1300
    assert 99.0 in thin.y and -5.0 in thin.y
    assert list(thin.x) == sorted(set(thin.x))
    short = line([1.0, 2.0])
    assert thin_out(short) is short


def test_hover_data_is_what_is_drawn() -> None:
    chart = Chart(title="T", unit=" s", series=(line([1.0, None, 3.0]), line([9.0], hover=False, color=1)))
    found = hover_data(chart)
    assert (found["low"], found["high"], found["unit"]) == (1, 3, " s")
    assert found["series"] == [{"name": "a", "color": 0, "x": [1, 2, 3], "y": [1.0, None, 3.0]}]


def test_titles_are_escaped() -> None:
    assert "<b>" not in svg(Chart(title='<b>"', series=()))
