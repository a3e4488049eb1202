"""Look at a substrate: a token's picture, what its row keeps of it, and the rows nearest to it."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
from PIL import Image

from nacre.errors import ConfigError, Problem
from nacre.substrate import basis, glyphs
from nacre.substrate.fonts import FontPen, font_hash
from nacre.substrate.glyphs import TokenString
from nacre.substrate.table import Substrate, SubstrateRecipe, check_recipe, make_rows

_BLOCKS = {(False, False): " ", (True, False): "▀", (False, True): "▄", (True, True): "█"}


def picture(token: TokenString, width: int, recipe: SubstrateRecipe | None = None) -> np.ndarray:
    """Return the square picture a glyph row of `width` is made of, uint8 [S, S], 255 is ink.

    Blank if there is nothing to draw. Raises ConfigError for a width or font that cannot be.
    """
    recipe = recipe or SubstrateRecipe()
    _must_draw(recipe, width)
    side = basis.side_for(width)
    drawn = FontPen(recipe.font, side).draw([token]) if recipe.font else glyphs.draw([token], side)
    return np.repeat(drawn[0][0], side // drawn[0].shape[1], axis=0)


def reconstruction(
    token: TokenString, width: int, recipe: SubstrateRecipe | None = None
) -> np.ndarray:
    """Return the picture that can be had back from a token's row alone, uint8 [S, S].

    Shows what the first `width` coefficients keep, and the token's signature as a grain over it;
    for a glyphless token the grain is all there is. Raises ConfigError for `fit: vocabulary`, whose
    basis is not kept.
    """
    recipe = recipe or SubstrateRecipe()
    _must_draw(recipe, width)
    if recipe.fit == "vocabulary":
        message = "rows of fit: vocabulary cannot be drawn back, their basis is not kept"
        raise ConfigError(Problem("substrate.fit", message, "use fit: unifont"))
    side = basis.side_for(width)
    fixed = glyphs.table().bases[side]
    drawn = picture(token, width, recipe)
    row = make_rows(recipe, [token], width)[0].astype(np.float64)
    # A row has unit length. Its picture's length brings back the contrast; half ink if it has none.
    contrast = 127.0 * side * 2.0**basis.COEFFICIENT_BITS
    length = np.linalg.norm(fixed.project(drawn[None], width)) if drawn.any() else contrast
    back = fixed.reconstruct(row * length)[0]
    return np.clip(np.rint(back), 0, 255).astype(np.uint8)


def blocks(picture_SS: np.ndarray, ansi: bool = False) -> str:
    """Return a picture as S / 2 lines of S half-block characters for a terminal.

    Plain text shows what is at least half ink; `ansi` colors both halves in their grey level.
    """
    lines = []
    for upper, lower in zip(picture_SS[::2].tolist(), picture_SS[1::2].tolist(), strict=True):
        if ansi:
            cells = (
                f"\x1b[38;2;{a};{a};{a};48;2;{b};{b};{b}m▀"
                for a, b in zip(upper, lower, strict=True)
            )
            lines.append("".join(cells) + "\x1b[0m")
        else:
            cells = (_BLOCKS[a > 127, b > 127] for a, b in zip(upper, lower, strict=True))
            lines.append("".join(cells))
    return "\n".join(lines)


def save_png(picture_SS: np.ndarray, path: Path | str, scale: int = 8) -> None:
    """Write a picture as a PNG, black ink on white, each pixel `scale` x `scale`."""
    path = Path(path)
    side = picture_SS.shape[0] * scale
    image = Image.fromarray(255 - picture_SS).resize((side, side), Image.Resampling.NEAREST)
    temporary = path.with_name(f".{path.name}.{os.getpid()}.part")
    image.save(temporary, format="PNG")
    temporary.replace(path)


def nearest(
    substrate: Substrate, token: TokenString | int, k: int = 8
) -> list[tuple[int, TokenString, float]]:
    """Return the `k` tokens whose rows are nearest to a token's: (id, string, cosine), best first.

    `token` is an id or a string; the token itself is left out. A string outside the vocabulary is
    drawn if the substrate is `glyph` with `fit: unifont`; ConfigError otherwise.
    """
    number = _number(substrate, token)
    if number is None:
        assert not isinstance(token, int)
        row = _draw_outside(substrate, token)
    else:
        row = substrate.rows[number]
    lengths = np.linalg.norm(substrate.rows, axis=1) * np.linalg.norm(row)
    cosines = np.divide(
        substrate.rows @ row, lengths, out=np.zeros_like(lengths), where=lengths > 0
    )
    if number is not None:
        cosines[number] = -np.inf
    best = np.argsort(-cosines, kind="stable")[: min(k, len(cosines) - (number is not None))]
    return [(int(i), substrate.tokens[i], float(cosines[i])) for i in best]


def _number(substrate: Substrate, token: TokenString | int) -> int | None:
    if not isinstance(token, int):
        return substrate.tokens.index(token) if token in substrate.tokens else None
    if not 0 <= token < len(substrate.tokens):
        message = f"there is no token {token}"
        raise ConfigError(Problem("token", message, f"ids are 0 to {len(substrate.tokens) - 1}"))
    return token


def _draw_outside(substrate: Substrate, token: TokenString) -> np.ndarray:
    recipe = substrate.recipe
    if recipe.kind != "glyph" or recipe.fit != "unifont":
        message = f"{token!r} is not in the vocabulary"
        fix = "only a glyph substrate with fit: unifont has a row for any string"
        raise ConfigError(Problem("token", message, fix))
    if recipe.font is not None and font_hash(recipe.font) != substrate.source["font"]:
        message = f"{recipe.font} is no longer the file the substrate was drawn with"
        raise ConfigError(Problem("substrate.font", message, "restore it, or build anew"))
    return make_rows(recipe, [token], substrate.width)[0][0]


def _must_draw(recipe: SubstrateRecipe, width: int) -> None:
    if recipe.kind != "glyph":
        message = f"{recipe.kind} rows have no picture"
        raise ConfigError(Problem("substrate.kind", message, "only glyph rows are drawn"))
    check_recipe(recipe, 1, width)
