"""Draw strings with GNU Unifont and turn each into a row: a pure function of string and width.

The shipped table holds one bitmap of 8x16 or 16x16 pixels for every character Unifont draws. A
string's characters stand side by side; a combining mark overlays what it follows; a character
without a glyph takes no room. The line is stretched to a square by exact area averaging, as in the
papers (arXiv 2507.07129, 2507.04886), and projected on the fixed basis (`basis`).

Strings that have no picture, or may share one with another string, carry a signature: odd numbers
out of a hash of the string. So no two tokens share a row, whatever the vocabulary.

Shapes: N tokens, S side, D width, P pixels across, G glyphs; a raster has 16 lines.
"""

from __future__ import annotations

import hashlib
import json
import lzma
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from functools import cache
from importlib import resources

import numpy as np

from nacre.substrate.basis import SIDES, Basis, side_for

TokenString = str | bytes
"""A vocabulary's entry: text, which is drawn, or bytes (no text), which are hashed."""

LINES = 16
"""Lines of a Unifont bitmap."""

CHUNK = 1024
"""Tokens drawn and projected at a time; bounds memory."""

SIGNATURE_SHARE = 4
"""A signature is one part in this many of the length of the picture's row beside it."""

_SHARE_BITS = 12


class Picture(IntEnum):
    """How a token's row comes about."""

    UNIQUE = 0  # one character whose bitmap no other has: the picture alone
    LOOK_ALIKE = 1  # one character whose bitmap others have too: picture and signature
    SEVERAL = 2  # several characters: picture and signature
    GLYPHLESS = 3  # nothing to draw: the signature alone


@dataclass(frozen=True, eq=False)
class GlyphTable:
    """The shipped bitmaps. `index` maps a character to its place in the arrays, each [G, ...].

    `bits` uint8 [G, 16, 2]: eight pixels a byte, highest bit left (narrow ones use the first byte);
    `cells` 1 or 2: width in units of 8 pixels; `back`: units a combining mark moves back, else 0;
    `shared`: the bitmap, stretched to 16x16, belongs to other characters too; `blank`: no ink.
    `bases`: the fixed basis for each side.
    """

    version: str
    index: dict[str, int]
    bits: np.ndarray
    cells: np.ndarray
    back: np.ndarray
    shared: np.ndarray
    blank: np.ndarray
    bases: dict[int, Basis]


DATA = "unifont.xz"
"""Name of the shipped table: xz over one line of JSON and the arrays it describes."""


@cache
def table() -> GlyphTable:
    """Return the shipped table, read once."""
    return unpack(resources.files("nacre.substrate").joinpath(DATA).read_bytes())


