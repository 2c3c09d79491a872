"""A picture of the dashboard, drawn from a Prometheus: the README's, as SVG, legible on light and dark pages.

Owns the drawing; what is drawn is the dashboard's. Figures on top, then a chart a panel, three in a row.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Sequence
from html import escape
from itertools import groupby

from . import dashboard
from .dashboard import Query
from .prometheus import Prometheus, Series

WIDTH, MARGIN, GAP = 1200, 16, 12
HEAD_HEIGHT, STAT_HEIGHT, CHART_HEIGHT = 44, 66, 236
COLUMNS = 3
LINE_POINTS = 120
LEGEND_CHARS = 25
"""Two such entries fit beside each other."""

# Told apart by people who see colours otherwise, too; dark enough on white, light enough on black.
COLOURS = ("#3274d9", "#e0752d", "#2f9e44", "#b8478f", "#8a7f00", "#12a0a8", "#c4402f", "#7a68d8")

STYLE = """
  .page { fill: #ffffff; } .card { fill: #f6f7f9; stroke: #d8dce2; }
  .text { fill: #22272e; } .soft { fill: #5d6672; } .grid { stroke: #dfe3e8; } .axis { stroke: #b4bbc4; }
  text { font: 12px system-ui, -apple-system, "Segoe UI", "DejaVu Sans", sans-serif; }
  .title { font-size: 13px; font-weight: 600; } .big { font-size: 22px; font-weight: 600; }
  .small { font-size: 11px; }
  .head { font-size: 18px; font-weight: 600; }
  @media (prefers-color-scheme: dark) {
    .page { fill: #0d1117; } .card { fill: #161b22; stroke: #30363d; }
    .text { fill: #e6edf3; } .soft { fill: #9aa4af; } .grid { stroke: #262c34; } .axis { stroke: #48505a; }
  }
"""

Line = tuple[str, list[tuple[float, float]]]
"""Its name, and (time, value) points."""


def draw(prometheus: Prometheus, start: float, end: float, rate_window: str) -> str:
    """Return the picture of what was between two Unix times."""
    panels = [(name, list(group)) for name, group in groupby(dashboard.queries(), lambda query: query.panel)]
    # Two panels may have one title: by kind they are told apart.
    panels = [
        (name, list(same)) for name, group in panels for _, same in groupby(group, lambda query: query.kind)
    ]
    shown = f"{max(int(end - start), 1)}s"
    step = max((end - start) / LINE_POINTS, 1.0)
    stats = [panel for panel in panels if panel[1][0].kind == "stat"]
    charts = [panel for panel in panels if panel[1][0].kind == "timeseries"]
    rows = -(-len(charts) // COLUMNS)
    height = HEAD_HEIGHT + STAT_HEIGHT + rows * (CHART_HEIGHT + GAP) + GAP + MARGIN
    about = "two reference engines, a pool of 24 MiB and a filesystem tier, on two cores"
    parts = [_opening(height), *_text(MARGIN, 29, "kvtier", "text head")]
    parts += _text(MARGIN + 66, 29, f"{about}; {int(end - start)} s", "soft")
    width = (WIDTH - 2 * MARGIN - (len(stats) - 1) * GAP) / len(stats)
    for index, (title, queries) in enumerate(stats):
        series = [found for query in queries for found in _last(prometheus, query, rate_window, shown)]
        parts += _stat(MARGIN + index * (width + GAP), HEAD_HEIGHT, width, title, series)
    width = (WIDTH - 2 * MARGIN - (COLUMNS - 1) * GAP) / COLUMNS
    for index, (title, queries) in enumerate(charts):
        left = MARGIN + index % COLUMNS * (width + GAP)
        top = HEAD_HEIGHT + STAT_HEIGHT + GAP + index // COLUMNS * (CHART_HEIGHT + GAP)
        lines: list[Line] = []
        for query in queries:
            found = prometheus.query_range(query.filled(rate_window, shown), start, end, step)
            lines += [(query.name(each.labels), list(each.points)) for each in found]
        parts += _Chart(left, top, width, queries[0], lines, start, end).draw(title)
    return "\n".join([*parts, "</svg>"]) + "\n"


def _opening(height: int) -> str:
    size = f'viewBox="0 0 {WIDTH} {height}" width="{WIDTH}" height="{height}"'
    head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img"><title>The kvtier dashboard</title>'
    page = f'<rect class="page" width="{WIDTH}" height="{height}" rx="8"/>'
    return f"{head}<style>{STYLE}</style>{page}"


def _text(x: float, y: float, text: str, style: str, anchor: str = "start") -> Iterable[str]:
    place = f'x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}"'
    yield f'<text class="{style}" {place}>{escape(text)}</text>'


def _card(x: float, y: float, width: float, height: float) -> Iterable[str]:
    place = f'x="{x:.1f}" y="{y:.1f}" width="{width:.1f}" height="{height:.1f}"'
    yield f'<rect class="card" {place} rx="6"/>'


def _last(prometheus: Prometheus, query: Query, rate_window: str, shown: str) -> list[tuple[str, str]]:
    found: Sequence[Series] = prometheus.query(query.filled(rate_window, shown))
    return [(query.name(each.labels), text_of(each.value, query.unit)) for each in found]


def _stat(x: float, y: float, width: float, title: str, series: Sequence[tuple[str, str]]) -> Iterable[str]:
    yield from _card(x, y, width, STAT_HEIGHT)
    yield from _text(x + 12, y + 20, title, "soft")
    each = (width - 24) / max(len(series), 1)
    for index, (name, value) in enumerate(series):
        left = x + 12 + index * each
        yield from _text(left, y + 50, value, "text big")
        yield from _text(left + 15 * len(value) + 5, y + 50, name, "soft small")


class _Chart:
    """One panel: axes, lines or stacked areas, and what they are."""

    def __init__(
        self, x: float, y: float, width: float, query: Query, lines: Sequence[Line], start: float, end: float
    ) -> None:
        self._x, self._y, self._width = x, y, width
        self._query = query
        self._start, self._end = start, end
        self._names = [name for name, _ in lines]
        self._last = [points[-1][1] for _, points in lines]
        self._areas = [points for _, points in lines]
        self._floors: list[list[tuple[float, float]] | None] = [None] * len(lines)
        if query.stacked:
            self._stack()
        entries = [
            f"{name} {text_of(last, query.unit)}" for name, last in zip(self._names, self._last, strict=True)
        ]
        self._columns = 2 if max(map(len, entries), default=0) <= LEGEND_CHARS else 1
        legend_rows = -(-len(lines) // self._columns)
        self._left, self._right = x + 58, x + width - 12
        self._top, self._bottom = y + 34, y + CHART_HEIGHT - 30 - 16 * legend_rows
        highest = max((value for points in self._areas for _, value in points), default=0.0)
        self._ticks = ticks(highest, query.unit)

    def _stack(self) -> None:
        times = sorted({when for points in self._areas for when, _ in points})
        floor = dict.fromkeys(times, 0.0)
        for index, points in enumerate(self._areas):
            self._floors[index] = [(when, floor[when]) for when, _ in points]
            for when, value in points:
                floor[when] += value
            self._areas[index] = [(when, floor[when]) for when, _ in points]

    def draw(self, title: str) -> Iterable[str]:
        """Return the elements."""
        yield from _card(self._x, self._y, self._width, CHART_HEIGHT)
        yield from _text(self._x + 12, self._y + 21, title, "text title")
        for tick in self._ticks:
            at = self._place(self._start, tick)[1]
            across = f'x1="{self._left:.1f}" x2="{self._right:.1f}"'
            yield f'<line class="grid" {across} y1="{at:.1f}" y2="{at:.1f}"/>'
            yield from _text(self._left - 6, at + 4, text_of(tick, self._query.unit), "soft", "end")
        for share, anchor in ((0.0, "start"), (0.5, "middle"), (1.0, "end")):
            when = self._start + share * (self._end - self._start)
            clock = time.strftime("%M:%S", time.gmtime(when - self._start))
            yield from _text(self._place(when, 0.0)[0], self._bottom + 15, clock, "soft", anchor)
        for index, points in enumerate(self._areas):
            yield from self._line(points, self._floors[index], COLOURS[index % len(COLOURS)])
        yield from self._legend()

    def _line(
        self, points: Sequence[tuple[float, float]], floor: Sequence[tuple[float, float]] | None, colour: str
    ) -> Iterable[str]:
        places = [self._place(*point) for point in points]
        path = " ".join(f"{across:.1f},{down:.1f}" for across, down in places)
        if floor is not None:
            back = [self._place(*point) for point in reversed(floor)]
            below = " ".join(f"{across:.1f},{down:.1f}" for across, down in back)
            yield f'<polygon points="{path} {below}" fill="{colour}" fill-opacity="0.35"/>'
        yield f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="1.6"/>'

    def _legend(self) -> Iterable[str]:
        for index, name in enumerate(self._names):
            left = self._x + 14 + index % self._columns * (self._width - 24) / self._columns
            down = self._bottom + 33 + 16 * (index // self._columns)
            colour = COLOURS[index % len(COLOURS)]
            value = text_of(self._last[index], self._query.unit)
            yield f'<rect x="{left:.1f}" y="{down - 8:.1f}" width="10" height="10" rx="2" fill="{colour}"/>'
            yield (
                f'<text class="text small" x="{left + 16:.1f}" y="{down + 1:.1f}">{escape(name)} '
                f'<tspan class="soft">{escape(value)}</tspan></text>'
            )

    def _place(self, when: float, value: float) -> tuple[float, float]:
        across = (when - self._start) / max(self._end - self._start, 1e-9)
        up = min(max(value / self._ticks[-1], 0.0), 1.0)
        return self._left + across * (self._right - self._left), self._bottom - up * (
            self._bottom - self._top
        )


def ticks(highest: float, unit: str) -> list[float]:
    """Round values from 0 to at least `highest`, three to five of them."""
    if unit == "percentunit":
        return [0.0, 0.25, 0.5, 0.75, 1.0]
    if highest <= 0:
        return [0.0, 1.0]
    scale = 1024 ** math.floor(math.log(highest, 1024)) if unit == "bytes" and highest >= 1 else 1
    rough = highest / scale / 4
    power = 10 ** math.floor(math.log10(rough))
    step = scale * power * next(nice for nice in (1, 2, 2.5, 5, 10) if nice * power >= rough * 0.999)
    return [step * number for number in range(math.ceil(highest / step * 0.999) + 1)]


def text_of(value: float, unit: str) -> str:
    """Write a value with its unit, short."""
    if unit == "percentunit":
        return f"{100 * value:.0f} %"
    if unit == "s":
        return _short(value, " s") if abs(value) >= 1 or value == 0 else _short(1e3 * value, " ms")
    if unit in {"bytes", "Bps"}:
        step, names = (
            (1024, ("B", "KiB", "MiB", "GiB")) if unit == "bytes" else (1000, ("B", "kB", "MB", "GB"))
        )
        power = 0
        while abs(value) >= step and power < len(names) - 1:
            value, power = value / step, power + 1
        return _short(value, f" {names[power]}{'/s' if unit == 'Bps' else ''}")
    return _short(value, "/s" if unit == "cps" else "")


def _short(value: float, unit: str) -> str:
    digits = 0 if abs(value) >= 100 or value == int(value) else 1 if abs(value) >= 10 else 2
    number = f"{value:.{digits}f}"
    return (number.rstrip("0").rstrip(".") if "." in number else number) + unit
