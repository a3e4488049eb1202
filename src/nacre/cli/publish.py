"""Give to others: to the hub, to other engines."""

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


@app.command()
def export(
    checkpoint: Annotated[
        str, typer.Argument(metavar="CKPT", help="A stage, a run, a Hugging Face folder.")
    ],
    to: Annotated[Path, typer.Option(metavar="FOLDER", help="A new folder.")],
    target: Annotated[str, typer.Option("--as", help="single, onnx or gguf.")] = "single",
    converter: Annotated[
        Path | None, typer.Option(help="gguf: llama.cpp's convert_hf_to_gguf.py.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a checkpoint for other engines: one file of weights, ONNX, GGUF.

    nacre export runs/novels --to novels --as single

    nacre export runs/novels --to novels-gguf --as gguf --converter llama.cpp/convert_hf_to_gguf.py
    """
    from nacre.export import export as write
    from nacre.numbers import size

    quiet_transformers()
    done = write(checkpoint, to, target, converter=converter)
    if as_json:
        emit(done)
    else:
        files = f"{len(done['files'])} files, {size(sum(done['files'].values()))}"
        screen.print(f"{to}: {files}", highlight=False, markup=False, soft_wrap=True)