def unpack(packed: bytes) -> GlyphTable:
    """Read a table written by `tools/build_unifont.py`."""
    header, _, body = lzma.decompress(packed).partition(b"\n")
    meta = json.loads(header)
    arrays: dict[str, np.ndarray] = {}
    start = 0
    for name, dtype, shape in meta["arrays"]:
        size = int(np.prod(shape))
        arrays[name] = np.frombuffer(body, dtype, size, start).reshape(shape)
        start += size * np.dtype(dtype).itemsize
    points = np.cumsum(arrays["steps"], dtype=np.int64)
    kinds = arrays["kinds"]
    # Stored line by line over all glyphs, each half apart: that is what compresses well.
    bits = np.ascontiguousarray(arrays["bits"].transpose(2, 1, 0))
    return GlyphTable(
        version=meta["version"],
        index={chr(point): place for place, point in enumerate(points.tolist())},
        bits=bits,
        cells=(kinds & 3).astype(np.intp),
        back=(kinds >> 2 & 3).astype(np.intp),
        shared=(kinds >> 4 & 1).astype(bool),
        blank=np.logical_not(bits.reshape(len(bits), -1).any(axis=1)),
        bases={
            side: Basis(
                mean=np.repeat(arrays["mean"], side // LINES, axis=1),
                down=arrays[f"down{side}"],
                across=arrays[f"across{side}"],
                order=arrays[f"order{side}"].astype(np.intp),
            )
            for side in SIDES
        },
    )


def key(token: TokenString) -> bytes:
    """Return the canonical bytes of a token: a tag for its kind, then its UTF-8 or its bytes."""
    if isinstance(token, str):
        return b"s" + token.encode("utf-8", "surrogatepass")
    return b"b" + bytes(token)


def signature(token: TokenString, width: int) -> np.ndarray:
    """Return `width` odd whole numbers in -255..255 from SHAKE-128 of the token, float64 [D]."""
    stream = hashlib.shake_128(b"nacre signature 1\0" + key(token)).digest(width)
    return np.frombuffer(stream, np.uint8).astype(np.float64) * 2 - 255


def draw(tokens: Sequence[TokenString], side: int) -> tuple[np.ndarray, np.ndarray]:
    """Return the pictures, uint8 [N, 16, S] (0 paper, 255 ink), and their `Picture`s, int [N].

    A line stands for S / 16 equal lines of the square. A glyphless token's picture is blank.
    """
    glyphs = table()
    kinds = np.full(len(tokens), Picture.GLYPHLESS, dtype=np.int64)
    pictures = np.zeros((len(tokens), LINES, side), np.uint8)
    groups: dict[int, list[tuple[int, list[int], list[int]]]] = defaultdict(list)
    for number, token in enumerate(tokens):
        if isinstance(token, bytes):
            continue
        places, starts, cells = _lay_out(token, glyphs)
        if not places or glyphs.blank[places].all():
            continue
        if len(token) > 1:
            kinds[number] = Picture.SEVERAL
        else:
            shared = glyphs.shared[places[0]]
            kinds[number] = Picture.LOOK_ALIKE if shared else Picture.UNIQUE
        groups[cells].append((number, places, starts))
    for cells, members in groups.items():
        step = max(1, (1 << 15) // cells)  # bounds memory for long strings
        for first in range(0, len(members), step):
            part = members[first : first + step]
            pictures[[number for number, _, _ in part]] = _rasters(part, cells, side, glyphs)
    return pictures, kinds


def _lay_out(text: str, glyphs: GlyphTable) -> tuple[list[int], list[int], int]:
    """Return each glyph's place in the table, its first cell, and the cells of the whole line."""
    places, starts = [], []
    pen = 0
    for character in text:
        place = glyphs.index.get(character)
        if place is None:
            continue
        back = int(glyphs.back[place])
        start = max(pen - back, 0) if back and pen else pen
        places.append(place)
        starts.append(start)
        pen = max(pen, start + int(glyphs.cells[place]))
    return places, starts, pen


def _rasters(
    members: list[tuple[int, list[int], list[int]]], cells: int, side: int, glyphs: GlyphTable
) -> np.ndarray:
    """Return the pictures of strings that are all `cells` wide, uint8 [N, 16, S]."""
    packed = np.zeros((len(members), LINES, cells), np.uint8)
    for turn in range(max(len(places) for _, places, _ in members)):
        having = np.array([row for row, member in enumerate(members) if len(member[1]) > turn])
        places = np.array([members[row][1][turn] for row in having])
        starts = np.array([members[row][2][turn] for row in having])
        packed[having, :, starts] |= glyphs.bits[places, :, 0]
        wide = glyphs.cells[places] == 2
        packed[having[wide], :, starts[wide] + 1] |= glyphs.bits[places[wide], :, 1]
    return stretch(np.unpackbits(packed, axis=2) * np.uint8(255), side)


def stretch(lines_NHP: np.ndarray, side: int) -> np.ndarray:
    """Resample the last axis of grey levels, uint8 [N, H, P] -> [N, H, S], by exact area averages.

    A new pixel is the average of the stretch it covers, rounded half up.
    """
    count, height, pixels = lines_NHP.shape
    if side % pixels == 0:
        return np.repeat(lines_NHP, side // pixels, axis=2)
    # In units of 1 / (side * pixels) of the line: old pixels are `side` long, new ones `pixels`.
    old, new = np.arange(pixels) * side, np.arange(side) * pixels
    shared_PS = np.minimum.outer(old + side, new + pixels) - np.maximum.outer(old, new)
    weights_PS = np.maximum(shared_PS, 0).astype(np.float64)
    sums = lines_NHP.reshape(-1, pixels).astype(np.float64) @ weights_PS
    grey = np.floor((2 * sums + pixels) / (2 * pixels))
    return grey.astype(np.uint8).reshape(count, height, side)


def mix(
    coefficients_ND: np.ndarray, kinds: np.ndarray, tokens: Sequence[TokenString]
) -> np.ndarray:
    """Add signatures where `kinds` asks for them and scale to unit length: float32 [N, D].

    Takes over `coefficients_ND`. They are whole numbers; so is every step up to one square root and
    one division, each correctly rounded, hence the result does not depend on the machine.
    """
    rows, width = coefficients_ND, coefficients_ND.shape[1]
    rows[kinds == Picture.GLYPHLESS] = 0
    length = np.floor(np.sqrt(_squares(rows)))
    signed = np.flatnonzero((kinds != Picture.UNIQUE) | (length == 0))
    for start in range(0, len(signed), CHUNK):
        part = signed[start : start + CHUNK]
        marks = np.stack([signature(tokens[number], width) for number in part])
        own = np.floor(np.sqrt(_squares(marks)))
        share = np.floor(length[part] * 2.0**_SHARE_BITS / (SIGNATURE_SHARE * own))
        added = np.floor(marks * share[:, None] / 2.0**_SHARE_BITS + 0.5)
        rows[part] += np.where(length[part, None] == 0, marks, added)
    rows /= np.sqrt(_squares(rows))[:, None]
    return rows.astype(np.float32)


def _squares(rows: np.ndarray) -> np.ndarray:
    """Return each row's exact sum of squares."""
    sums = np.einsum("nd,nd->n", rows, rows)
    assert sums.size == 0 or sums.max() < 2.0**53, "a sum of squares passed 2**53"
    return sums


def glyph_rows(
    tokens: Sequence[TokenString], width: int, progress: Callable[[int], None] | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """Return the rows, float32 [N, D], each of unit length, and the tokens' `Picture`s, int [N]."""
    side = side_for(width)
    basis = table().bases[side]
    rows = np.empty((len(tokens), width), np.float32)
    kinds = np.empty(len(tokens), np.int64)
    for start in range(0, len(tokens), CHUNK):
        part = slice(start, start + CHUNK)
        pictures, kinds[part] = draw(tokens[part], side)
        rows[part] = mix(basis.project(pictures, width), kinds[part], tokens[part])
        if progress:
            progress(len(pictures))
    return rows, kinds
