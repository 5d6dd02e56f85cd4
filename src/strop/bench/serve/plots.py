"""Line plots as SVG, drawn by nothing but this file; colours come from the page's style sheet."""

import math
from dataclasses import dataclass
from html import escape

NUM_COLOURS = 8

_WIDTH, _HEIGHT = 520, 300
_LEFT, _RIGHT, _TOP, _BOTTOM = 62, 12, 10, 44
_NUM_TICKS = 6
_MIN_LOG_FACTOR = 20
"""A logarithmic axis over less than such a factor gets the ticks of a linear one."""


@dataclass(frozen=True, slots=True)
class Series:
    """A line; `colour` counts from 0, and lines of one colour are told apart by their dashes."""

    name: str
    points: list[tuple[float, float]]
    colour: int = 0
    is_dashed: bool = False
    labels: tuple[str, ...] = ()
    """Of the points, one each ("" for none), or none at all."""


@dataclass(frozen=True, slots=True)
class Plot:
    """Lines in one frame, of values of 0 or more; a logarithmic axis leaves out those of 0."""

    title: str
    x_label: str
    y_label: str
    series: list[Series]
    is_log_x: bool = False
    is_log_y: bool = False
    has_marks: bool = False
    """A dot at every point."""


@dataclass(frozen=True, slots=True)
class _Axis:
    low: float
    high: float
    is_log: bool
    begin: float
    end: float
    """Where low and high are drawn."""

    def place(self, value: float) -> float:
        low, high = self.low, self.high
        if self.is_log:
            value, low, high = math.log10(value), math.log10(low), math.log10(high)
        return self.begin + (value - low) / (high - low) * (self.end - self.begin)

    def ticks(self) -> list[float]:
        if self.is_log and self.high > _MIN_LOG_FACTOR * self.low:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) <= 4 else (1,)
            every = [step * 10.0**decade for decade in decades for step in steps]
        else:
            step = _nice_step((self.high - self.low) / _NUM_TICKS)
            every = [step * i for i in range(math.floor(self.low / step), math.ceil(self.high / step) + 1)]
        return [tick for tick in every if self.low <= tick <= self.high]


def render_svg(plot: Plot) -> str:
    """An <svg> element and its legend; "nothing to draw" if there is none."""

    def is_drawn(x: float, y: float) -> bool:
        return (x > 0 or not plot.is_log_x) and (y > 0 or not plot.is_log_y)

    lines = [(one, [(x, y) for x, y in one.points if is_drawn(x, y)]) for one in plot.series]
    points = [point for _, some in lines for point in some]
    if not points:
        return f"<figure><figcaption>{escape(plot.title)}</figcaption><p>nothing to draw</p></figure>"
    x_axis = _axis([x for x, _ in points], plot.is_log_x, _LEFT, _WIDTH - _RIGHT)
    y_axis = _axis([y for _, y in points], plot.is_log_y, _HEIGHT - _BOTTOM, _TOP)
    parts = [*_grid(x_axis, y_axis), *_labels(plot)]
    for one, some in lines:
        places = [(x_axis.place(x), y_axis.place(y)) for x, y in some]
        parts += _line(one, places, plot.has_marks)
        if len(one.labels) == len(places):
            parts += [_point_label(*place, label) for place, label in zip(places, one.labels, strict=True) if label]
    keys = "".join(
        f'<li><svg viewBox="0 0 24 8" class="key" aria-hidden="true">{"".join(_line(one, [(0, 4), (24, 4)], False))}'
        f"</svg>{escape(one.name)}</li>"
        for one in plot.series
    )
    return (
        f"<figure><figcaption>{escape(plot.title)}</figcaption>"
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(plot.title)}">{"".join(parts)}</svg>'
        f"<ul>{keys}</ul></figure>"
    )


def _axis(values: list[float], is_log: bool, begin: float, end: float) -> _Axis:
    if is_log:
        return _Axis(min(values) / 1.05, max(values) * 1.05, True, begin, end)
    return _Axis(0.0, 1.03 * max(values) or 1.0, False, begin, end)


def _nice_step(rough: float) -> float:
    decade = 10.0 ** math.floor(math.log10(rough))
    return next(step * decade for step in (1, 2, 5, 10) if step * decade >= rough * 0.999)


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    parts = []
    for tick in x_axis.ticks():
        x = f"{x_axis.place(tick):.1f}"
        parts.append(f'<line class="grid" x1="{x}" x2="{x}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>')
        parts.append(f'<text x="{x}" y="{_HEIGHT - _BOTTOM + 16}" text-anchor="middle">{tick:,.10g}</text>')
    for tick in y_axis.ticks():
        y = y_axis.place(tick)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_WIDTH - _RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{tick:,.10g}</text>')
    return parts


def _labels(plot: Plot) -> list[str]:
    middle_x, middle_y = (_LEFT + _WIDTH - _RIGHT) / 2, (_TOP + _HEIGHT - _BOTTOM) / 2
    return [
        f'<text x="{middle_x}" y="{_HEIGHT - 8}" text-anchor="middle">{escape(plot.x_label)}</text>',
        f'<text x="14" y="{middle_y}" text-anchor="middle" transform="rotate(-90 14 {middle_y})">'
        f"{escape(plot.y_label)}</text>",
    ]


def _line(series: Series, places: list[tuple[float, float]], has_marks: bool) -> list[str]:
    style = f"c{series.colour % NUM_COLOURS}"
    dashes = ' stroke-dasharray="6 4"' if series.is_dashed != (series.colour >= NUM_COLOURS) else ""
    path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    parts = [f'<polyline class="line {style}"{dashes} points="{path}"/>']
    if has_marks:
        parts += [f'<circle class="mark {style}" cx="{x:.1f}" cy="{y:.1f}" r="3"/>' for x, y in places]
    return parts


def _point_label(x: float, y: float, label: str) -> str:
    anchor, shift = ("end", -5) if x > (_LEFT + _WIDTH) / 2 else ("start", 5)
    return f'<text x="{x + shift:.1f}" y="{y - 5:.1f}" text-anchor="{anchor}">{escape(label)}</text>'
