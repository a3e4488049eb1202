"""Scores against depth, and of models beside each other, as numbers to draw; nothing is drawn here.

S scores or stages, R rows, C columns.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from nacre.evaluate.results import fingerprint
from nacre.report.files import RunFiles, Series
from nacre.report.scores import ALL, Group, Model, Scored, words
from nacre.train.files import stages as finished_stages


@dataclass(frozen=True)
class Line:
    """One score over the stages of a run, in their order; the arrays are float64 [S].

    `lows` and `highs` are the ends of the 95% intervals, NaN where there is none.
    """

    name: str
    depths: Series
    values: Series
    lows: Series
    highs: Series
    chance: float | None


@dataclass(frozen=True)
class Panel:
    """Lines that stand in one chart: scores of one metric, or one score of several runs."""

    title: str
    lines: tuple[Line, ...]


@dataclass(frozen=True)
class Grid:
    """Scores (rows) of several models (columns); the arrays are float64 [R, C], NaN for none.

    `chance` is [R]; `corrected` is how far from chance (0) to perfect (1) a value is.
    """

    title: str
    rows: tuple[str, ...]
    columns: tuple[str, ...]
    values: Series
    lows: Series
    highs: Series
    corrected: Series
    chance: Series

    @property
    def sure(self) -> npt.NDArray[np.bool_]:
        """True [R, C] where the interval leaves out chance."""
        return (self.lows > self.chance[:, None]) | (self.highs < self.chance[:, None])


def stages(name: str, files: RunFiles) -> list[Model]:
    """Return the finished stages of a run as models, from the bottom up."""
    folders = finished_stages(files.path)
    return [
        Model(name, fingerprint(path), record["depth"], record["stage"], bool(record["lora"]))
        for path, record in zip(folders, files.records, strict=True)
    ]


def panels(groups: Iterable[Group]) -> list[Panel]:
    """Return the charts of one run: a line for every score; of many scores only the overall one."""
    return [
        Panel(
            f"{group.name}: {group.metric.replace('_', ' ')}",
            tuple(
                line(name, scores)
                for name, scores in group.scores.items()
                if not group.many or name == group.overall
            ),
        )
        for group in groups
        if not group.many or group.overall
    ]


def beside(groups: Iterable[Group], runs: Sequence[str]) -> list[Panel]:
    """Return the charts of several runs: one for every score, in it a line for every run."""
    made: list[Panel] = []
    for group in groups:
        for name, scores in group.scores.items():
            if group.many and name != group.overall:
                continue
            lines = [
                line(run, found)
                for run in runs
                if (found := [scored for scored in scores if scored.model.name == run])
            ]
            metric = group.metric.replace("_", " ")
            made.append(Panel(f"{_title(group, name)}: {metric}", tuple(lines)))
    return made


def _title(group: Group, name: str) -> str:
    """Return what a score is called where its group is not named."""
    if name == group.name or name.startswith((f"{group.name}_", f"{group.name}-")):
        return name
    return f"{group.name} {name}"


def line(name: str, scores: Iterable[Scored]) -> Line:
    """Return one score over depth."""
    ordered = sorted(scores, key=lambda scored: scored.model.stage or 0)
    numbers = np.array(
        [
            (scored.model.depth, scored.record["value"], *_interval(scored))
            for scored in ordered
        ],
        dtype=np.float64,
    ).reshape(-1, 4)  # fmt: skip
    depths, values, lows, highs = numbers.T
    return Line(name, depths, values, lows, highs, ordered[0].record["chance"])


def _interval(scored: Scored) -> tuple[float, float]:
    low, high = scored.record["interval"] or (np.nan, np.nan)
    return low, high


def heat(group: Group, models: Sequence[Model], columns: Sequence[str], of: str = "") -> Grid:
    """Return many scores of models: the overall one first, the others from high to low by the last.

    `columns` are the models' heads, `of` what the title adds.
    """
    title = f"{group.name}{of}: {words(group.metric)}"
    return _sorted(_grid(title, list(group.scores.items()), models, columns), group)


def rows(groups: Sequence[Group], models: Sequence[Model]) -> list[Grid]:
    """Return the scores of experts and their composition, those of one metric together."""
    made: list[Grid] = []
    for metric in dict.fromkeys(group.metric for group in groups):
        same = [group for group in groups if group.metric == metric]
        scores = [
            (name if len(same) == 1 else _title(group, name), found)
            for group in same
            for name, found in group.scores.items()
            if not group.many or name == group.overall
        ]
        title = words(metric) if len(same) > 1 else f"{same[0].name}: {words(metric)}"
        if scores:
            made.append(_grid(title, scores, models, [model.name for model in models]))
    return made


def _grid(
    title: str,
    scores: Sequence[tuple[str, Sequence[Scored]]],
    models: Sequence[Model],
    columns: Sequence[str],
) -> Grid:
    numbers = np.full((4, len(scores), len(models)), np.nan)
    chance = np.full(len(scores), np.nan)
    for row, (_, found) in enumerate(scores):
        for scored in found:
            record, column = scored.record, models.index(scored.model)
            corrected = np.nan if record["corrected"] is None else record["corrected"]
            numbers[:, row, column] = record["value"], *_interval(scored), corrected
            if record["chance"] is not None:
                chance[row] = record["chance"]
    names = tuple(name for name, _ in scores)
    values, lows, highs, corrected = numbers
    return Grid(title, names, tuple(columns), values, lows, highs, corrected, chance)


def _sorted(grid: Grid, group: Group) -> Grid:
    """Put the overall score first and the others by their last value, and name them shortly."""
    last = np.nan_to_num(grid.values[:, -1], nan=-np.inf)
    order = sorted(
        range(len(grid.rows)), key=lambda row: (grid.rows[row] != group.overall, -last[row])
    )
    names = [
        ALL if name == group.overall else name.removeprefix(f"{group.name}_").replace("_", " ")
        for name in grid.rows
    ]
    return Grid(
        grid.title,
        tuple(names[row] for row in order),
        grid.columns,
        grid.values[order],
        grid.lows[order],
        grid.highs[order],
        grid.corrected[order],
        grid.chance[order],
    )
