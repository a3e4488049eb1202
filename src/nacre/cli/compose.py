"""Make experts one model, and change which they are."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import typer

from nacre.cli.console import Json, app, emit, quiet_transformers, screen
from nacre.errors import CheckpointError, ConfigError, NacreError, Problem


@app.command()
def compose(
    experts: Annotated[
        list[str], typer.Argument(metavar="EXPERT...", help="Stages, runs, Hugging Face folders.")
    ],
    mix: Annotated[str | None, typer.Option(help="The rule; default: fixed-share.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the rule; repeatable."),
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option("--name", help="The experts' names, in order; repeatable.")
    ] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Hold weights and code: loads without nacre.")
    ] = False,
    add: Annotated[
        str | None, typer.Option(help="An expert to add to the composition that is named.")
    ] = None,
    remove: Annotated[
        str | None, typer.Option(help="The name of an expert to remove from the composition.")
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(metavar="heads", help="Train the experts' heads together, on --data."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text of all kinds for --mix gate, adapter or --tune; repeatable."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="How long to train; default: 200k.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of that training.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="EVALDIR", help="Say who lost what on the texts of this folder."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Make experts one model by mixing their outputs; most rules need no training.

    nacre compose runs/en runs/ru --out both

    nacre compose runs/en runs/ru --mix gate --data texts/ --out gated

    nacre compose --add runs/zh both

    nacre compose --remove ru both

    nacre compose --report heldout both
    """
    from nacre import composition, config, tables
    from nacre.composition import card
    from nacre.evaluate import experts as comparison
    from nacre.evaluate import language
    from nacre.models.rules import Rule
    from nacre.terminal import Display
    from nacre.train.observer import Observer

    quiet_transformers()
    here = out is None and len(experts) == 1
    action = (
        "add" if add is not None
        else "remove" if remove is not None
        else "tune" if tune is not None and here
        else "report" if report is not None and here
        else "make"
    )  # fmt: skip
    check_compose(
        action,
        experts,
        {
            "--mix": mix, "--out": out, "--set": settings, "--bundle": bundle or None,
            "--name": names, "--remove": remove, "--tune": tune, "--data": data,
            "--tokens": tokens, "--lr": lr,
        },
    )  # fmt: skip
    given = {"sources": data, "tokens": tokens, "lr": lr}
    chosen = {key: value for key, value in given.items() if value is not None}
    tuning = config.validate(composition.Tuning, chosen, where="training") if data else None
    documents = None if report is None else language.read_documents(report)
    folder = str(out or experts[0])
    with nullcontext(Observer()) if quiet else Display(screen) as display:
        if action == "add":
            record = composition.add(str(add), folder, names[0] if names else None)
        elif action == "remove":
            record = composition.remove(str(remove), folder)
        elif action == "tune":
            record = composition.tune(folder, tuning, display)
        elif action == "make":
            record = composition.make(
                experts, folder, mix or Rule().name, config.override({}, settings or []),
                names=names, bundle=bundle,
                tuning=tuning, tune_heads=tune is not None, observer=display,
            )  # fmt: skip
        else:
            record = composition.read_record(folder)
        if documents is not None:
            try:
                found = comparison.compare(folder, documents, display)
            except NacreError as error:
                if action == "report":
                    raise
                again = f"nacre compose --report {report} {folder}"
                raise CheckpointError(
                    f"{error}; {folder} is written, `{again}` tries again"
                ) from None
            record = comparison.write_report(folder, found)
    if as_json:
        emit({"composition": folder, **record})
    if as_json or quiet:
        return
    for line in composition.summary(record):
        screen.print(line, highlight=False, markup=False, soft_wrap=True)
    if documents is not None:
        screen.print(tables.named_rows(card.report_cells(record["report"])))
        for line in card.verdicts(record["report"]):
            screen.print(line, highlight=False, markup=False, soft_wrap=True)
    trace = "" if record["mix"]["name"] == "adapter" else " --weights-trace"
    hint = f'try:    nacre generate {folder} "Once"{trace}'
    screen.print(hint, highlight=False, markup=False, soft_wrap=True)


def check_compose(action: str, experts: list[str], options: dict[str, Any]) -> None:
    """Raise ConfigError for options of `compose` that do not go with what it is to do."""
    alone = {
        "add": ("--name",),
        "remove": ("--remove",),
        "tune": ("--tune", "--data", "--tokens", "--lr"),
        "report": (),
    }
    problems: list[Problem] = []
    if action == "make":
        if options["--out"] is None:
            problems.append(Problem("--out", "where to?", "name a new folder"))
    else:
        beside = {"tune": "--tune alone", "report": "--report alone"}
        what = beside.get(action, "--add or --remove")
        problems += [
            Problem(option, f"does not go with {what}", "compose anew for that")
            for option, value in options.items()
            if value is not None and option not in alone[action]
        ]
    if options["--tune"] not in (None, "heads"):
        fix = "for a gate or an adapter: --mix gate, --mix adapter"
        problems.append(Problem("--tune", f"{options['--tune']!r} is not heads", fix))
    if action in ("make", "tune") and not options["--data"]:
        problems += [
            Problem(option, "nothing is trained without text", "name it with --data")
            for option in ("--tokens", "--lr")
            if options[option] is not None
        ]
    if action in ("add", "remove") and len(experts) != 1:
        problems.append(Problem("--add, --remove", "name one composition", "its folder"))
    if action == "add" and len(options["--name"] or ()) > 1:
        problems.append(Problem("--name", "one expert has one name", "give one"))
    if problems:
        raise ConfigError(problems)
