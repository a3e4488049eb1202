"""What a substrate is: its recipe, rows and fingerprint; how it is made, saved and refused.

A substrate maps each token of a vocabulary to a fixed vector. It is never trained (but for the
control `trained`, in the first stage only). Its fingerprint covers recipe, token strings and the
bytes of the rows: two substrates with the same fingerprint are the same.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import safetensors
import safetensors.numpy
from pydantic import BaseModel, ConfigDict, Field

from nacre.errors import CheckpointError, ConfigError, FingerprintError, Problem
from nacre.substrate import basis, codes, glyphs
from nacre.substrate.fonts import FontPen, font_hash
from nacre.substrate.glyphs import CHUNK, Picture, TokenString
from nacre.untrusted import read_json

FORMAT = 1
"""Version of the files a substrate is saved as, and of what its fingerprint covers."""

ROWS, ABOUT = "substrate.safetensors", "substrate.json"

Progress = Callable[[int], None]

EFFECTIVE: dict[str, tuple[str, ...]] = {
    "glyph": ("kind", "fit", "font"),
    "code": ("kind", "bits", "lift", "recode"),
    "random": ("kind", "seed"),
    "trained": ("kind", "seed"),
}
"""The fields of a recipe that matter for each kind; others have no effect, nor a fingerprint."""


class SubstrateRecipe(BaseModel):
    """How to make a substrate. Fields a kind does not use have no effect on it (`EFFECTIVE`).

    kind: `glyph` draws the token's string; `code` is the token id in binary; `random` is seeded
        noise; `trained` starts as `random` and trains in the first stage.
    fit (glyph): `unifont` is the fixed basis, the same rows in every vocabulary; `vocabulary` is
        the papers' way, PCA on the vocabulary's own pictures.
    font (glyph): a TTF or OTF file to draw with instead of Unifont.
    bits (code): bits of the code; by default 16 where they fit, else the fewest that do.
    lift (code): how bits fill the width, see `codes.code_rows`.
    recode (code): seed of an affine bijection over GF(2) of the ids; none by default.
    seed (random, trained): seed of the noise.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")

    kind: Literal["glyph", "code", "random", "trained"] = "glyph"
    fit: Literal["unifont", "vocabulary"] = "unifont"
    font: Path | None = None
    bits: int | None = Field(default=None, ge=1, le=62)
    lift: Literal["repeat_interleave", "tile"] = "repeat_interleave"
    recode: int | None = Field(default=None, ge=0)
    seed: int = Field(default=0, ge=0)


