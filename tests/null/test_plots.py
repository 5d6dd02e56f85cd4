"""Axes and lines of the plots."""

import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from strop.bench.serve.plots import Plot, Series, _Axis, render_svg

SIZES = st.floats(1e-4, 1e6)


@given(SIZES, st.floats(1.001, 1e5))
def test_ticks_are_round_and_inside(low: float, factor: float) -> None:
    linear = _Axis(0.0, low * factor, False, 0.0, 100.0)
    assert 3 <= len(linear.ticks()) <= 8
    log = _Axis(low, low * factor, True, 0.0, 100.0)
    for axis in (linear, log):
        places = [axis.place(tick) for tick in axis.ticks()]
        assert all(-0.1 <= place <= 100.1 for place in places)
        assert places == sorted(places)
    assert 2 <= len(log.ticks()) <= 12


def drawn(plot: Plot) -> list[list[tuple[float, float]]]:
    lines = re.findall(r'<polyline [^>]*points="([^"]*)"', render_svg(plot).partition("<ul>")[0])
    return [[(float(x), float(y)) for x, y in (place.split(",") for place in line.split())] for line in lines]


def test_larger_values_are_further_right_and_higher_up() -> None:
    points = [(1.0, 10.0), (10.0, 20.0), (100.0, 30.0)]
    for is_log in (False, True):
        (line,) = drawn(Plot("t", "x", "y", [Series("s", points)], is_log_x=is_log))
        assert line == sorted(line)
        assert [y for _, y in line] == sorted((y for _, y in line), reverse=True)
    assert line[1][0] - line[0][0] == pytest.approx(
        line[2][0] - line[1][0], abs=0.2
    )  # of equal ratios on a logarithmic axis


def test_zeros_and_nothing() -> None:
    (line,) = drawn(Plot("t", "x", "y", [Series("s", [(0.0, 0.0), (1.0, 0.0)])], is_log_x=True))
    assert len(line) == 1
    (line,) = drawn(Plot("t", "x", "y", [Series("s", [(0.0, 0.0)])]))
    assert len(line) == 1
    assert "nothing to draw" in render_svg(Plot("t", "x", "y", [Series("s", [])]))


def test_names_are_escaped_and_lines_told_apart() -> None:
    svg = render_svg(Plot("<t>", "<x>", "<y>", [Series("<s>", [(1, 1)], colour=i) for i in (0, 8)]))
    assert not re.search("<[tsxy]>", svg)
    assert svg.count("stroke-dasharray") == 2  # the second line, and its key


def test_logarithmic_both_ways_and_labels() -> None:
    points = [(1.0, 100.0), (10.0, 10.0), (100.0, 1.0)]
    plot = Plot("t", "x", "y", [Series("s", points, labels=("a<b", "", "c"))], is_log_x=True, is_log_y=True)
    ((one, two, three),) = drawn(plot)
    assert two[0] - one[0] == pytest.approx(three[0] - two[0], abs=0.2)
    assert two[1] - one[1] == pytest.approx(three[1] - two[1], abs=0.2)
    svg = render_svg(plot)
    assert ">a&lt;b</text>" in svg and ">c</text>" in svg and "></text>" not in svg
