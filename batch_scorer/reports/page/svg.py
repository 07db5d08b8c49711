"""A drawing as SVG text. Pure functions; colours and fonts are the page's, by class.

The drawing is 360 units wide, as a phone is, so that its words can be read there. It is an image to
a screen reader, named by its figure's title: the values are in the table below it.
"""

import math
from collections.abc import Iterable, Sequence

from markupsafe import Markup, escape

from batch_scorer.reports.page.figures import Bars, Drawing, Intervals, Lines, Points

_WIDTH, _HEIGHT = 360.0, 220.0
_LEFT, _RIGHT, _TOP, _BOTTOM = 46.0, 10.0, 18.0, 34.0
_ROW = 30.0
_NAME_CHARS = 42
_LEGEND_ROW = 16.0
_LEGEND_CHARS = 24


class _Axis:
    """A linear or logarithmic scale from values to places, and where its ticks are."""

    def __init__(
        self,
        values: Sequence[float],
        start: float,
        stop: float,
        *,
        is_log: bool = False,
        is_whole: bool = False,
    ) -> None:
        low, high = min(values), max(values)
        if is_log:
            low, high = max(low, 1.0), max(high, 2.0)
        if low == high:
            low, high = low - 0.5, high + 0.5
        self._is_log = is_log
        self._low, self._high = self._at(low), self._at(high)
        self._start, self._stop = start, stop
        self.ticks = _powers(low, high) if is_log else _ticks(low, high, 1.0 if is_whole else 0.0)

    def _at(self, value: float) -> float:
        return math.log2(max(value, 1.0)) if self._is_log else value

    def __call__(self, value: float) -> float:
        share = (self._at(value) - self._low) / (self._high - self._low)
        return self._start + share * (self._stop - self._start)


def svg_of(drawing: Drawing, title: str) -> Markup:
    """One `<svg>` element."""
    if isinstance(drawing, Intervals):
        height = _TOP + _ROW * len(drawing.rows) + _BOTTOM
        parts = _intervals(drawing, height)
    elif isinstance(drawing, Lines):
        height = _HEIGHT + _LEGEND_ROW * math.ceil(len(drawing.lines) / 2)
        parts = _lines(drawing)
    else:
        height = _HEIGHT
        parts = _bars(drawing) if isinstance(drawing, Bars) else _points(drawing)
    return Markup('<svg viewBox="0 0 {} {}" role="img" aria-label="{}">{}</svg>').format(
        f"{_WIDTH:g}", f"{height:g}", title, Markup("").join(parts)
    )


def _bars(bars: Bars) -> Iterable[Markup]:
    x = _Axis(bars.edges, _LEFT, _WIDTH - _RIGHT)
    y = _Axis([0.0, *bars.heights], _HEIGHT - _BOTTOM, _TOP)
    yield from _frame(x, y, bars.label, bars.height_label)
    path = " ".join(
        f"M{x(low):.1f} {y(0):.1f}V{y(height):.1f}H{max(x(high) - 1, x(low) + 0.5):.1f}V{y(0):.1f}z"
        for low, high, height in zip(bars.edges, bars.edges[1:], bars.heights, strict=False)
        if height
    )
    yield _path(path, "bar")
    if bars.reference is not None and bars.edges[0] < bars.reference < bars.edges[-1]:
        yield _path(f"M{x(bars.reference):.1f} {_TOP}V{_HEIGHT - _BOTTOM}", "reference")


