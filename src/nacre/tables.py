"""Tables for a terminal: stages as measured, as predicted, scores, texts side by side."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from nacre.growth.budget import StageCost
from nacre.growth.estimates import (
    LAYOUTS,
    CacheEstimate,
    Estimate,
    RunEstimate,
    StageEstimate,
)
from nacre.numbers import count, duration, size
from nacre.report import stage_table
from nacre.report.tables import short_name


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


def estimate(found: Estimate) -> Iterator[Table | str]:
    """Yield what is estimated of a plan on devices: a table a layout, caches, assumptions."""
    several = found.cluster.count > 1
    for layout, grown in found.growth.items():
        whole = found.end_to_end[layout]
        title = found.cluster.title + (f", {LAYOUTS[layout]}" if several else "")
        yield _runs(title, grown, whole, several)
        yield _compared(grown, whole)
    if found.caches:
        yield _caches(found.caches)
    yield from found.assumptions()


def _runs(title: str, grown: RunEstimate, whole: RunEstimate, several: bool) -> Table:
    """Return the table of a layout: the stages, all of them, and end-to-end training.

    What is sent is shown of `several` devices; of a run, that of the step that sends most.
    """
    heads = ["stage", "time", "least to most", "memory\n/device", "trunk"]
    if several:
        heads += ["sent\n/step", "link\n/step", "share\nof step", "not over-\nlapped"]

    def row(name: str, run: StageEstimate | RunEstimate, step: StageEstimate) -> list[str]:
        least, most = duration(run.seconds_low), duration(run.seconds_high)
        memory = size(run.memory_bytes) + ("" if run.fits else "\ntoo much")
        cells = [name, duration(run.seconds), f"{least} to {most}" if least != most else "", memory]
        cells.append(run.trunk if isinstance(run, StageEstimate) else "")
        if several:
            cells += [size(step.sent_bytes), duration(step.link_seconds)]
            cells += [f"{step.share:.0%}", f"{step.share_not_overlapped:.0%}"]
        return cells

    rows = [row(f"{stage.stage}", stage, stage) for stage in grown.stages]
    for name, run in (("all", grown), ("end to end", whole)):
        rows.append(row(name, run, max(run.stages, key=lambda stage: stage.sent_bytes)))
    table = _numbers(heads, rows)
    table.title, table.title_justify = title, "left"
    return table


def _compared(grown: RunEstimate, whole: RunEstimate) -> str:
    """Say what growth takes of what end-to-end training takes."""
    parts = [
        f"{grown.seconds / whole.seconds:.2f}x the time",
        f"{grown.memory_bytes / whole.memory_bytes:.2f}x the memory",
    ]
    if whole.sent_bytes:
        parts.append(f"{grown.sent_bytes / whole.sent_bytes:.2f}x the traffic")
    return f"Growth takes {', '.join(parts)} of end-to-end training on as many tokens."


def _caches(found: Sequence[CacheEstimate]) -> Table:
    """Return the table of caches: what they take, and the trunk's time with and without one."""
    heads = (
        "stage", "trunk", "made\nthrough", "cache\n/token", "disk", "read/s\n/device",
        "even at\nblocks", "even at\nreadings", "run", "cached", "less",
    )  # fmt: skip
    rows = [
        (
            f"{cache.stage}",
            f"{cache.trunk_depth}",
            f"{cache.made_through}",
            f"{cache.bytes_per_token:,} B",
            size(cache.disk_bytes),
            size(cache.keep_up),
            f"{cache.blocks_even:.1f}",
            "never" if cache.passes_even is None else f"{cache.passes_even:.1f}",
            duration(cache.recompute_seconds),
            duration(cache.cache_seconds),
            cache.cheaper,
        )
        for cache in found
    ]
    table = _numbers(heads, rows)
    table.title, table.title_justify = "The trunk, run or read from a cache", "left"
    return table


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
