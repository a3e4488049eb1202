"""Tables for a terminal: stages as measured, stages as predicted, texts side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nacre.growth.budget import StageCost
from nacre.report import stage_table


def short(number: float, unit: str = "") -> str:
    """Return a number in three figures: 104.9M, 1.21G."""
    for limit, suffix in ((1e12, "T"), (1e9, "G" if unit else "B"), (1e6, "M"), (1e3, "k")):
        if abs(number) >= limit:
            return f"{number / limit:.4g}{suffix}{unit}"
    return f"{number:.4g}{unit}"


def stages(records: Sequence[Mapping[str, Any]]) -> Table:
    """Return the table of finished stages, with the cells of the report."""
    rows = stage_table(records)
    heads = [head.replace(" ", "\n").replace("/", "\n/ ") for head in rows[0]] if rows else []
    return _numbers(heads, [list(row.values()) for row in rows])


def costs(predicted: Sequence[StageCost]) -> Table:
    """Return the table of what a plan will cost."""
    heads = (
        "stage", "depth", "new", "active", "total", "tokens", "FLOPs\n/ token", "FLOPs",
        "memory", "disk",
    )  # fmt: skip
    rows = [
        (
            f"{cost.stage}",
            f"{cost.depth}",
            f"{cost.new_blocks}",
            short(cost.active_parameters),
            short(cost.total_parameters),
            short(cost.tokens),
            short(cost.flops_per_token),
            short(cost.flops),
            short(cost.memory_bytes, "B"),
            short(cost.disk_bytes, "B"),
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
    table = Table(box=box.SIMPLE_HEAD)
    for head in heads:
        table.add_column(head, justify="right")
    for row in rows:
        table.add_row(*row)
    return table