@dataclass(frozen=True, eq=False)
class Substrate:
    """A frozen token -> vector table.

    `rows` is a read-only float32 array [V, D]; `tokens[i]` is the string of row i; `fingerprint` is
    a SHA-256 in hex. `report` counts the tokens and, for glyphs, how their rows came about: drawn
    `unique`, `look_alike`, `several` characters, `glyphless`, and how many are `signed` (all but
    the unique). `source` is what else the rows were made from, for the fingerprint.
    """

    recipe: SubstrateRecipe
    width: int
    tokens: tuple[TokenString, ...]
    rows: np.ndarray
    fingerprint: str
    report: dict[str, int]
    source: dict[str, Any]

    @property
    def trainable(self) -> bool:
        """Whether the first stage trains the rows."""
        return self.recipe.kind == "trained"

    @classmethod
    def build(
        cls,
        recipe: SubstrateRecipe,
        tokens: Sequence[TokenString],
        width: int,
        progress: Progress | None = None,
    ) -> Substrate:
        """Make the substrate of a vocabulary; `progress` is called with tokens done since last.

        Raises ConfigError if the recipe cannot be made at this width or vocabulary.
        """
        check_recipe(recipe, len(tokens), width)
        if len(set(tokens)) != len(tokens):
            twice = next(token for token, count in Counter(tokens).items() if count > 1)
            message = f"the token {twice!r} stands in the vocabulary more than once"
            raise ConfigError(Problem("tokens", message, "a token's string must be its own"))
        kinds = None
        if recipe.kind == "glyph":
            rows, kinds = make_rows(recipe, tokens, width, progress)
        elif recipe.kind == "code":
            bits = codes.code_bits(recipe.bits, len(tokens), width)
            rows = codes.code_rows(len(tokens), width, bits, recipe.lift, recipe.recode)
        else:
            rows = codes.random_rows(len(tokens), width, recipe.seed)
        if progress and kinds is None:
            progress(len(tokens))
        if twins := find_duplicate(rows):
            first, second = (tokens[number] for number in twins)
            message = f"{width} is too few: the tokens {first!r} and {second!r} share a row"
            raise ConfigError(Problem("width", message, "use a larger one"))
        rows.setflags(write=False)
        source = _source(recipe, len(tokens), width)
        return cls(
            recipe=recipe,
            width=width,
            tokens=tuple(tokens),
            rows=rows,
            fingerprint=fingerprint(source, width, tokens, rows),
            report=_report(len(tokens), kinds),
            source=source,
        )

    def save(self, folder: Path | str) -> None:
        """Write `substrate.safetensors` (tensor "rows") and `substrate.json`, each atomically."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        about = {
            "format": FORMAT,
            "fingerprint": self.fingerprint,
            "recipe": self.recipe.model_dump(mode="json"),
            "source": self.source,
            "width": self.width,
            "report": self.report,
            "tokens": [
                token if isinstance(token, str) else {"bytes": token.hex()} for token in self.tokens
            ],
        }
        with _replacing(folder / ROWS) as temporary:
            header = {"fingerprint": self.fingerprint}
            safetensors.numpy.save_file({"rows": self.rows}, temporary, header)
        with _replacing(folder / ABOUT) as temporary:
            temporary.write_text(json.dumps(about), encoding="ascii")

    @classmethod
    def load(cls, folder: Path | str) -> Substrate:
        """Read a saved substrate and verify its fingerprint.

        Raises CheckpointError if files are missing or broken, FingerprintError if what they hold is
        not what was saved.
        """
        folder = Path(folder)
        for name in (ROWS, ABOUT):
            if not (folder / name).is_file():
                raise CheckpointError(f"{folder}: no {name} here, so this is no saved substrate")
        try:
            about = read_json(folder / ABOUT)
            if about["format"] != FORMAT:
                message = f"has format {about['format']}, this nacre reads format {FORMAT}"
                raise CheckpointError(f"{folder / ABOUT}: {message}")
            tokens = tuple(
                token if isinstance(token, str) else bytes.fromhex(token["bytes"])
                for token in about["tokens"]
            )
            recipe = SubstrateRecipe.model_validate(about["recipe"])
            stated, width, source = about["fingerprint"], int(about["width"]), about["source"]
            report = dict(about["report"])
            if not _agree(recipe, source):
                raise ValueError("recipe and source disagree")
        except (
            OSError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError,
        ) as error:  # fmt: skip
            reason = f"missing {error}" if isinstance(error, KeyError) else str(error)
            raise CheckpointError(f"{folder / ABOUT}: damaged ({reason})") from None
        try:
            rows = safetensors.numpy.load_file(folder / ROWS)["rows"]
        except (safetensors.SafetensorError, KeyError, OSError) as error:
            raise CheckpointError(f"{folder / ROWS}: damaged ({error})") from None
        if rows.dtype != np.float32 or rows.shape != (len(tokens), width):
            message = f"rows are {rows.dtype} {rows.shape}, not float32 {(len(tokens), width)}"
            raise CheckpointError(f"{folder / ROWS}: {message}")
        found = fingerprint(source, width, tokens, rows)
        if found != stated:
            fix = "the files were changed after saving; build the substrate again"
            raise FingerprintError(f"{folder}: substrate", stated, found, fix)
        rows.setflags(write=False)
        return cls(recipe, width, tokens, rows, stated, report, source)


def check_recipe(recipe: SubstrateRecipe, vocabulary: int, width: int) -> None:
    """Raise ConfigError, with every problem, if a substrate cannot be made so; makes nothing."""
    problems: list[Problem] = []
    if vocabulary < 1:
        problems.append(Problem("tokens", "the vocabulary is empty", "give at least one token"))
    if width < 1:
        problems.append(Problem("width", f"{width} is no width", "use at least 1"))
    largest = basis.SIDES[-1] ** 2
    if recipe.kind == "glyph" and width > largest:
        message = f"{width} is more than the {largest} numbers a glyph row can have"
        problems.append(Problem("width", message, "substrate.kind: code has no such limit"))
    if recipe.kind == "code" and not problems:
        codes.code_bits(recipe.bits, vocabulary, width)
    if recipe.kind == "glyph" and recipe.font is not None:
        try:
            FontPen(recipe.font, basis.SIDES[0])
        except ConfigError as error:
            problems.extend(error.problems)
    if problems:
        raise ConfigError(problems)


def make_rows(
    recipe: SubstrateRecipe,
    tokens: Sequence[TokenString],
    width: int,
    progress: Progress | None = None,
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows of a glyph recipe, float32 [V, D], and the tokens' `Picture`s, int [V]."""
    if recipe.font is None and recipe.fit == "unifont":
        return glyphs.glyph_rows(tokens, width, progress)
    side = basis.side_for(width)
    pen = FontPen(recipe.font, side) if recipe.font is not None else None
    drawn = []
    for start in range(0, len(tokens), CHUNK):
        part = tokens[start : start + CHUNK]
        drawn.append(pen.draw(part) if pen else glyphs.draw(part, side))
        if progress:
            progress(len(part))
    pictures = np.concatenate([part for part, _ in drawn])
    kinds = np.concatenate([part for _, part in drawn])
    if recipe.fit == "vocabulary":
        raw = basis.principal(pictures, kinds != Picture.GLYPHLESS, width)
        return glyphs.mix(raw, kinds, tokens), kinds
    fixed = glyphs.table().bases[side]
    rows = np.empty((len(tokens), width), np.float32)
    for start in range(0, len(tokens), CHUNK):
        part = slice(start, start + CHUNK)
        raw = fixed.project(pictures[part], width)
        rows[part] = glyphs.mix(raw, kinds[part], tokens[part])
    return rows, kinds


