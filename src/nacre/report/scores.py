"""Records of `nacre eval`, read for a report: which count, which belong together, as a table.

Nothing is drawn here. A variant of a task is a version of it with settings: only scores of one
variant can be compared.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacre.evaluate import results
from nacre.report.formats import Cell

FEW = 8
"""Scores that one chart shows as lines; more of them are a heat map."""

ALL = "all"
"""What a task's score without a subset is called beside its parts."""


@dataclass(frozen=True)
class Model:
    """What was scored: a stage of the run `name`, or an expert or a composition of that name."""

    name: str
    fingerprint: str
    depth: int | None
    stage: int | None = None
    lora: bool = False


@dataclass(frozen=True)
class Scored:
    """A record of `nacre eval` and the model that it is of."""

    model: Model
    record: Mapping[str, Any]

    @property
    def variant(self) -> tuple[str, str]:
        """The task, and its version and settings as JSON."""
        what = [self.record["version"], self.record["settings"]]
        return self.record["task"], json.dumps(what, sort_keys=True)

    @property
    def place(self) -> tuple[Model, str, str, str]:
        """What only a newer record of another variant can say again."""
        return self.model, self.record["task"], self.record["subset"], self.record["metric"]


@dataclass(frozen=True)
class Group:
    """Scores of one metric that belong together: parts of a task, or tasks of one family.

    `scores` has the records of every model by the name of the part or task; `overall` is the one
    among them that stands for all, if there is one.
    """

    name: str
    metric: str
    scores: Mapping[str, Sequence[Scored]]

    @property
    def overall(self) -> str | None:
        """The score of the whole task or family."""
        return next((name for name in (ALL, self.name) if name in self.scores), None)

    @property
    def many(self) -> bool:
        """True when lines could not be told apart."""
        return len(self.scores) > FEW


def load(files: Iterable[Path], models: Iterable[Model]) -> list[Scored]:
    """Return the newest records of these models in files of results, in the order of the models.

    Records of other checkpoints, such as a stage that has since been trained again, are left out.
    Raises CheckpointError for a damaged file.
    """
    known = [record for file in dict.fromkeys(files) for record in results.read(file)]
    newest: dict[Any, Scored] = {}
    for model in models:
        for record in sorted(known, key=lambda record: record["date"]):
            if record["fingerprint"] == model.fingerprint:
                scored = Scored(model, record)
                newest[scored.place, scored.variant] = scored
    return list(newest.values())


def shared(found: Sequence[Scored], of: str | None = None) -> list[Scored]:
    """Return the scores that two or more names have in one variant; one of them `of`, if given."""
    names: dict[Any, set[str]] = {}
    for scored in found:
        names.setdefault(_what(scored), set()).add(scored.model.name)
    return [
        scored
        for scored in found
        if len(has := names[_what(scored)]) > 1 and (of is None or of in has)
    ]


def _what(scored: Scored) -> tuple[Any, ...]:
    return *scored.variant, scored.record["subset"], scored.record["metric"]


def current(found: Sequence[Scored]) -> list[Scored]:
    """Leave out each variant of a task all of whose scores newer variants say again."""
    variants: dict[tuple[str, str], list[Scored]] = {}
    for scored in found:
        variants.setdefault(scored.variant, []).append(scored)
    newest = sorted(variants, key=lambda v: max(s.record["date"] for s in variants[v]))[::-1]
    said: set[Any] = set()
    kept: set[tuple[str, str]] = set()
    for variant in newest:
        places = {scored.place for scored in variants[variant]}
        if not places <= said:
            kept.add(variant)
            said |= places
    return [scored for scored in found if scored.variant in kept]


