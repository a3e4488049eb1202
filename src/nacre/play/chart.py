"""Line charts as SVG inside the page: quick enough to be drawn anew while something goes on.

They look like the charts of a report, follow light and dark through the page's style sheet, and
come in two shapes, one for a wide and one for a narrow screen.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from nacre.report.canvas import spread
from nacre.report.charts import tick

Point = tuple[float, float]
Band = tuple[float, float, str]
"""Where on the x axis it begins and ends, and what stands above it."""

MOST = 600  # points of a line; a longer one is thinned
LETTER = 6.4  # pixels of a letter of the small size, about


@dataclass(frozen=True)
class Line:
    """A named line; `look` is its class in the style sheet, `faint` keeps it behind, unnamed."""

    name: str
    points: Sequence[Point]
    look: str
    faint: bool = False
    marks: bool = False


@dataclass(frozen=True)
class _Frame:
    """The plot's place in its picture and its ranges, all in pixels and data units."""

    width: int
    height: int
    left: int
    right: int
    top: int
    bottom: int
    xs: Point
    ys: Point

    def x(self, value: float) -> float:
        low, high = self.xs
        inner = self.width - self.left - self.right
        return self.left + inner * (value - low) / ((high - low) or 1)

    def y(self, value: float) -> float:
        low, high = self.ys
        inner = self.height - self.top - self.bottom
        share = (value - low) / ((high - low) or 1)
        return self.height - self.bottom - inner * max(-0.02, min(1.02, share))


def draw_lines(
    lines: Sequence[Line],
    *,
    title: str,
    about: str,
    x_label: str,
    y_range: Point | None = None,
    y_format: Callable[[float], str] = lambda value: f"{value:g}",
    bands: Sequence[Band] = (),
) -> str:
    """Return a figure of lines over a common x axis; each is named at its right end.

    Points that are not finite are left out. Without `y_range` the axis fits all but the first
    twentieth of the x axis. Nothing is drawn of no points.
    """
    kept = [
        Line(line.name, _thinned([p for p in line.points if math.isfinite(p[1])]), *_look(line))
        for line in lines
    ]
    kept = [line for line in kept if line.points]
    if not kept:
        return ""
    edges = [x for line in kept for x, _ in line.points] + [x for b in bands for x in b[:2]]
    xs = (min(edges), max(edges))
    ys = y_range or _fitted(kept, xs)
    ends = ", ".join(f"{line.name} {y_format(line.points[-1][1])}" for line in kept if line.name)
    said = html.escape(f"{title}: at the end {ends}.")
    shapes = "".join(
        f'<svg class="{shape}" viewBox="0 0 {frame.width} {frame.height}" role="img" '
        f'aria-label="{said}">{_inside(kept, frame, x_label, y_format, bands)}</svg>'
        for shape, frame in _frames(xs, ys, max(len(line.name) for line in kept))
    )
    head = f"<b>{html.escape(title)}</b><span>{html.escape(about)}</span>"
    return f'<figure class="chart"><figcaption>{head}</figcaption>{shapes}</figure>'


def _look(line: Line) -> tuple[str, bool, bool]:
    return line.look, line.faint, line.marks


def _frames(xs: Point, ys: Point, longest: int) -> list[tuple[str, _Frame]]:
    right = 28 + round(1.15 * LETTER * min(max(longest, 6), 18))
    return [
        ("wide", _Frame(920, 340, 52, right, 30, 44, xs, ys)),
        ("narrow", _Frame(400, 300, 46, right, 30, 44, xs, ys)),
    ]


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Return at most about `MOST` points, the last among them."""
    step = -(-len(points) // MOST)
    kept = list(points[::step]) if points else []
    return kept if not points or kept[-1] == points[-1] else [*kept, points[-1]]


def _fitted(lines: Sequence[Line], xs: Point) -> Point:
    """Return a range for all values but those of the first twentieth, where there are others."""
    start = xs[0] + (xs[1] - xs[0]) / 20
    values = [y for line in lines for x, y in line.points if x > start]
    values = values or [y for line in lines for _, y in line.points]
    low, high = min(values), max(values)
    pad = 0.08 * (high - low) or 0.05 * abs(high) or 0.1
    return low - pad, high + pad


def round_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers from `low` to `high`, at most so many."""
    span = (high - low) or 1.0
    size = 10 ** math.floor(math.log10(span / most))
    step = next(s * size for s in (1, 2, 2.5, 5, 10, 20) if span / (s * size) <= most)
    first = math.ceil(low / step - 1e-9)
    return [round(step * n, 10) for n in range(first, math.floor(high / step + 1e-9) + 1)]