def fingerprint(
    source: dict[str, Any], width: int, tokens: Sequence[TokenString], rows: np.ndarray
) -> str:
    """Return the SHA-256, in hex, of everything that makes a substrate what it is.

    Covers the canonical JSON of `source` and width, each token's length and canonical key, and the
    rows as little-endian float32.
    """
    about = json.dumps({"width": width, **source}, sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(b"nacre substrate\0" + _sized(about.encode()))
    digest.update(len(tokens).to_bytes(8, "little"))
    digest.update(b"".join(_sized(glyphs.key(token)) for token in tokens))
    digest.update(np.ascontiguousarray(rows, "<f4").data)
    return digest.hexdigest()


def _sized(data: bytes) -> bytes:
    return len(data).to_bytes(8, "little") + data


def _source(recipe: SubstrateRecipe, vocabulary: int, width: int) -> dict[str, Any]:
    """Return what identifies a recipe: its effective fields, a font by its bytes."""
    source = recipe.model_dump(mode="json", include=set(EFFECTIVE[recipe.kind]))
    source["format"] = FORMAT
    if recipe.kind == "code":
        source["bits"] = codes.code_bits(recipe.bits, vocabulary, width)
    if recipe.kind == "glyph":
        source["font"] = (
            font_hash(recipe.font) if recipe.font else f"unifont {glyphs.table().version}"
        )
    return source


def _agree(recipe: SubstrateRecipe, source: dict[str, Any]) -> bool:
    """Say whether a saved recipe is the one the (fingerprinted) source was made from."""
    stated = recipe.model_dump(mode="json", include=set(EFFECTIVE[recipe.kind]))
    if recipe.kind == "glyph":
        stated["font"] = source["font"]
        if (recipe.font is None) != source["font"].startswith("unifont "):
            return False
    if recipe.kind == "code" and recipe.bits is None:
        stated["bits"] = source["bits"]
    return source == {**stated, "format": FORMAT}


def _report(vocabulary: int, kinds: np.ndarray | None) -> dict[str, int]:
    report = {"tokens": vocabulary}
    if kinds is not None:
        report |= {kind.name.lower(): int((kinds == kind).sum()) for kind in Picture}
        report["signed"] = vocabulary - report["unique"]
    return report


def find_duplicate(rows: np.ndarray) -> tuple[int, int] | None:
    """Return the numbers of two equal rows of a float32 array [V, D], or None if all differ."""
    words = np.ascontiguousarray(rows).view(np.uint32)
    weights = np.random.PCG64(0).random_raw(words.shape[1]) | np.uint64(1)
    hashes = np.empty(len(words), np.uint64)
    for start in range(0, len(words), CHUNK):
        part = words[start : start + CHUNK].astype(np.uint64)
        hashes[start : start + CHUNK] = (part * weights).sum(axis=1, dtype=np.uint64)
    first: dict[bytes, int] = {}
    values, counts = np.unique(hashes, return_counts=True)
    for number in np.flatnonzero(np.isin(hashes, values[counts > 1])).tolist():
        other = first.setdefault(words[number].tobytes(), number)
        if other != number:
            return other, number
    return None


@contextmanager
def _replacing(path: Path) -> Iterator[Path]:
    """Give a temporary name to write to; put the file in place once it is whole and on disk."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        yield temporary
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)
