"""What every chart stands on: its colors for light and dark, its figure and its axes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.patheffects import AbstractPathEffect, withStroke
from matplotlib.text import Annotation
from matplotlib.ticker import MaxNLocator

from nacre.report.scores import ALL


@dataclass(frozen=True)
class Theme:
    """Colors of a chart: blue and vermilion differ for every kind of color vision (Okabe-Ito).

    `lines` are eight that stay apart without red or green, and stand out from the paper.
    """

    paper: str
    ink: str
    muted: str
    grid: str
    band: str
    training: str
    held_out: str
    memory: str
    faint: str
    lines: tuple[str, ...]


WIDTH = {True: 9.0, False: 4.2}
"""Inches of a wide and of a narrow chart."""

LETTER = 0.068
"""Inches of a letter of the small size, about."""

MARKERS = {"o": "●", "s": "■", "^": "▲", "v": "▼", "P": "✚", "X": "✖", "*": "★", "D": "◆"}
"""What marks a point, and the same as a character."""

LIGHT = Theme(
    paper="#ffffff", ink="#1c2127", muted="#5b6570", grid="#e4e7eb", band="#f5f6f8",
    training="#0072b2", held_out="#c8500a", memory="#00805c", faint="#a9b3bd",
    lines=(
        "#0072b2", "#c8500a", "#009e73", "#b1458f", "#b58900", "#4aa3df", "#4b3a8f", "#7d8792",
    ),
)  # fmt: skip
DARK = Theme(
    paper="#15191e", ink="#e8ebee", muted="#9aa5b1", grid="#2b323a", band="#1b2026",
    training="#56b4e9", held_out="#f0934a", memory="#35c49a", faint="#5d6873",
    lines=(
        "#56b4e9", "#f0934a", "#35c49a", "#d45fa8", "#f4e06a", "#2f78c8", "#8f7cf5", "#9aa5b1",
    ),
)  # fmt: skip


def canvas(
    title: str, theme: Theme, wide: bool, height: float, columns: int = 1, right: float = 0.3
) -> tuple[Figure, list[Axes]]:
    """Return a figure with a title and empty axes; narrow figures stack their axes."""
    rows, across = (1, columns) if wide else (columns, 1)
    width, tall = WIDTH[wide], height * rows + 0.25 * (rows - 1)
    figure = sheet(title, theme, wide, tall)
    grid = figure.subplots(rows, across, squeeze=False)
    figure.subplots_adjust(
        left=0.72 / width, right=1 - right / width, top=1 - 1.02 / tall, bottom=0.62 / tall,
        wspace=0.28, hspace=0.5,
    )  # fmt: skip
    for ax in grid.flat:
        plain(ax, theme)
    return figure, list(grid.flat)


def sheet(title: str, theme: Theme, wide: bool, tall: float) -> Figure:
    """Return a figure with nothing but its title, `tall` inches high."""
    width = WIDTH[wide]
    figure = Figure(figsize=(width, tall), facecolor=theme.paper, dpi=160 if wide else 200)
    FigureCanvasAgg(figure)
    figure.text(
        0.2 / width, 1 - 0.2 / tall, title, color=theme.ink, size=12.5, weight="bold", va="top"
    )
    return figure


def subtitle(figure: Figure, theme: Theme, text: str) -> None:
    """Write what a reader must know under a figure's title."""
    width, tall = figure.get_size_inches()
    figure.text(0.2 / width, 1 - 0.47 / tall, text, color=theme.muted, size=9, va="top")


def place(figure: Figure, left: float, top: float, width: float, tall: float) -> Axes:
    """Add axes of a size in inches, `left` and `top` inches from the figure's upper left corner."""
    across, high = figure.get_size_inches()
    return figure.add_axes((left / across, 1 - (top + tall) / high, width / across, tall / high))