def _points(points: Points) -> Iterable[Markup]:
    ys = [*points.ys, *points.lows, *points.highs]
    both = [*points.xs, *ys] if points.diagonal else []
    x = _Axis(
        [*points.xs, *both], _LEFT, _WIDTH - _RIGHT, is_log=points.is_log, is_whole=points.is_whole
    )
    y = _Axis([*ys, *both], _HEIGHT - _BOTTOM, _TOP)
    yield from _frame(x, y, points.x_label, points.y_label)
    if points.diagonal:
        low, high = min(both), max(both)
        yield _path(f"M{x(low):.1f} {y(low):.1f}L{x(high):.1f} {y(high):.1f}", "reference")
    places = [(x(a), y(b)) for a, b in zip(points.xs, points.ys, strict=True)]
    if points.is_joined:
        yield _path("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places), "line")
    for (a, _), low, high in zip(places, points.lows, points.highs, strict=False):
        yield _path(f"M{a:.1f} {y(low):.1f}V{y(high):.1f}", "ends")
    dots = " ".join(f"M{a:.1f} {b:.1f}h0" for a, b in places)
    yield _path(dots, "dots" if points.is_joined else "cloud")


def _lines(drawing: Lines) -> Iterable[Markup]:
    values = [y for ys in drawing.lines.values() for y in ys]
    x = _Axis(drawing.xs, _LEFT, _WIDTH - _RIGHT, is_whole=True)
    y = _Axis(values, _HEIGHT - _BOTTOM, _TOP)
    yield from _frame(x, y, drawing.x_label, drawing.y_label)
    for number, (name, ys) in enumerate(drawing.lines.items()):
        kind = f"line line-{number + 1}"
        places = [(x(a), y(b)) for a, b in zip(drawing.xs, ys, strict=True)]
        yield _path("M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in places), kind)
        yield _path(" ".join(f"M{a:.1f} {b:.1f}h0" for a, b in places), f"{kind} dots")
        left = _LEFT + number % 2 * (_WIDTH - _LEFT) / 2
        middle = _HEIGHT + _LEGEND_ROW * (number // 2) + 4
        yield _path(f"M{left:.1f} {middle}h22", kind)
        yield _text(left + 28, middle + 4, _cut(name, _LEGEND_CHARS), "start", "name")


def _intervals(drawing: Intervals, height: float) -> Iterable[Markup]:
    values = [end for row in drawing.rows for end in row.ends]
    x = _Axis([*values, *(drawing.limits or ())], 10.0, _WIDTH - 10.0)
    bottom = height - _BOTTOM
    for tick in x.ticks:
        yield _path(f"M{x(tick):.1f} {_TOP}V{bottom}", "grid")
        yield _text(x(tick), bottom + 13, _number(tick), "middle")
    yield _text(_WIDTH / 2, height - 5, drawing.label, "middle")
    if drawing.reference is not None:
        yield _path(f"M{x(drawing.reference):.1f} {_TOP}V{bottom}", "reference")
    for place, row in enumerate(drawing.rows):
        middle = _TOP + _ROW * place + 20
        yield _text(10, middle - 8, _cut(row.name, _NAME_CHARS), "start", "name")
        yield _path(f"M{x(row.ends[0]):.1f} {middle}H{x(row.ends[1]):.1f}", "ends")
        if row.inner is not None:
            yield _path(f"M{x(row.inner[0]):.1f} {middle}H{x(row.inner[1]):.1f}", "inner")
        yield _path(f"M{x(row.value):.1f} {middle}h0", "dots")


def _frame(x: _Axis, y: _Axis, x_label: str, y_label: str) -> Iterable[Markup]:
    bottom = _HEIGHT - _BOTTOM
    for tick in y.ticks:
        yield _path(f"M{_LEFT} {y(tick):.1f}H{_WIDTH - _RIGHT}", "grid")
        yield _text(_LEFT - 4, y(tick) + 3.5, _number(tick), "end")
    for tick in x.ticks:
        yield _path(f"M{x(tick):.1f} {bottom}v4", "grid")
        yield _text(x(tick), bottom + 14, _number(tick), "middle")
    yield _text((_LEFT + _WIDTH - _RIGHT) / 2, _HEIGHT - 5, x_label, "middle")
    yield _text(4, 10, y_label, "start")


def _ticks(low: float, high: float, least: float) -> list[float]:
    """Some five round numbers, no less than `least` apart."""
    raw = (high - low) / 5
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(digit * power for digit in (1, 2, 5, 10) if digit * power >= raw * 0.999)
    step = max(step, least)
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [place * step for place in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    places = range(math.ceil(math.log2(low)), math.floor(math.log2(high)) + 1)
    step = max(1, math.ceil(len(places) / 6))
    return [2.0**place for place in places[::step]]


def _number(value: float) -> str:
    text = f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"
    if len(text) > 7:
        text = f"{value:.1e}"
    return text.replace("-", "\N{MINUS SIGN}")


def _cut(name: str, most: int) -> str:
    return name if len(name) <= most else name[: most - 1] + "…"


def _path(d: str, kind: str) -> Markup:
    return Markup('<path class="{}" d="{}"/>').format(kind, d)


def _text(x: float, y: float, text: str, anchor: str, kind: str = "") -> Markup:
    return Markup('<text x="{}" y="{}" text-anchor="{}"{}>{}</text>').format(
        f"{x:.1f}",
        f"{y:.1f}",
        anchor,
        Markup(' class="{}"').format(kind) if kind else "",
        escape(text),
    )
