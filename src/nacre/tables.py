"""Tables for a terminal: stages as measured, as predicted, scores, texts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nacre.growth.budget import StageCost
from nacre.report import stage_table
from nacre.report.tables import count, short_name, size


def stages(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of finished stages, with the cells of the report."""
    rows = stage_table(records)
    heads = [head.replace(" ", "\n").replace("/", "\n/") for head in rows[0]] if rows else []
    return _numbers(heads, [list(row.values()) for row in rows])


def costs(predicted: Sequence[StageCost]) -> Table:
    """Return the table of what a plan will cost."""
    heads = (
        "stage", "depth", "new", "active", "total", "tokens", "FLOPs\n/token", "FLOPs",
        "memory", "disk",
    )  # fmt: skip
    rows = [
        (
            f"{cost.stage}",
            f"{cost.depth}",
            f"{cost.new_blocks}",
            count(cost.active_parameters),
            count(cost.total_parameters),
            count(cost.tokens),
            count(cost.flops_per_token),
            f"{cost.flops:.2e}",
            size(cost.memory_bytes),
            size(cost.disk_bytes),
        )
        for cost in predicted
    ]
    return _numbers(heads, rows)


def side_by_side(prompt: str, texts: Sequence[tuple[Mapping[str, Any], str]]) -> Table:
    """Return the continuations of one prompt at every depth, a column each."""
    table = Table(title=Text(f"{prompt!r} continued at every depth"), show_lines=False)
    for record, _ in texts:
        bits = record["validation"]["bits_per_byte"]
        table.add_column(f"depth {record['depth']}\n{bits:.3f} bits/byte", ratio=1)
    table.add_row(*(Text(text) for _, text in texts))
    return table


def named_rows(cells: Sequence[Sequence[str]]) -> Table:
    """Return plain text cells, heads first, as a table whose first column names the rows."""
    heads, *rows = cells
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    table.add_column(Text(heads[0]), overflow="fold")
    for head in heads[1:]:
        table.add_column(Text(head), justify="right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    return table


def evaluations(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of scores: a row each, a column for every checkpoint if there are several.

    An interval stands under its value.
    """
    folders = list(dict.fromkeys(record["checkpoint"] for record in records))
    rows: dict[tuple[str, str, str], dict[str, Mapping[str, Any]]] = {}
    for record in records:
        key = (record["task"], record["subset"], record["metric"])
        rows.setdefault(key, {})[record["checkpoint"]] = record
    cells = [["score", "n", "chance", *(short_name(folder, folders) for folder in folders)]]
    for (task, subset, metric), row in rows.items():
        some = next(iter(row.values()))
        chance = "" if some["chance"] is None else f"{some['chance']:.3f}"
        name = " ".join(filter(None, (task, subset, metric.replace("_", " "))))
        scores = [_score(row[folder]) if folder in row else "" for folder in folders]
        cells.append([name, f"{some['n']:,}", chance, *scores])
    return named_rows(cells)


def _score(record: Mapping[str, Any]) -> str:
    value, interval = record["value"], record["interval"]
    digits = ",.1f" if value >= 100 else ".3f"
    if interval is None:
        return f"{value:{digits}}"
    return f"{value:{digits}}\n{interval[0]:{digits}} to {interval[1]:{digits}}"


def facts(data: Mapping[str, Any]) -> Table:
    """Return a mapping as a table of two columns."""
    table = Table(show_header=False, box=None)
    table.add_column(style="bold")
    table.add_column()
    for key, value in data.items():
        shown = (
            ", ".join(f"{k} {v}" for k, v in value.items()) if isinstance(value, dict) else value
        )
        table.add_row(key.replace("_", " "), Text(str(shown)))
    return table


def _numbers(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
