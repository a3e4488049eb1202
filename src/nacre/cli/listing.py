"""List what stands in a folder."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from nacre.cli.console import Json, app, emit, screen


@app.command("ls")
def list_folder(
    folder: Annotated[Path, typer.Argument(help="A folder of runs, a study, a run.")] = Path(
        "runs"
    ),
    as_json: Json = False,
) -> None:
    """List runs, studies and compositions: state, depth, held-out bits per byte, size, age.

    nacre ls

    nacre ls runs/operators
    """
    from nacre import listing
    from nacre.numbers import age, count, size

    found = listing.read(folder)
    if as_json:
        emit(found.record())
        return
    now = time.time()

    def ending(entry: listing.Entry) -> list[str]:
        return [size(entry.bytes), age(now - entry.changed)]

    runs = [
        [
            _name(run, folder), run.state, f"{run.stages}/{run.planned}", _text(run.depth),
            "" if run.bits_per_byte is None else f"{run.bits_per_byte:.4f}", count(run.tokens),
            *ending(run),
        ]
        for run in found.runs
    ]  # fmt: skip
    studies = [
        [_name(study, folder), study.state, f"{study.finished}/{study.planned}", *ending(study)]
        for study in found.studies
    ]
    compositions = [
        [
            _name(each, folder), ", ".join(each.experts), each.rule or each.state,
            "" if each.parameters is None else count(each.parameters), *ending(each),
        ]
        for each in found.compositions
    ]  # fmt: skip
    heads = ("run", "state", "stages", "depth", "bits/byte", "tokens", "size", "age")
    _show(heads, runs)
    _show(("study", "state", "runs", "size", "age"), studies)
    _show(("composition", "experts", "rule", "parameters", "size", "age"), compositions)
    for entry in [*found.runs, *found.studies, *found.compositions]:
        if entry.damage:
            screen.print(f"{entry.path}: {entry.damage}", highlight=False, markup=False)
    if not (runs or studies or compositions):
        screen.print(f"no runs in {folder}", highlight=False, markup=False)
    else:
        print(f"{size(found.bytes)} in all")


def _name(entry: Any, folder: Path) -> str:
    below = entry.path.relative_to(folder)
    return entry.path.name or str(entry.path) if below == Path() else below.as_posix()


def _text(value: Any) -> str:
    return "" if value is None else str(value)


def _show(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    if not rows:
        return
    table = Table(box=box.SIMPLE_HEAD, padding=0)
    for place, head in enumerate(heads):
        table.add_column(Text(head), justify="left" if place < 2 else "right", overflow="fold")
    for row in rows:
        table.add_row(*map(Text, row))
    Console().print(table)
