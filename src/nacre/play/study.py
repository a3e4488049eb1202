"""The tab *Study*: arms side by side at equal cost, with intervals, and the computed verdicts."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from nacre.errors import CheckpointError
from nacre.folders import RESULTS
from nacre.play.chart import Interval, draw_intervals
from nacre.play.markup import details, notice, waiting
from nacre.report.canvas import LIGHT, Theme
from nacre.report.formats import to_html
from nacre.report.html import figure, render
from nacre.study.charts import CHARTS, arm_numbers
from nacre.study.page import about, arm_rows, comparison_rows, crossing, score_rows
from nacre.train import files

PARTS = ("study", "machine", "missing", "runs", "comparisons", "crossings", "claims")
COSTS = {"seconds": "equal wall-clock", "tokens": "equal tokens", "flops": "equal FLOPs"}


def read(folder: Path) -> dict[str, Any]:
    """Return a study's results; raise CheckpointError where they are damaged."""
    found = files.read_json(folder / RESULTS)
    if lacking := [part for part in PARTS if part not in found]:
        raise CheckpointError(f"{folder / RESULTS}: damaged: lacks {lacking[0]!r}")
    return found


def show(folder: Path) -> Iterator[str]:
    """Yield what the tab shows of a study: verdicts, ratios and tables, then the charts as well."""
    try:
        found = read(folder)
        head = (
            f'<p class="summary">{html.escape(found["study"]["about"] or "")}</p>'
            f'<p class="note">{html.escape(about(found))}</p>{verdicts(found)}{ratios(found)}'
        )
        tables = f"<h2>Arms</h2>{to_html(arm_rows(found['runs']))}{_tables(found)}"
        yield head + waiting("Drawing the charts…") + tables
        yield head + "".join(_charts(found)) + tables
    except CheckpointError as error:
        yield notice(str(error))
    except (KeyError, TypeError, IndexError) as error:
        fix = f"write it again with `nacre study ... --no-run --out {folder}`"
        yield notice(f"{folder / RESULTS}: damaged: lacks {error}; {fix}")


def verdicts(found: Mapping[str, Any]) -> str:
    """Return every claim with its computed verdict, and where curves cross."""
    marks = {"holds": "✓", "does not hold": "✗", "undecided": "?"}
    cards = "".join(
        f'<li class="verdict {claim["verdict"].replace(" ", "-")}">'
        f"<b>{marks[claim['verdict']]} {claim['verdict']}</b>{_sentence(claim)}</li>"
        for claim in found["claims"]
    )
    said = [crossing(each) for each in found["crossings"] if each["below"]]
    crossings = "".join(f"<li>{html.escape(sentence)}</li>" for sentence in said)
    lists = f'<ul class="verdicts">{cards}</ul>' if cards else ""
    more = details("Where the curves cross", f"<ul>{crossings}</ul>") if crossings else ""
    return f"<h2>Verdicts</h2>{lists}{more}"


def _sentence(claim: Mapping[str, Any]) -> str:
    """Return a claim's sentence without its verdict, and its reason on a line of its own."""
    said, _, because = claim["sentence"].partition(f": {claim['verdict']} (")
    reason = f"<small>{html.escape(because.removesuffix(')'))}</small>" if because else ""
    return f"<span>{html.escape(said)}</span>{reason}"


def ratios(found: Mapping[str, Any]) -> str:
    """Return the arms' bits per byte over the baseline's, with 95% intervals over seeds."""
    numbers = arm_numbers(found)
    groups = [
        (
            title,
            [
                Interval(
                    f"{each['arm']} ×{each['budget']:g}",
                    each["mean"],
                    tuple(each["interval"]) if each["interval"] else None,
                    f"e{numbers[each['arm']] % len(LIGHT.lines)}",
                )
                for each in found["comparisons"]
                if each["at"] == cost and each["mean"] is not None
            ],
        )
        for cost, title in COSTS.items()
    ]
    return draw_intervals(
        [group for group in groups if group[1]],
        title=f"Bits per byte over those of {found['study']['baseline']}",
        about="left of 1 is better; bars: 95% intervals over seeds; hollow: one seed, no interval",
        even=1.0,
    )


def _charts(found: Mapping[str, Any]) -> list[str]:
    """Return the study's charts, for light and dark, wide and narrow screens."""
    return [
        figure(render(name, partial(_drawn, draw, found), alt))
        for name, (draw, alt) in CHARTS.items()
        if found["runs"] and (name != "budgets" or _scored(found))
    ]


def _drawn(
    draw: Callable[..., Figure | None], found: Mapping[str, Any], theme: Theme, wide: bool
) -> Figure:
    drawn = draw(found, theme, wide)
    assert drawn is not None, "there are runs to draw"
    return drawn


def _scored(found: Mapping[str, Any]) -> bool:
    return any(run["bits_per_byte"] is not None for run in found["runs"])


def _tables(found: Mapping[str, Any]) -> str:
    parts = ""
    if found["comparisons"]:
        baseline = found["study"]["baseline"]
        rows = to_html(comparison_rows(found["comparisons"]))
        parts += f"<h2>Against {html.escape(baseline)}, at equal cost</h2>{rows}"
    scores = score_rows(found["runs"])
    return parts + (f"<h2>Scores by depth</h2>{to_html(scores)}" if scores else "")
