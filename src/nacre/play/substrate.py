"""The tab *Substrate*: tokens as the model sees them, their nearest, and a map of all rows.

Shapes: V tokens, D width, S side of a picture.
"""

from __future__ import annotations

import base64
import html
import io
import json
import unicodedata
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from safetensors import SafetensorError
from safetensors.numpy import load_file
from transformers import PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.composition import is_composition, read_record
from nacre.errors import ConfigError, Problem
from nacre.models import stock
from nacre.play.grow import check_length
from nacre.play.markup import quoted
from nacre.play.shown import Method
from nacre.substrate import Substrate, SubstrateRecipe, basis, glyphs, show
from nacre.tokenizer import TokenString
from nacre.train import checkpoint, files

MOST_TOKENS = 64  # of a text, drawn one by one
MOST_POINTS = 20_000  # of a map
SCRIPTS = 7  # that have a colour of their own
NEAREST = 12


def load(path: Path) -> tuple[Substrate, PreTrainedTokenizerBase]:
    """Return the substrate of a run, checkpoint or composition (its first expert's), and tokenizer.

    A run's own, where it keeps one; else the input embedding, with the recipe that the checkpoint
    records: `trained` where it has none. Raises as `Substrate.load` and `load_model` do.
    """
    if is_composition(path):
        path = path / read_record(path)["experts"][0]["path"]
    folder = Path(checkpoint.newest(path))
    tokenizer = tokenizers.load(folder)
    if (path / "substrate").is_dir():
        return Substrate.load(path / "substrate"), tokenizer
    about = folder / "substrate.json"
    recorded = files.read_json(about) if about.is_file() else {}
    recipe = SubstrateRecipe.model_validate(recorded.get("recipe", {"kind": "trained"}))
    rows = _embedding(folder)
    strings = tokenizers.token_strings(tokenizer)[: len(rows)]
    substrate = Substrate(
        recipe=recipe,
        width=rows.shape[1],
        tokens=tuple(strings),
        rows=rows[: len(strings)],
        fingerprint=recorded.get("fingerprint", ""),
        report=recorded.get("report", {"tokens": len(strings)}),
        source=recorded.get("source", {}),
    )
    return substrate, tokenizer


def _embedding(folder: Path) -> np.ndarray[Any, Any]:
    """Return the rows of a checkpoint's input embedding, float32 `[V, D]`."""
    shard = folder / checkpoint.SUBSTRATE_SHARD
    try:
        tensors = list(load_file(shard).values()) if shard.is_file() else []
    except (SafetensorError, OSError):
        tensors = []
    if len(tensors) == 1:
        return tensors[0].astype(np.float32)
    embedding = stock.find_parts(checkpoint.load_model(folder)).embedding
    return embedding.weight.detach().float().numpy()


def summary(substrate: Substrate) -> str:
    """Say in a line what the substrate is."""
    recipe = substrate.recipe
    kind = {
        "glyph": "A token's row is made from its picture alone",
        "code": "A token's row is its number in binary",
        "random": "A token's row is noise, drawn once",
        "trained": "Rows were trained",
    }[recipe.kind]
    size = f"{len(substrate.tokens):,} tokens, {substrate.width} numbers each"
    return f"{kind}. {size}, the same ones at every depth."


