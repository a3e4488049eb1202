"""Build a substrate or a tokenizer by itself, and look at it."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nacre.cli.console import ErrorPolicy, Json, Sources, app, emit, quiet_transformers, screen
from nacre.errors import ConfigError, Problem

substrate_app = typer.Typer(no_args_is_help=True, help="Build and look at frozen substrates.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Build lossless Unicode tokenizers.")
app.add_typer(substrate_app, name="substrate")
app.add_typer(tokenizer_app, name="tokenizer")


@substrate_app.command("build")
def build_substrate(
    tokenizer: Annotated[str, typer.Argument(help="A tokenizer: a folder, or hf:NAME.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    width: Annotated[int, typer.Option(help="Dimensions of a row.")] = 256,
    kind: Annotated[str, typer.Option(help="glyph, code, random or trained.")] = "glyph",
    fit: Annotated[
        str, typer.Option(help="glyph: the basis of `unifont`, or `vocabulary`.")
    ] = "unifont",
    font: Annotated[Path | None, typer.Option(help="glyph: another TTF or OTF.")] = None,
    as_json: Json = False,
) -> None:
    """Make the substrate of a tokenizer's vocabulary."""
    from nacre import config, tables
    from nacre import tokenizer as tokenizers
    from nacre.substrate import Substrate, SubstrateRecipe
    from nacre.substrate.table import EFFECTIVE
    from nacre.terminal import Display
    from nacre.train import files

    quiet_transformers()
    data = {"kind": kind, "fit": fit, "font": font}
    recipe = config.validate(SubstrateRecipe, data, where="substrate")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(Problem("--out", f"{out} is not empty", "name a new folder"))
    for name in ("fit", "font"):
        if name not in EFFECTIVE[recipe.kind] and data[name] not in (None, "unifont"):
            screen.print(f"[yellow]warning:[/] --{name} has no effect with --kind {recipe.kind}")
    tokens = tokenizers.token_strings(tokenizers.load(tokenizer))
    with Display(screen) as display:
        display.phase("Substrate", len(tokens))
        substrate = Substrate.build(recipe, tokens, width, display.advance)
    with files.new_folder(out) as partial:
        substrate.save(partial)
    about = {"fingerprint": substrate.fingerprint, "width": width, **substrate.report}
    if as_json:
        emit(about)
    else:
        Console().print(tables.facts(about))


@substrate_app.command("show")
def show_substrate(
    token: Annotated[str, typer.Argument(help="Any string.")],
    substrate: Annotated[
        Path | None, typer.Option(help="A saved substrate: also shows the nearest rows.")
    ] = None,
    width: Annotated[int, typer.Option(help="Dimensions, when no substrate is named.")] = 256,
    png: Annotated[Path | None, typer.Option(help="Also write the picture as a PNG.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many nearest rows.")] = 8,
) -> None:
    """Draw a token as the model sees it, and what its row keeps of the picture."""
    from nacre import substrate as substrates

    if png is not None and not png.parent.is_dir():
        raise ConfigError(Problem("--png", f"there is no folder {png.parent}"))
    table = substrates.Substrate.load(substrate) if substrate else None
    recipe, width = (table.recipe, table.width) if table else (None, width)
    seen = substrates.picture(token, width, recipe)
    print(substrates.blocks(seen, ansi=sys.stdout.isatty()))
    if png is not None:
        substrates.save_png(seen, png)
    if table is not None:
        for number, near, cosine in substrates.nearest(table, token, count):
            print(f"{cosine:7.4f}  {number:7d}  {near!r}")


@tokenizer_app.command("build")
def build_tokenizer(
    data: Sources = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("tokenizer"),
    size: Annotated[int, typer.Option(help="Vocabulary size, 512 to 131,072.")] = 4096,
    alphabet: Annotated[
        str, typer.Option(help="Code points: of the `corpus`, or `bmp`.")
    ] = "corpus",
    errors: ErrorPolicy = "strict",
    as_json: Json = False,
) -> None:
    """Learn a lossless tokenizer from text; `AutoTokenizer` loads it."""
    from nacre import config, tables
    from nacre import tokenizer as tokenizers
    from nacre.data import corpus, sample
    from nacre.growth.plan import Data, Tokenizer
    from nacre.terminal import Display
    from nacre.train import files

    quiet_transformers()
    options = config.validate(Tokenizer, {"size": size, "alphabet": alphabet}, where="tokenizer")
    source = config.validate(Data, {"sources": data or ["default"], "errors": errors}, where="data")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(Problem("--out", f"{out} is not empty", "name a new folder"))
    with Display(screen) as display:
        display.phase("Tokenizer", corpus.check(source.sources).total_bytes)
        texts = sample(source.sources, errors=source.errors)
        tokenizer = tokenizers.build(
            texts, options.size, alphabet=options.alphabet, progress=display.advance
        )
    with files.new_folder(out) as partial:
        tokenizer.save_pretrained(partial)
    about = {"size": len(tokenizer), "fingerprint": tokenizers.fingerprint(tokenizer)}
    if as_json:
        emit(about)
    else:
        Console().print(tables.facts(about))
