"""The charts of a study: score against cost over budgets, and over the run."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, NullLocator

from nacre.report.canvas import LIGHT, MARKERS, Theme, canvas, legend, subtitle
from nacre.report.charts import tick
from nacre.study.results import by_arm_and_budget, mean_curve

COSTS = {"seconds": "seconds of training", "tokens": "tokens"}
Looks = Mapping[str, tuple[str, str]]


def arm_numbers(found: Mapping[str, Any]) -> dict[str, int]:
    """Return the number of every arm that has runs: it has one colour wherever it is drawn."""
    arms = dict.fromkeys(run["arm"] for run in found["runs"])
    return {arm: number for number, arm in enumerate(arms)}


def draw_budgets(
    found: Mapping[str, Any], theme: Theme = LIGHT, wide: bool = True
) -> Figure | None:
    """Draw the final bits per byte of every arm against wall-clock and tokens; bars span seeds."""
    runs = [run for run in found["runs"] if run["bits_per_byte"] is not None]
    if not runs:
        return None
    shown = list(dict.fromkeys(run["arm"] for run in runs))
    title = "Held-out bits per byte of finished runs"
    figure, axes, looks = _panels(found, shown, theme, wide, title)
    names = f"seeds {', '.join(map(str, found['study']['seeds']))}: mean, lowest and highest"
    subtitle(figure, theme, names)
    for ax, cost in zip(axes, COSTS, strict=True):
        for arm, (color, marker) in looks.items():
            middle = mean_curve(runs, arm, cost)
            ax.plot(*zip(*middle, strict=True), color=color, marker=marker, linewidth=1.6)
            own = by_arm_and_budget([run for run in runs if run["arm"] == arm])
            for (x, _), (_, group) in zip(middle, sorted(own.items()), strict=True):
                ends = [run["bits_per_byte"] for run in group]
                ax.vlines(x, min(ends), max(ends), color=color, linewidth=1.2)
        _finish(ax, cost, theme)
    return figure


def draw_curves(found: Mapping[str, Any], theme: Theme = LIGHT, wide: bool = True) -> Figure | None:
    """Draw held-out bits per byte over the run, of every arm's largest budget and first seed.

    None for a study whose runs hold out different text.
    """
    if not found.get("same_text", True):
        return None
    chosen: dict[str, Mapping[str, Any]] = {}
    for run in found["runs"]:
        best = chosen.get(run["arm"])
        if best is None or (-run["budget"], run["seed"]) < (-best["budget"], best["seed"]):
            chosen[run["arm"]] = run
    if not chosen:
        return None
    title = "Held-out bits per byte during a run"
    figure, axes, looks = _panels(found, list(chosen), theme, wide, title)
    subtitle(figure, theme, "the largest budget of each arm, first seed; marks end stages")
    for ax, cost in zip(axes, COSTS, strict=True):
        for arm, run in chosen.items():
            color, marker = looks[arm]
            points = [(p[cost], p["bits_per_byte"]) for p in run["curve"] if p[cost]]
            ax.plot(*zip(*points, strict=True), color=color, linewidth=1.4)
            ends, total = [], 0.0
            for stage in run["stages"]:
                total += stage[cost]
                ends.append((total, stage["bits_per_byte"]))
            ax.plot(*zip(*ends, strict=True), color=color, marker=marker, linestyle="")
        later = [
            p["bits_per_byte"]
            for run in chosen.values()
            for p in run["curve"]
            if p[cost] > run[cost] / 20
        ]
        ax.set_ylim(min(later) * 0.98, max(later) * 1.02)
        _finish(ax, cost, theme)
    return figure


def _panels(
    found: Mapping[str, Any], shown: Sequence[str], theme: Theme, wide: bool, title: str
) -> tuple[Figure, list[Axes], Looks]:
    """Return a figure with one axes for each kind of cost, and how every arm in it looks."""
    figure, axes = canvas(title, theme, wide, height=4.6, columns=len(COSTS))
    numbers = arm_numbers(found)
    looks: Looks = {
        arm: (
            theme.lines[numbers[arm] % len(theme.lines)],
            list(MARKERS)[(numbers[arm] + numbers[arm] // len(theme.lines)) % len(MARKERS)],
        )
        for arm in shown
    }
    legend(figure, looks, wide)
    return figure, axes, looks


def _finish(ax: Axes, cost: str, theme: Theme) -> None:
    ax.set_xscale("log")
    ax.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    ax.xaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(FuncFormatter(lambda x, _: tick(x)))
    ax.set_xlabel(COSTS[cost], color=theme.muted, size=9, labelpad=4)


CHARTS: Mapping[str, tuple[Callable[..., Figure | None], str]] = {
    "budgets": (draw_budgets, "Held-out bits per byte against wall-clock and tokens, by arm"),
    "curves": (draw_curves, "Held-out bits per byte over the run, by arm"),
}
"""By file name: how a chart is drawn, and what it shows."""