def groups(found: Sequence[Scored]) -> list[Group]:
    """Return scores in groups, in the order in which they were found.

    The parts of a task are a group; so are tasks without parts whose names begin alike (`khop-1`,
    `khop-2`). Perplexity is left out where the task has bits per byte, which say the same.
    """
    details = _details(found)
    parted = {scored.variant for scored in found if scored.record["subset"]}
    whole = {scored.record["task"] for scored in found if scored.variant not in parted}
    kin = [_family(task) for task in whole]
    bits = {scored.variant for scored in found if scored.record["metric"] == "bits_per_byte"}
    made: dict[tuple[str, str], dict[str, list[Scored]]] = {}
    for scored in found:
        task, metric = scored.record["task"], scored.record["metric"]
        if metric == "perplexity" and scored.variant in bits:
            continue
        name, part = task, " ".join(filter(None, (task, details[scored.variant])))
        if scored.variant in parted:
            name, part = part, scored.record["subset"] or ALL
        elif kin.count(_family(task)) > 1:
            name = _family(task)
        made.setdefault((name, metric), {}).setdefault(part, []).append(scored)
    return [Group(name, metric, scores) for (name, metric), scores in made.items()]


def _family(task: str) -> str:
    return re.split("[_-]", task, maxsplit=1)[0]


def _details(found: Sequence[Scored]) -> dict[tuple[str, str], str]:
    """Return in words what sets each variant of a task apart from its others, if it has any."""
    about: dict[str, dict[tuple[str, str], dict[str, Any]]] = {}
    for scored in found:
        settings = {"version": scored.record["version"], **scored.record["settings"]}
        about.setdefault(scored.record["task"], {})[scored.variant] = settings
    said: dict[tuple[str, str], str] = {}
    for variants in about.values():
        keys = dict.fromkeys(key for settings in variants.values() for key in settings)
        differ = [
            key
            for key in keys
            if len({json.dumps(settings.get(key)) for settings in variants.values()}) > 1
        ]
        for variant, settings in variants.items():
            values = [f"{key} {str(settings.get(key, 'none'))[:8]}" for key in differ]
            said[variant] = f"({', '.join(values)})" if values else ""
    return said


def words(metric: str) -> str:
    """Return a metric for people; what is better where it is small says so."""
    text = metric.replace("_", " ")
    return f"{text} (less is better)" if metric in ("bits_per_byte", "perplexity") else text


def number(value: float) -> str:
    """Write a score as `nacre eval` does."""
    return f"{value:,.1f}" if abs(value) >= 100 else f"{value:.3f}"


def table(found: Sequence[Scored], column: Callable[[Model], str]) -> list[dict[str, str]]:
    """Return one row a score, with a column for every model, and intervals in brackets."""
    details = _details(found)
    columns = dict.fromkeys(column(scored.model) for scored in found)
    rows: dict[Any, dict[str, str]] = {}
    for scored in found:
        record = scored.record
        parts = (record["task"], details[scored.variant], record["subset"])
        name = " ".join([*filter(None, parts), record["metric"].replace("_", " ")])
        chance = "" if record["chance"] is None else number(record["chance"])
        head = {"score": name, "n": Cell(f"{record['n']:,}", record["n"])}
        head |= {"chance": Cell(chance, record["chance"])} | dict.fromkeys(columns, Cell("", None))
        row = rows.setdefault(_what(scored), head)
        text, interval = number(record["value"]), record["interval"]
        if interval is not None:
            text += " [{}, {}]".format(*map(number, interval))
        row[column(scored.model)] = Cell(text, record["value"], interval)
    return list(rows.values())


def long_table(found: Sequence[Scored]) -> list[dict[str, Any]]:
    """Return one row a score of a model, values as they are, with settings as JSON: for CSV."""
    before, after = ("task", "subset", "metric", "value"), ("n", "chance", "corrected", "version")
    rows: list[dict[str, Any]] = []
    for scored in found:
        model, record = scored.model, scored.record
        low, high = record["interval"] or (None, None)
        row = {"model": model.name, "stage": model.stage, "depth": model.depth}
        row |= {key: record[key] for key in before} | {"low": low, "high": high}
        row |= {key: record[key] for key in after}
        rows.append(row | {"settings": json.dumps(record["settings"], sort_keys=True)})
    return rows
