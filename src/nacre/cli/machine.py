"""What this machine offers, and what nacre reaches on it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nacre.cli.console import Json, app, emit, quiet_transformers, screen
from nacre.errors import ConfigError, Problem


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine and installation offer: versions, device, bf16, threads, disk."""
    from nacre import tables
    from nacre.doctor import examine

    found = examine(Path.cwd())
    if as_json:
        emit(found)
    else:
        Console().print(tables.facts(found))


@app.command()
def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(metavar="[SUITE]...", help="Which; default: all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, seconds in all, no verdict.")
    ] = False,
    only_list: Annotated[bool, typer.Option("--list", help="Name the suites; run none.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure nacre on this machine beside what else one would run, and the physical limit."""
    from nacre import bench as benches

    if only_list:
        about = {name: text for name, (_, text) in benches.SUITES.items()}
        if as_json:
            emit(about)
        else:
            for name, text in about.items():
                print(f"{name:12}{text}")
        return
    benches.check(suites or [])
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        message = f"{out} is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ConfigError(Problem("--out", message, "name a file in a folder that exists"))
    from nacre.bench.table import table
    from nacre.train.files import write_json

    quiet_transformers()
    with screen.status("") as status:

        def progress(suite: str, case: str) -> None:
            status.update(f"{suite}: {case}")
            if not screen.is_terminal:
                screen.print(f"{suite}: {case}", highlight=False, soft_wrap=True)

        results = benches.run(suites or [], quick=quick, progress=progress)
    if out is not None:
        write_json(out, results.record())
    if as_json:
        emit(results.record())
        return
    for name, rows in results.suites.items():
        Console().print(table(name, rows, results.seconds[name]))