def plain(ax: Axes, theme: Theme) -> None:
    """Leave of an axes its base line, light lines across and small numbers."""
    ax.set_facecolor(theme.paper)
    ax.spines[:].set_visible(False)
    ax.spines["bottom"].set(visible=True, color=theme.faint)
    ax.tick_params(length=0, labelsize=9, labelcolor=theme.muted, pad=5)
    ax.grid(axis="y", color=theme.grid, linewidth=0.8)
    ax.set_axisbelow(True)
    ax.yaxis.set_major_locator(round_ticks(6))


def round_ticks(most: int) -> MaxNLocator:
    """Put ticks at round numbers, so many at most."""
    return MaxNLocator(most, steps=[1, 2, 2.5, 5, 10])


def halo(theme: Theme) -> list[AbstractPathEffect]:
    """Keep a label readable where a line passes behind it."""
    return [withStroke(linewidth=3, foreground=theme.paper)]


def inches(ax: Axes) -> tuple[float, float]:
    """Return the width and height of axes."""
    box = ax.get_position()
    width, tall = ax.get_figure().get_size_inches()  # pyright: ignore
    return box.width * width, box.height * tall


def spread(places: Sequence[float], gap: float, low: float, high: float) -> list[float]:
    """Move labels apart: places that are at least `gap` from each other, within low and high.

    Their order stays; each cluster is centered on where its labels would be. Where there is no room
    for all, they begin at `low`.
    """
    order = sorted(range(len(places)), key=places.__getitem__)
    clusters: list[list[int]] = []
    middle: list[float] = []

    def fit(members: Sequence[int]) -> float:
        half = gap * (len(members) - 1) / 2
        center = sum(places[i] for i in members) / len(members)
        return max(min(center, high - half), low + half)

    for index in order:
        clusters.append([index])
        middle.append(fit(clusters[-1]))
        while len(clusters) > 1:
            size = len(clusters[-2]) + len(clusters[-1])
            if middle[-1] - middle[-2] >= gap * size / 2 - 1e-12:
                break
            top = clusters.pop()
            clusters[-1] += top
            middle[-2:] = [fit(clusters[-1])]
    moved = [0.0] * len(places)
    for members, center in zip(clusters, middle, strict=True):
        for step, index in enumerate(members):
            moved[index] = center + gap * (step - (len(members) - 1) / 2)
    return moved


def shorten(name: str, most: int = 18) -> str:
    """Return a name with its middle left out where it is long."""
    half = most // 2
    return name if len(name) <= most else f"{name[:half]}…{name[half + 1 - most :]}"


def line_colors(names: Sequence[str], theme: Theme) -> dict[str, tuple[str, str]]:
    """Return a color and a marker for every name; what stands for all has the color of ink."""
    looks = zip(theme.lines, MARKERS, strict=True)
    found = dict(zip([name for name in names if name != ALL], looks, strict=False))
    return {name: found.get(name, (theme.ink, "o")) for name in names}


def legend_lines(names: Sequence[str], wide: bool) -> list[list[str]]:
    """Return names in lines that fit the width of a chart."""
    lines: list[list[str]] = []
    room = 0.0
    for name in names:
        width = LETTER * 1.15 * (len(shorten(name, 40)) + 4)
        if width > room:
            lines.append([])
            room = WIDTH[wide] - 0.4
        lines[-1].append(name)
        room -= width
    return lines


def legend(figure: Figure, looks: Mapping[str, tuple[str, str]], wide: bool) -> None:
    """Write names in their colors, with their markers, under the subtitle."""
    width, tall = figure.get_size_inches()
    for row, line in enumerate(legend_lines(list(looks), wide)):
        before: Annotation | None = None
        for name in line:
            color, marker = looks[name]
            at = (0.2 / width, 1 - (0.84 + 0.2 * row) / tall) if before is None else (1, 0)
            text = Annotation(
                f"{MARKERS[marker]} {shorten(name, 40)}", at,
                xycoords="figure fraction" if before is None else before,
                xytext=(14 if before is not None else 0, 0), textcoords="offset points",
                size=9, weight="bold", color=color, va="bottom", annotation_clip=False,
            )  # fmt: skip
            text.set_figure(figure)
            figure.add_artist(text)
            before = text