def _inside(
    lines: Sequence[Line],
    frame: _Frame,
    x_label: str,
    y_format: Callable[[float], str],
    bands: Sequence[Band],
) -> str:
    base, end = frame.height - frame.bottom, frame.width - frame.right
    parts: list[str] = []
    for index, (start, stop, name) in enumerate(bands):
        left, right = frame.x(start), frame.x(stop)
        if index % 2:
            size = f'width="{right - left:.1f}" height="{base - frame.top}"'
            parts.append(f'<rect class="band" x="{left:.1f}" y="{frame.top}" {size}/>')
        if right - left > LETTER * len(name):
            middle = (left + right) / 2
            parts.append(_words(middle, frame.top - 10, name, "head"))
    for value in round_ticks(*frame.ys, 5):
        y = frame.y(value)
        parts.append(f'<path class="grid" d="M{frame.left} {y:.1f}H{end}"/>')
        parts.append(_words(frame.left - 8, y + 4, y_format(value), "y"))
    parts.append(f'<path class="base" d="M{frame.left} {base}H{end}"/>')
    for value in round_ticks(*frame.xs, 7 if frame.width > 600 else 4):
        parts.append(_words(frame.x(value), base + 18, tick(value), "x"))
    parts.append(_words((frame.left + end) / 2, frame.height - 6, x_label, "x"))
    parts += [_stroke(line, frame) for line in sorted(lines, key=lambda line: not line.faint)]
    highest = max(y for line in lines for _, y in line.points)
    if highest > frame.ys[1]:
        above = f"↑ up to {y_format(highest)}"
        parts.append(_words(frame.left + 0.12 * frame.width, frame.top + 14, above, "above"))
    return "".join([*parts, *_names([line for line in lines if not line.faint], frame, y_format)])


def _stroke(line: Line, frame: _Frame) -> str:
    path = "L".join(f"{frame.x(x):.1f} {frame.y(y):.1f}" for x, y in line.points)
    faint = " faint" if line.faint else ""
    drawn = f'<path class="line {line.look}{faint}" d="M{path}"/>'
    if not line.marks:
        return drawn
    return drawn + "".join(
        f'<circle class="mark {line.look}" r="3" cx="{frame.x(x):.1f}" cy="{frame.y(y):.1f}"/>'
        for x, y in line.points
    )


def _names(lines: Sequence[Line], frame: _Frame, y_format: Callable[[float], str]) -> list[str]:
    """Return the lines' names and last values at the right, none on another."""
    at = [frame.y(line.points[-1][1]) for line in lines]
    places = spread(at, 32.0, frame.top + 8, frame.height - frame.bottom - 12)
    left = frame.width - frame.right + 10
    return [
        f'<text class="name {line.look}" x="{left}" y="{place:.1f}">'
        f'<tspan class="dot">●</tspan> {html.escape(line.name[:18])}'
        f'<tspan class="value" x="{left}" dy="15">{y_format(line.points[-1][1])}</tspan></text>'
        for line, place in zip(lines, places, strict=True)
    ]


def _words(x: float, y: float, text: str, kind: str) -> str:
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{html.escape(text)}</text>'


@dataclass(frozen=True)
class Interval:
    """A row of `draw_intervals`: a value with what it may as well be, or None where unknown."""

    name: str
    value: float
    interval: Point | None
    look: str


def draw_intervals(
    groups: Sequence[tuple[str, Sequence[Interval]]], *, title: str, about: str, even: float
) -> str:
    """Return a figure of values with their intervals, a row each, under the names of their groups.

    A line marks the value `even`. Nothing is drawn of no rows.
    """
    rows = [row for _, members in groups for row in members]
    if not rows:
        return ""
    ends = [end for row in rows for end in (row.value, *(row.interval or ()))]
    low, high = min(*ends, even), max(*ends, even)
    pad = 0.06 * ((high - low) or 1)
    said = html.escape(f"{title}: " + ", ".join(f"{r.name} {r.value:.3f}" for r in rows) + ".")
    tall = 26 * (len(rows) + len(groups)) + 50
    longest = max(len(row.name) for row in rows)
    shapes = ""
    for shape, width, letters in (("wide", 920, 30), ("narrow", 400, 14)):
        left = round(18 + 7 * min(longest, letters))
        frame = _Frame(width, tall, left, 64, 8, 34, (low - pad, high + pad), (0, 1))
        inside = _rows(groups, frame, even, letters)
        size = f'viewBox="0 0 {width} {tall}"'
        shapes += f'<svg class="{shape}" {size} role="img" aria-label="{said}">{inside}</svg>'
    head = f"<b>{html.escape(title)}</b><span>{html.escape(about)}</span>"
    return f'<figure class="chart"><figcaption>{head}</figcaption>{shapes}</figure>'


def _rows(
    groups: Sequence[tuple[str, Sequence[Interval]]], frame: _Frame, even: float, letters: int
) -> str:
    base = frame.height - frame.bottom
    parts = [
        f'<path class="grid" d="M{frame.x(value):.1f} {frame.top}V{base}"/>'
        + _words(frame.x(value), base + 18, f"{value:g}", "x")
        for value in round_ticks(*frame.xs, 6 if frame.width > 600 else 4)
    ]
    parts.append(f'<path class="even" d="M{frame.x(even):.1f} {frame.top}V{base}"/>')
    y = frame.top + 4.0
    for name, members in groups:
        y += 26
        parts.append(_words(4, y - 6, name, "group"))
        for row in members:
            y += 26
            x, middle = frame.x(row.value), y - 10
            parts.append(_words(frame.left - 12, middle + 4, row.name[:letters], "y"))
            if row.interval:
                a, b = (frame.x(end) for end in row.interval)
                parts.append(f'<path class="line {row.look}" d="M{a:.1f} {middle:.1f}H{b:.1f}"/>')
            hollow = "" if row.interval else " hollow"
            parts.append(
                f'<circle class="mark {row.look}{hollow}" r="5" cx="{x:.1f}" cy="{middle:.1f}"/>'
            )
            parts.append(_words(frame.width - 4, middle + 4, f"{row.value:.3f}", "y"))
    return "".join(parts)
