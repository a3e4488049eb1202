"""Run independent jobs on many machines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext, redirect_stdout
from dataclasses import asdict
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from typer.main import get_command

from nacre.cli.console import Json, app, emit, quiet_transformers, screen
from nacre.cli.grow import plan_settings
from nacre.errors import ConfigError, Problem

if TYPE_CHECKING:
    from nacre.fleet.jobs import Call


@app.command()
def fleet(
    file: Annotated[Path, typer.Argument(help="A fleet's file, or the name of a recipe.")],
    out: Annotated[Path | None, typer.Option(help="Logs and records; default: runs/NAME.")] = None,
    address: Annotated[
        str | None,
        typer.Option(metavar="HOST:PORT", help="A running Ray cluster; default: this machine."),
    ] = None,
    only_list: Annotated[bool, typer.Option("--list", help="Name the jobs; run none.")] = False,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the fleet."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Run experts, studies, tokenizers, evaluations side by side on a cluster of machines.

    nacre fleet experts.yaml --list

    nacre fleet experts.yaml

    nacre fleet experts.yaml --address 10.0.0.5:6379
    """
    from nacre import tables
    from nacre.fleet import design, runner
    from nacre.fleet import jobs as describing
    from nacre.terminal import Display
    from nacre.train.observer import Observer

    quiet_transformers()
    chosen = design.load(file, settings or [])
    out = out or Path("runs") / chosen.name
    jobs = describing.read(chosen, read_command)
    if only_list:
        about = [
            {
                "job": job.name, "done": runner.done_before(out, job), "needs": list(job.needs),
                "command": " ".join(["nacre", *job.arguments]),
            }
            for job in jobs
        ]  # fmt: skip
        if as_json:
            emit(about)
        else:
            rows = [(job["job"], "yes" if job["done"] else "", job["command"]) for job in about]
            Console().print(tables.named_rows([("job", "done", "command"), *rows]))
        return
    with nullcontext(Observer()) if quiet else Display(screen) as display:
        outcomes = runner.run(jobs, out, address=address, observer=display)
    if as_json:
        said = [asdict(each) | {"log": str(each.log)} for each in outcomes]
        emit({"fleet": str(out), "jobs": said})
    runner.raise_for(outcomes)


def read_command(words: Sequence[str]) -> Call:
    """Read a command of nacre as the command line does, without running it."""
    from nacre.fleet.jobs import Call

    command, names, rest = get_command(app), list[str](), list(words)
    try:
        with redirect_stdout(StringIO()):  # a help page that was asked for
            context = command.make_context("nacre", list(words))
            while hasattr(command, "resolve_command"):
                name, command, rest = command.resolve_command(context, rest)  # pyright: ignore
                names.append(str(name))
                context = command.make_context(name, rest, parent=context)
    except (_USAGE_ERROR, typer.Exit) as error:
        said = error.format_message() if isinstance(error, _USAGE_ERROR) else ""  # pyright: ignore
        message = " ".join(said.split()).removesuffix(".") or "asks for help"
        fix = f"{' '.join(['nacre', *names])} --help says what there is"
        raise ConfigError(Problem("run", message, fix)) from None
    options = {key: None if value in ([], ()) else value for key, value in context.params.items()}
    name = " ".join(names)
    settings = options.get("settings") or []
    if name == "grow":
        fields = ("data", "start_from", "tokenizer", "font", "errors", "settings")
        settings = plan_settings(**{field: options[field] for field in fields})
    return Call(name, options, tuple(settings))


# Of click, or of the click that typer has inside.
_USAGE_ERROR: type[Exception] = typer.BadParameter.__bases__[0]
