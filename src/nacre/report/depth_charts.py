"""Charts over depth: scores of one run or of several, and how several runs learned.

Scores against depth are Figure 5 of arXiv 2507.07129.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter
from matplotlib.transforms import ScaledTranslation

from nacre.report.canvas import (
    LETTER,
    WIDTH,
    Theme,
    halo,
    inches,
    legend,
    legend_lines,
    line_colors,
    place,
    plain,
    round_ticks,
    sheet,
    shorten,
    spread,
    subtitle,
)
from nacre.report.charts import tick
from nacre.report.depth import Line, Panel
from nacre.report.files import Series, StageView
from nacre.report.scores import number

BARS = "bars: 95% intervals"
LESS = "bits: less is better"


def draw_panels(
    panels: Sequence[Panel], theme: Theme, wide: bool, runs: Sequence[str] = ()
) -> Figure:
    """Draw lines over depth, a panel each; with `runs` a color means a run in all of them."""
    alone = bool(runs) or all(len(panel.lines) == 1 for panel in panels)
    names = [line.name for panel in panels for line in panel.lines if len(panel.lines) > 1]
    room = 0.95 if alone else 0.65 + LETTER * max(len(shorten(name)) for name in names)
    most = 3 if alone else 2
    across = min(len(panels), most) if wide else 1
    width = WIDTH[wide] / across
    high = 2.3 if across == 1 and wide else 1.75
    top = 1.12 + 0.2 * len(legend_lines(runs, wide))
    pitch = high + 0.82
    count = -(-len(panels) // across)
    figure = sheet("Scores by depth", theme, wide, top + pitch * count - 0.1)
    about = [BARS]
    about += ["dashed: chance"] if _chances(panels) else []
    about += [LESS] if any(panel.title.endswith("bits per byte") for panel in panels) else []
    subtitle(figure, theme, "; ".join(about))
    legend(figure, line_colors(runs, theme), wide)
    for index, panel in enumerate(panels):
        row, column = divmod(index, across)
        left = column * width + 0.62
        ax = place(figure, left, top + row * pitch, width - 0.62 - room, high)
        plain(ax, theme)
        _panel(ax, panel, theme, runs)
        if index + across >= len(panels):
            ax.set_xlabel("depth (blocks)", color=theme.muted, size=9, labelpad=4)
    return figure


def _chances(panels: Sequence[Panel]) -> list[float]:
    """Return what guessing gives, from low to high; what is almost the same once."""
    found = {line.chance for panel in panels for line in panel.lines if line.chance is not None}
    kept: list[float] = []
    for chance in sorted(found):
        if not kept or chance - kept[-1] > 0.005:
            kept.append(chance)
    return kept


def _panel(ax: Axes, panel: Panel, theme: Theme, runs: Sequence[str]) -> None:
    """Draw the lines of one panel, each named with its last value at its right end."""
    ends: list[tuple[float, str, str]] = []
    colors = line_colors(runs or [line.name for line in panel.lines], theme)
    count = len(panel.lines)
    step = min(3.0, 9 / max(count - 1, 1))
    for index, line in enumerate(panel.lines):
        color, marker = colors[line.name]
        shift = step * (index - (count - 1) / 2)
        _line(ax, line, color, marker, shift, theme)
        text = number(line.values[-1])
        ends.append(
            (line.values[-1], text if runs or count == 1 else f"{shorten(line.name)} {text}", color)
        )
    for chance in _chances([panel]):
        ax.axhline(chance, color=theme.muted, linewidth=0.9, dashes=(4, 3), zorder=1)
        ends.append((chance, f"chance {chance:.3g}", theme.muted))
    values = np.concatenate(
        [np.concatenate([line.values, line.lows, line.highs]) for line in panel.lines]
        + [np.array(_chances([panel]))]
    )
    finite = values[np.isfinite(values)]
    if len(finite):
        pad = 0.08 * (finite.max() - finite.min()) or 0.05 * abs(finite.max()) or 0.1
        ax.set_ylim(finite.min() - pad, finite.max() + pad)
    depths = sorted({depth for line in panel.lines for depth in line.depths})
    aside = 0.12 + step * (count - 1) / 144  # inches
    reach = (depths[-1] - depths[0]) * aside / (inches(ax)[0] - 2 * aside) or 0.5
    ax.set_xlim(depths[0] - reach, depths[-1] + reach)
    gap = min((b - a for a, b in pairwise(depths)), default=1.0) / (depths[-1] - depths[0] or 1)
    ax.set_xticks(depths if gap * inches(ax)[0] > 0.22 else _some(depths, int(inches(ax)[0] / 0.3)))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
    ax.yaxis.set_major_locator(round_ticks(5))
    name, _, metric = panel.title.rpartition(": ")
    letters = int((inches(ax)[0] + 0.9) / LETTER / 1.2) - len(metric)
    ax.set_title(
        f"{shorten(name, max(letters, 8))}: {metric}", loc="left", size=9.5, weight="bold",
        color=theme.ink, pad=7, x=-0.01,
    )  # fmt: skip
    _end_labels(ax, ends)


def _some(depths: Sequence[float], most: int) -> list[float]:
    """Return evenly spaced depths, the last among them."""
    step = -(-len(depths) // max(most, 2))
    return list(depths[::-1][::step])[::-1]


def _line(ax: Axes, line: Line, color: str, marker: str, shift: float, theme: Theme) -> None:
    """Draw a line `shift` points aside of its depths, so that no interval hides another."""
    figure = ax.get_figure()
    aside = ax.transData + ScaledTranslation(shift / 72, 0, figure.dpi_scale_trans)  # pyright: ignore
    if len(line.depths) > 40:
        marker = ""
    ax.plot(
        line.depths, line.values, color=color, linewidth=1.6, marker=marker,
        markersize=5 + 2 * (marker in "PX*"),
        markeredgecolor=theme.paper, markeredgewidth=0.8, zorder=3, transform=aside,
    )  # fmt: skip
    ax.vlines(
        line.depths, line.lows, line.highs, colors=color, linewidth=1.3, alpha=0.65, zorder=2,
        transform=aside,
    )  # fmt: skip


def _end_labels(ax: Axes, ends: Sequence[tuple[float, str, str]]) -> None:
    """Name each line at its right end, no two names on each other."""
    shown = [end for end in ends if np.isfinite(end[0])]
    low, high = ax.get_ylim()
    gap = 0.155 / inches(ax)[1] * (high - low)
    places = spread([value for value, _, _ in shown], gap, low, high)
    for at, (_, text, color) in zip(places, shown, strict=True):
        ax.annotate(
            text, (1, at), xycoords=("axes fraction", "data"), xytext=(5, 0), size=8.5,
            textcoords="offset points", va="center", color=color, annotation_clip=False,
            weight="normal" if text.startswith("chance ") else "bold",
        )  # fmt: skip


def draw_runs(runs: Mapping[str, Sequence[StageView]], theme: Theme, wide: bool) -> Figure:
    """Draw held-out bits per byte over all tokens, a line for each run, stage ends marked."""
    lines = legend_lines(list(runs), wide)
    top = 1.0 + 0.2 * len(lines)
    figure = sheet("Held-out bits per byte over the run", theme, wide, top + 3.6)
    subtitle(figure, theme, "less is better; the numbers are depths, at the ends of stages")
    colors = {name: (color, "o") for name, (color, _) in line_colors(list(runs), theme).items()}
    legend(figure, colors, wide)
    ax = place(figure, 0.72, top, WIDTH[wide] - 0.72 - 0.75, 3.0)
    plain(ax, theme)
    ends: list[tuple[float, str, str]] = []
    total = max(views[-1].end for views in runs.values())
    seen = np.empty((0, 3))
    for order, (name, views) in enumerate(runs.items()):
        points = np.concatenate([view.held_out for view in views])
        if len(points):
            _run(ax, points, views, colors[name][0], 4 + order, theme)
            ends.append((points[-1, 2], number(points[-1, 2]), colors[name][0]))
            seen = np.concatenate([seen, points])
    _fit_later(ax, seen[np.isfinite(seen[:, 2])], total, theme)
    ax.set_xlim(-0.008 * total, 1.015 * total)
    ax.xaxis.set_major_locator(round_ticks(7 if wide else 4))
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    ax.set_xlabel("tokens trained on, all stages", color=theme.muted, size=9, labelpad=6)
    _end_labels(ax, ends)
    return figure


def _run(
    ax: Axes, points: Series, views: Sequence[StageView], color: str, order: int, theme: Theme
) -> None:
    """Draw one run's bits per byte, with the depth in a circle at the end of every stage."""
    ax.plot(points[:, 0], points[:, 2], color=color, linewidth=1.6, zorder=3)
    for view in views:
        if view.finished and len(view.held_out):
            end = (view.end, view.held_out[-1, 2])
            ax.plot(
                *end, "o", color=color, markersize=12, markeredgecolor=theme.paper,
                markeredgewidth=0.8, zorder=order,
            )  # fmt: skip
            ax.annotate(
                str(view.depth), end, size=7.5, ha="center", va="center_baseline",
                weight="bold", color=theme.paper, zorder=order,
            )  # fmt: skip


def _fit_later(ax: Axes, points: Series, total: int, theme: Theme) -> None:
    """Fit the axis to all but the first twentieth, and say what lies above it."""
    bits = points[:, 2]
    later = bits[points[:, 0] > total / 20]
    if not len(later):
        return
    pad = 0.12 * (later.max() - later.min()) or 0.1
    ax.set_ylim(later.min() - pad, later.max() + pad)
    if bits.max() > later.max() + pad:
        ax.annotate(
            f"↑ up to {bits.max():.2f}", (1, 1), xycoords="axes fraction", xytext=(-4, -4),
            textcoords="offset points", ha="right", va="top", size=8.5, color=theme.muted,
            path_effects=halo(theme),
        )  # fmt: skip
