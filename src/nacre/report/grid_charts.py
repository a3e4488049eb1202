"""Charts of many scores: a map of a benchmark's parts, experts and their composition side by side.

The map is Figure 6 of arXiv 2507.07129, experts and their composition its Figure 3.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.colors import Colormap, LinearSegmentedColormap, Normalize, to_rgb
from matplotlib.figure import Figure

from nacre.report.canvas import (
    LETTER,
    WIDTH,
    Theme,
    legend,
    legend_lines,
    line_colors,
    place,
    plain,
    round_ticks,
    sheet,
    shorten,
    subtitle,
)
from nacre.report.depth import Grid
from nacre.report.scores import ALL, number

CELL = 0.2  # inches high
LONG = 30  # rows that stand in one column where there is room for two


def draw_heat(grid: Grid, across: str, theme: Theme, wide: bool) -> Figure:
    """Draw scores as colored cells with their numbers; `across` says what the columns are.

    The color is how far a score is from chance, or without chance the score itself.
    """
    label = 0.25 + LETTER * max(len(shorten(name, 34 if wide else 22)) for name in grid.rows)
    rows, columns = grid.values.shape
    blocks = 2 if wide and rows > LONG and 2 * (label + 0.34 * columns) < WIDTH[wide] else 1
    long = -(-rows // blocks)
    widest = max(len(line) for name in grid.columns for line in name.splitlines()) * LETTER + 0.1
    cell = min(max(0.5, widest), ((WIDTH[wide] - 0.2) / blocks - label) / columns)
    heads = 0.16 * max(name.count("\n") + 1 for name in grid.columns)
    top = (0.82 if wide else 1.55) + heads
    figure = sheet(grid.title, theme, wide, top + CELL * long + 0.5)
    percent = bool(np.isfinite(grid.corrected).any())
    shown, norm, colors = _scale(grid, theme)
    subtitle(figure, theme, _about(percent, bool(grid.sure.any()), wide))
    _color_bar(figure, norm, colors, percent, theme, wide)
    for block in range(blocks):
        part = slice(block * long, min((block + 1) * long, rows))
        left = label + block * (WIDTH[wide] - 0.2) / blocks
        count = part.stop - part.start
        ax = place(figure, left, top, cell * columns, CELL * count)
        ax.pcolormesh(
            np.ma.masked_invalid(shown[part]), cmap=colors, norm=norm, edgecolors=theme.paper,
            linewidth=1.2,
        )  # fmt: skip
        ax.set_ylim(count, 0)
        ax.set_facecolor(theme.paper)
        ax.spines[:].set_visible(False)
        names = [shorten(name, 34 if wide else 22) for name in grid.rows[part]]
        ax.set_yticks(np.arange(count) + 0.5, names)
        ax.set_xticks(np.arange(columns) + 0.5, grid.columns)
        ax.tick_params(length=0, labelsize=8.5, labelcolor=theme.ink, pad=3)
        ax.tick_params(axis="x", top=True, labeltop=True, labelbottom=False)
        for text in ax.get_yticklabels():
            text.set(weight="bold" if text.get_text() == ALL else "normal")
        ax.set_xlabel(across, color=theme.muted, size=9, labelpad=5)
        if cell > 0.26:
            _numbers(ax, grid, part, shown, norm, colors, percent)
    return figure


def _about(percent: bool, sure: bool, wide: bool) -> str:
    parts = ["numbers: percent" if percent else "numbers and colors: the score"]
    if percent:
        parts.append("color: how far from chance (0) to perfect (1)")
    if sure:
        parts.append("bold: the 95% interval leaves out chance")
    return ("; " if wide else "\n").join(parts)


def _scale(grid: Grid, theme: Theme) -> tuple[Any, Normalize, Colormap]:
    """Return what is colored, its range, and the colors: two-sided where there is chance."""
    corrected = grid.corrected
    if np.isfinite(corrected).any():
        reach = max(0.1, float(np.nanmax(np.abs(corrected))))
        sides = [theme.held_out, theme.band, theme.training]
        return corrected, Normalize(-reach, reach), LinearSegmentedColormap.from_list("", sides)
    one = LinearSegmentedColormap.from_list("", [theme.band, theme.training])
    finite = grid.values[np.isfinite(grid.values)]
    low, high = (finite.min(), finite.max()) if len(finite) else (0.0, 1.0)
    return grid.values, Normalize(low, high if high > low else low + 1), one


def _numbers(
    ax: Axes,
    grid: Grid,
    part: slice,
    shown: Any,
    norm: Normalize,
    colors: Colormap,
    percent: bool,
) -> None:
    """Write a score into every cell, dark or light as its color asks."""
    for (row, column), value in np.ndenumerate(grid.values[part]):
        if not np.isfinite(value):
            continue
        color = colors(norm(shown[part][row, column]))
        dark = np.dot(_linear(color[:3]), (0.2126, 0.7152, 0.0722)) > 0.2
        ax.text(
            column + 0.5, row + 0.52, f"{100 * value:.0f}" if percent else number(value), size=8,
            ha="center", va="center", color="#1c2127" if dark else "#ffffff",
            weight="bold" if grid.sure[part][row, column] else "normal",
        )  # fmt: skip


def _linear(color: Any) -> Any:
    """Return sRGB as linear light."""
    rgb = np.asarray(to_rgb(color))
    return np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)


def _color_bar(
    figure: Figure, norm: Normalize, colors: Colormap, percent: bool, theme: Theme, wide: bool
) -> None:
    """Draw what the colors mean: at the right of the title, on a narrow chart under it."""
    width = 1.6
    left, top = (WIDTH[wide] - width - 0.35, 0.14) if wide else (0.35, 1.1)
    ax = place(figure, left, top, width, 0.11)
    assert norm.vmin is not None
    assert norm.vmax is not None
    ramp = np.linspace(norm.vmin, norm.vmax, 128)
    ax.imshow([ramp], aspect="auto", cmap=colors, norm=norm, extent=(norm.vmin, norm.vmax, 0, 1))
    ax.spines[:].set_visible(False)
    ax.set_yticks([])
    ends = (norm.vmin, norm.vmax)
    if percent:
        ax.set_xticks([ends[0], 0, ends[1]], [f"{ends[0]:.2f}", "chance", f"+{ends[1]:.2f}"])
    else:
        ax.set_xticks(ends, [number(end) for end in ends])
    ax.tick_params(length=0, labelsize=8, labelcolor=theme.muted, pad=3)


def draw_rows(grids: Sequence[Grid], theme: Theme, wide: bool) -> Figure:
    """Draw each score as a row in which experts and, last and in ink, their composition stand."""
    models = grids[0].columns
    looks = line_colors(models[:-1], theme) | {models[-1]: (theme.ink, "D")}
    lines = len(legend_lines(models, wide))
    step = max(0.34, 0.13 * len(models) + 0.12)
    label = 0.3 + 1.08 * LETTER * max(
        len(shorten(row, 30 if wide else 16)) for grid in grids for row in grid.rows
    )
    top = 0.95 + 0.2 * lines
    talls = [step * len(grid.rows) for grid in grids]
    figure = sheet(
        "Experts and their composition", theme, wide, top + sum(talls) + 0.85 * len(grids) - 0.25
    )
    chance = any(np.isfinite(grid.chance).any() for grid in grids)
    bars = "bars: 95% intervals" + ("; ticks: chance" if chance else "")
    subtitle(figure, theme, bars + ("; at the right: the composition" if wide else ""))
    legend(figure, looks, wide)
    for grid, tall in zip(grids, talls, strict=True):
        ax = place(figure, label, top + 0.3, WIDTH[wide] - label - 0.7, tall)
        _rows(ax, grid, looks, 0.11 / step, theme, wide)
        top += tall + 0.85
    return figure


def _rows(
    ax: Axes,
    grid: Grid,
    looks: Mapping[str, tuple[str, str]],
    aside: float,
    theme: Theme,
    wide: bool,
) -> None:
    plain(ax, theme)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    ax.xaxis.set_major_locator(round_ticks(7 if wide else 4))
    rows, columns = grid.values.shape
    ax.set_ylim(rows - 0.5, -0.5)
    ax.set_yticks(range(rows), [shorten(row, 30 if wide else 16) for row in grid.rows])
    ax.tick_params(axis="y", labelcolor=theme.ink)
    for row in range(1, rows):
        ax.axhline(row - 0.5, color=theme.grid, linewidth=0.8, zorder=0)
    for column, model in enumerate(grid.columns):
        color, marker = looks[model]
        places = np.arange(rows) + aside * (column - (columns - 1) / 2)
        ax.hlines(
            places, grid.lows[:, column], grid.highs[:, column], colors=color, linewidth=1.4,
            alpha=0.65, zorder=2,
        )  # fmt: skip
        ax.plot(
            grid.values[:, column], places, color=color, marker=marker, linewidth=0, zorder=3,
            markersize=6.5, markeredgecolor=theme.paper, markeredgewidth=0.8,
        )  # fmt: skip
    for row, chance in enumerate(grid.chance):
        ax.vlines(chance, row - 0.36, row + 0.36, colors=theme.muted, linewidth=1.1, zorder=1)
    for row, value in enumerate(grid.values[:, -1]):
        ax.annotate(
            number(value), (1, row), xycoords=("axes fraction", "data"), xytext=(6, 0), size=8.5,
            textcoords="offset points", va="center", weight="bold", color=theme.ink,
        )  # fmt: skip
    ax.set_title(grid.title, loc="left", size=9.5, weight="bold", color=theme.ink, pad=6)


def draw_differences(report: Mapping[str, Any], theme: Theme, wide: bool) -> Figure:
    """Draw how many more bits per byte a composition has than the best expert of every row.

    `report` is what `nacre compose --report` keeps.
    """
    rows = report["rows"]
    names = [f"all of {row['name']}" if row["kind"] == "language" else row["name"] for row in rows]
    names = [shorten(name, 30 if wide else 16) for name in names]
    label = 0.3 + 1.08 * LETTER * max(map(len, names))
    right = 0.3 + LETTER * max(len(shorten(row["best"], 14)) + 7 for row in rows)
    tall = 0.3 * len(rows)
    figure = sheet("Composition against its best expert", theme, wide, 1.55 + tall)
    subtitle(
        figure, theme,
        ("; " if wide else "\n").join(
            ("more bits per byte than the best expert of the row, named at the right",
                "bars: 95% intervals",)
        ),
    )  # fmt: skip
    ax = place(figure, label, 0.95, WIDTH[wide] - label - right, tall)
    plain(ax, theme)
    ax.grid(axis="y", visible=False)
    ax.grid(axis="x", color=theme.grid, linewidth=0.8)
    ax.xaxis.set_major_locator(round_ticks(6 if wide else 4))
    ax.axvline(0, color=theme.muted, linewidth=1, zorder=1)
    colors = {"better": theme.training, "worse": theme.held_out, "as good": theme.muted}
    for place_, row in enumerate(rows):
        color = colors[row["outcome"]]
        if row["interval"]:
            ax.hlines(place_, *row["interval"], colors=color, linewidth=1.6, alpha=0.65, zorder=2)
        ax.plot(row["difference"], place_, "o", color=color, markersize=6.5, zorder=3)
        ax.annotate(
            f"{row['difference']:+z.3f} {shorten(row['best'], 14)}", (1, place_),
            xycoords=("axes fraction", "data"), xytext=(6, 0), textcoords="offset points",
            va="center", size=8.5, color=color, weight="bold",
        )  # fmt: skip
    ax.set_ylim(len(rows) - 0.5, -0.5)
    ax.set_yticks(range(len(rows)), names)
    ax.tick_params(axis="y", labelcolor=theme.ink)
    ax.annotate(
        "← better    worse →", (0, 0), xycoords=("data", "axes fraction"), xytext=(0, -22),
        textcoords="offset points", ha="center", va="top", size=9, color=theme.muted,
    )  # fmt: skip
    return figure
