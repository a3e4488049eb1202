"""Draw strings with any TrueType or OpenType font, in place of Unifont.

For comparison: pixels come from FreeType through Pillow, so they may differ between versions of
it. A substrate drawn so is identified by its bytes; the font file's hash is part of its recipe.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from nacre.errors import ConfigError, Problem
from nacre.substrate.glyphs import Picture, TokenString, stretch

_NONCHARACTER = "\uffff"  # never assigned: draws the font's mark for a missing glyph


def font_hash(path: Path) -> str:
    """Return the font file's SHA-256 in hex; raise ConfigError if it cannot be read."""
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        reason = "no such file" if isinstance(error, FileNotFoundError) else f"{error.strerror}"
        fix = "give the path of a .ttf or .otf file"
        raise ConfigError(Problem("substrate.font", f"{path}: {reason}", fix)) from None


class FontPen:
    """Draws strings with one font, its line `side` pixels high."""

    def __init__(self, path: Path, side: int) -> None:
        """Open the font; raises ConfigError if the file is missing or no font."""
        font_hash(path)
        try:
            # The basic layout needs no shaping library, whose presence would change the pixels.
            self.font = ImageFont.truetype(str(path), side, layout_engine=ImageFont.Layout.BASIC)
            ascent, descent = self.font.getmetrics()
            size = max(4, side * side // max(ascent + descent, 1))
            self.font = self.font.font_variant(size=size)
        except OSError:
            message = f"{path}: not a font that FreeType can read"
            fix = "give a .ttf or .otf file"
            raise ConfigError(Problem("substrate.font", message, fix)) from None
        self.side = side
        self.missing = self._ink(_NONCHARACTER)
        self._known: dict[str, bool] = {}

    def _ink(self, character: str) -> bytes:
        canvas = Image.new("L", (3 * self.side, 2 * self.side))
        place = (self.side, self.side)
        ImageDraw.Draw(canvas).text(place, character, fill=255, font=self.font, anchor="ls")
        return canvas.tobytes()

    def has(self, character: str) -> bool:
        """Say whether the font has ink of its own for a character."""
        if "\ud800" <= character <= "\udfff":
            return False
        if character not in self._known:
            ink = self._ink(character)
            self._known[character] = ink != self.missing and any(ink)
        return self._known[character]

    def draw(self, tokens: Sequence[TokenString]) -> tuple[np.ndarray, np.ndarray]:
        """Return pictures, uint8 [N, S, S], and `Picture`s, int [N], as `glyphs.draw` does.

        Which characters a font draws alike is not known beforehand, so no picture counts as unique.
        """
        pictures = np.zeros((len(tokens), self.side, self.side), np.uint8)
        kinds = np.full(len(tokens), Picture.GLYPHLESS, dtype=np.int64)
        for number, token in enumerate(tokens):
            if isinstance(token, bytes):
                continue
            drawn = {character for character in set(token) if self.has(character)}
            if not drawn:
                continue
            text = "".join(c if c in drawn else " " if c.isspace() else "" for c in token)
            kinds[number] = Picture.SEVERAL if len(token) > 1 else Picture.LOOK_ALIKE
            pictures[number] = self._line(text)
        return pictures, kinds

    def _line(self, text: str) -> np.ndarray:
        ascent, descent = self.font.getmetrics()
        left, _, right, _ = self.font.getbbox(text, anchor="ls")
        left, right = min(0, int(left)), max(int(right), int(self.font.getlength(text)), 1)
        canvas = Image.new("L", (right - left, max(ascent + descent, 1)))
        ImageDraw.Draw(canvas).text((-left, ascent), text, fill=255, font=self.font, anchor="ls")
        across = stretch(np.asarray(canvas)[None], self.side)
        down = stretch(np.ascontiguousarray(across.transpose(0, 2, 1)), self.side)
        return down[0].T
