"""Continue a text with a model."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from nacre.cli.console import Json, app, brief, emit, quiet_transformers
from nacre.errors import ConfigError, Problem


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A stage, any Hugging Face folder, a run, or a composition.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")] = "",
    depths: Annotated[
        bool, typer.Option("--depths", help="Continue with every stage of the run, side by side.")
    ] = False,
    weights_trace: Annotated[
        bool,
        typer.Option(
            "--weights-trace",
            help="Of a composition: who carried each token, in colours, or JSON in a pipe.",
        ),
    ] = False,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="Default: 100, or what the model's context has room for.")
    ] = None,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = 50,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Continue a text, as it is made, or at every depth side by side."""
    from nacre import generation as texts
    from nacre.train.interruption import memory_advice

    quiet_transformers()
    sampling = texts.Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    if depths and weights_trace:
        problem = Problem("--weights-trace", "does not go with --depths", "leave one of them out")
        raise ConfigError(problem)
    with memory_advice(str(checkpoint)):
        if weights_trace:
            _traced(texts.trace(checkpoint, prompt, sampling), prompt, as_json)
        elif depths:
            _side_by_side(texts.generate_at_depths(checkpoint, prompt, sampling), prompt, as_json)
        else:
            _written(texts.generate(checkpoint, prompt, sampling), prompt, as_json)


def _traced(trace: Sequence[Mapping[str, Any]], prompt: str, as_json: bool) -> None:
    from nacre.generation import painted

    console = Console()
    if as_json or not console.is_terminal:
        emit({"prompt": prompt, "text": "".join(t["text"] for t in trace), "trace": trace})
    else:
        console.print(painted(prompt, trace), soft_wrap=True)


def _side_by_side(
    continued: Iterable[tuple[dict[str, Any], str]], prompt: str, as_json: bool
) -> None:
    from nacre import tables

    if as_json:
        stages = [{**brief(record), "text": text} for record, text in continued]
        emit({"prompt": prompt, "stages": stages})
    else:
        Console().print(tables.side_by_side(prompt, list(continued)))


def _written(pieces: Iterable[str], prompt: str, as_json: bool) -> None:
    if as_json:
        emit({"prompt": prompt, "text": "".join(pieces)})
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")
