"""The scores in a page: their charts with words for them, their table, the files beside it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial

import numpy as np

from nacre.evaluate import results
from nacre.report import depth, formats, scores
from nacre.report.depth import Grid, Panel
from nacre.report.depth_charts import draw_panels
from nacre.report.files import RunFiles
from nacre.report.grid_charts import draw_heat, draw_rows
from nacre.report.html import Picture, figure, render
from nacre.report.scores import Group, Model, Scored, number

CSV, LATEX = "scores.csv", "scores.tex"


@dataclass(frozen=True)
class Section:
    """A part of a page as HTML, and the pictures and other files (by name) that go with it."""

    html: str = ""
    pictures: Sequence[Picture] = ()
    files: Mapping[str, str] = field(default_factory=dict[str, str])


def of_run(files: RunFiles) -> Section:
    """Return what a page says of a run's scores: nothing where there are none.

    Raises CheckpointError for damaged records.
    """
    models = depth.stages(files.path.absolute().name, files)
    found = scores.current(scores.load([files.path / results.FILE], models))
    groups = scores.groups(found)
    pictures = [*_panels(depth.panels(groups)), *_maps(groups, models)]
    return _section("Scores by depth", found, pictures, lambda model: f"depth {model.depth}")


def of_runs(found: Sequence[Scored], models: Mapping[str, Sequence[Model]]) -> Section:
    """Return what a page says of the scores that several runs share."""
    found = scores.current(found)
    groups = scores.groups(found)
    pictures = [*_panels(depth.beside(groups, list(models)), list(models))]
    for name, stages in models.items():
        own = [
            Group(group.name, group.metric, chosen)
            for group in groups
            if (chosen := _of(group, name))
        ]
        pictures += _maps(own, stages, f" {name}")
    return _section(
        "Scores by depth", found, pictures, lambda model: f"{model.name}, depth {model.depth}"
    )


def of_composition(found: Sequence[Scored], models: Sequence[Model]) -> Section:
    """Return what a page says of the scores of experts and, the last of `models`, their mix."""
    found = scores.current(found)
    groups = scores.groups(found)
    pictures: list[Picture] = []
    if grids := depth.rows(groups, models):
        pictures.append(render("experts", partial(draw_rows, grids), " ".join(map(_told, grids))))
    pictures += _maps(groups, models)
    return _section("Scores", found, pictures, lambda model: model.name)


def _of(group: Group, name: str) -> dict[str, list[Scored]]:
    """Return the scores of one run in a group."""
    own = {
        part: [scored for scored in found if scored.model.name == name]
        for part, found in group.scores.items()
    }
    return {part: found for part, found in own.items() if found}


def _panels(panels: Sequence[Panel], runs: Sequence[str] = ()) -> list[Picture]:
    if not panels:
        return []
    lines = [
        f"{panel.title}: "
        + "; ".join(
            f"{line.name} {number(line.values[0])} at depth {line.depths[0]:g} to "
            f"{number(line.values[-1])} at depth {line.depths[-1]:g}"
            for line in panel.lines
        )
        + "."
        for panel in panels
    ]
    return [render("scores", lambda t, w: draw_panels(panels, t, w, runs), " ".join(lines))]


def _maps(groups: Sequence[Group], models: Sequence[Model], of: str = "") -> Iterator[Picture]:
    """Draw a map of every group that has many scores."""
    for group in groups:
        if not group.many:
            continue
        has = {scored.model for found in group.scores.values() for scored in found}
        chosen = [model for model in models if model in has]
        staged = chosen[-1].stage is not None
        heads = [_head(model) if staged else model.name for model in chosen]
        grid = depth.heat(group, chosen, heads, of)
        draw = partial(draw_heat, grid, "depth (blocks)" if staged else "")
        name = f"map {group.name} {group.metric}{of}"
        name = "-".join("".join(c if c.isalnum() else " " for c in name).split())
        yield render(name, draw, _told(grid))


def _head(model: Model) -> str:
    return f"{model.depth}" + ("\nLoRA" if model.lora else "")


def _told(grid: Grid) -> str:
    """Say in words what a grid shows: its last column, the best and the worst of it if long."""
    last = grid.values[:, -1]
    named = [f"{row} {number(value)}" for row, value in zip(grid.rows, last, strict=True)]
    if len(named) > scores.FEW:
        named = [named[0], "highest", named[int(np.nanargmax(last))], "lowest",
                 named[int(np.nanargmin(last))]]  # fmt: skip
    column = grid.columns[-1].replace("\n", " ")
    return f"{grid.title}, {len(grid.rows)} scores; of {column}: {', '.join(named)}."


def _section(
    title: str,
    found: Sequence[Scored],
    pictures: Sequence[Picture],
    column: Callable[[Model], str],
) -> Section:
    if not found:
        return Section()
    rows = scores.table(found, column)
    html = f"""<h2>{title}</h2>
{"".join(map(figure, pictures))}
<details>
<summary>All scores</summary>
<div class="scores">{formats.to_html(rows)}</div>
<p class="note">In brackets the 95% interval, a bootstrap over examples or documents.
<code>{CSV}</code> beside this page has every digit and the settings,
<code>{LATEX}</code> this table for LaTeX.</p>
</details>"""
    beside = {CSV: formats.to_csv(scores.long_table(found)), LATEX: formats.to_latex(rows)}
    return Section(html, pictures, beside)
