"""Send to the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from nacre.cli.console import Json, app, emit, quiet_transformers, screen


@app.command()
def push(
    source: Annotated[
        Path,
        typer.Argument(help="A run, a stage, a bundled composition, a substrate or a tokenizer."),
    ],
    to: Annotated[str, typer.Option(metavar="NAME", help="Where on the hub: USER/MODEL.")],
    private: Annotated[bool, typer.Option("--private", help="Only you may see it.")] = False,
    stage: Annotated[
        str | None,
        typer.Option(
            metavar="N", help="Of a run; default: the newest. `all`: each also as a branch."
        ),
    ] = None,
    licence: Annotated[
        str | None, typer.Option("--license", help="For the card: apache-2.0, cc-by-4.0, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """Send a model to the Hugging Face hub, with a card made from its ledger.

    nacre push runs/novels --to USER/novels --license apache-2.0

    nacre push runs/novels --to USER/novels --stage all --private
    """
    from nacre.publish import push_to_hub

    quiet_transformers()
    sent = push_to_hub(source, to, private=private, stage=stage, licence=licence)
    if as_json:
        emit(sent)
        return
    revisions = ", ".join(
        f"{name} ({len(files)} files)" for name, files in sent["revisions"].items()
    )
    screen.print(f"{sent['kind']}: {revisions}", highlight=False, markup=False, soft_wrap=True)
    hint = f'use it: nacre.from_pretrained("{sent["name"]}"), or `hf:{sent["name"]}` in commands'
    screen.print(hint, highlight=False, markup=False, soft_wrap=True)