def drawn(substrate: Substrate, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
    """Return the tokens of a text as the model sees them, beside what their rows keep.

    Raises ConfigError for no text, one that is too long, or rows that are no pictures.
    """
    check_length(text, "The text")
    tokenizers.check_text(text, "The text")
    ids = tokenizer(text)["input_ids"]
    if not ids:
        raise ConfigError(Problem("The text", "there is none", "type some"))
    figures = [_figure(substrate, substrate.tokens[index], index) for index in ids[:MOST_TOKENS]]
    left = len(ids) - len(figures)
    more = f'<p class="note">{left} more tokens are not drawn.</p>' if left > 0 else ""
    return f'<ul class="glyphs">{"".join(figures)}</ul>{more}'


def _figure(substrate: Substrate, token: TokenString, index: int) -> str:
    name = html.escape(_named(token))
    seen = show.picture(token, substrate.width, substrate.recipe)
    pictures = _image(seen, f"{name} as it is drawn")
    if substrate.recipe.fit == "unifont":
        kept = show.reconstruction(token, substrate.width, substrate.recipe)
        pictures += _image(kept, f"{name}, what its row keeps")
    return (
        f"<li>{pictures}<b>{name}</b><span>{html.escape(code_points(token))} · {index}</span></li>"
    )


def _image(picture_SS: np.ndarray[Any, Any], text: str) -> str:
    """Return a picture as an `<img>`: ink is black, the style sheet turns it round in the dark."""
    buffer = io.BytesIO()
    Image.fromarray(255 - picture_SS).save(buffer, format="PNG")
    data = base64.b64encode(buffer.getvalue()).decode("ascii")
    return f'<img class="glyph" src="data:image/png;base64,{data}" alt="{text}">'


def _named(token: TokenString) -> str:
    if isinstance(token, bytes):
        text = token.decode("ascii", "replace")
        return text if text.isprintable() and len(token) > 1 else f"byte {token.hex().upper()}"
    return quoted(token)


def code_points(token: TokenString) -> str:
    """Return a token's code points, `U+0041`, the first four of many; of bytes how many."""
    if isinstance(token, bytes):
        return f"{len(token)} byte{'s' if len(token) > 1 else ''}"
    points = [f"U+{ord(char):04X}" for char in token[:4]]
    return " ".join(points) + (" …" if len(token) > 4 else "")


def nearest(substrate: Substrate, token: str) -> str:
    """Return the tokens whose rows are nearest to those of any string, with their cosines.

    Raises ConfigError for no string, and for one outside the vocabulary of rows that no string has.
    """
    check_length(token, "The string")
    if not token:
        raise ConfigError(Problem("The string", "there is none", "type one or more characters"))
    found = show.nearest(substrate, token, NEAREST)
    items = "".join(
        f"<li>{_seen(substrate, other)}<b>{html.escape(_named(other))}</b>"
        f"<span>{cosine:.3f} · {html.escape(code_points(other))}</span></li>"
        for _, other, cosine in found
    )
    return f'<ol class="glyphs near">{items}</ol>'


def _seen(substrate: Substrate, token: TokenString) -> str:
    if substrate.recipe.kind != "glyph":
        return ""
    return _image(show.picture(token, substrate.width, substrate.recipe), "")


def places(rows_VD: np.ndarray[Any, Any], method: Method) -> np.ndarray[Any, Any]:
    """Return where each row stands on the map, float64 `[V, 2]`, both axes from 0 to 1.

    PCA: the two directions in which the rows differ most. UMAP keeps neighbours together instead.
    """
    if method == "UMAP":
        import umap  # pyright: ignore[reportMissingImports]

        found_V2 = umap.UMAP(random_state=0).fit_transform(rows_VD)
    else:
        centered_VD = rows_VD.astype(np.float64) - rows_VD.mean(0)
        _, directions_DD = np.linalg.eigh(centered_VD.T @ centered_VD)
        found_V2 = centered_VD @ directions_DD[:, :-3:-1]
    low, high = np.percentile(found_V2, [0.1, 99.9], axis=0)
    return np.clip((found_V2 - low) / np.where(high > low, high - low, 1), 0, 1)


def script(token: TokenString) -> str:
    """Return the script of a token's first letter, in words; what it is where it has none."""
    if isinstance(token, bytes):
        return "bytes, special"
    text = token.strip() or token
    letter = next((char for char in text if char.isalpha()), text[0])
    kind = unicodedata.category(letter)[0]
    if kind == "L":
        return unicodedata.name(letter, "other").split()[0].split("-")[0].capitalize()
    return {"N": "digits", "Z": "blanks", "C": "blanks"}.get(kind, "signs")


def map_of(substrate: Substrate, method: Method) -> str:
    """Return the map: points coloured by script, whose glyphs and code points the pointer shows.

    The arrow keys go from point to point. The page's own script draws it from the data inside.
    """
    step = -(-len(substrate.tokens) // MOST_POINTS)
    strings = substrate.tokens[::step]
    found_V2 = places(substrate.rows[::step], method)
    scripts = [script(token) for token in strings]
    often = [name for name, _ in Counter(scripts).most_common(SCRIPTS)]
    named = [*often, *(["other"] if len(set(scripts)) > len(often) else [])]
    side = min(basis.side_for(min(substrate.width, 1024)), 32)
    data = {
        "x": np.rint(found_V2[:, 0] * 4095).astype(int).tolist(),
        "y": np.rint(found_V2[:, 1] * 4095).astype(int).tolist(),
        "script": [named.index(s if s in often else "other") for s in scripts],
        "scripts": named,
        "name": [_named(token) for token in strings],
        "points": [code_points(token) for token in strings],
        "side": side,
        "glyphs": _bits(strings, side),
    }
    about = f"{len(strings):,} tokens on a map by {method}, coloured by script"
    packed = html.escape(json.dumps(data, ensure_ascii=True, separators=(",", ":")))
    return f'<figure class="map" data-about="{about}" data-map="{packed}"></figure>'


def _bits(strings: Sequence[TokenString], side: int) -> str:
    """Return all pictures, one bit a pixel, `[V, S, S]` packed row by row, in base 64."""
    pictures = np.repeat(glyphs.draw(list(strings), side)[0], side // 16, axis=1) > 127
    packed = np.packbits(pictures.reshape(len(strings), -1), axis=1)
    return base64.b64encode(packed.tobytes()).decode("ascii")
