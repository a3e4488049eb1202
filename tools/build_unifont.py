"""Derive `src/nacre/substrate/unifont.xz`, the shipped glyph table, from GNU Unifont.

Reads the files of Debian's `unifont` and `fonts-unifont` packages (15.0.01):

    python tools/build_unifont.py --hex unifont.hex --combining plane00-combining.txt \\
        --bmp-font unifont.otf --upper-font unifont_upper.otf --out src/nacre/substrate/unifont.xz

The Basic Multilingual Plane comes from the hex file. The upper planes are packaged as an OpenType
font only; it is rendered back to bitmaps at 16 pixels, its design size. That this is exact is
checked first: every glyph of the BMP font must render to its line of the hex file.

Left out, so that a string of them counts as glyphless: controls, noncharacters, line separators,
default-ignorable characters (joiners, variation selectors, tags, fillers), the boxes with the
hexadecimal number of an unassigned code point, and names in a dashed frame unless the character is
a letter or symbol that the code charts draw so too (regional indicators). Blanks stay: they have
a width.

The fixed basis is fitted here as well, over two sets of equal weight: every drawn character alone,
and windows of 2, 3, 4 and 6 neighboring code points that are drawn. It is the mean picture, and for
each side the principal axes of the pictures' columns and of their rows, rounded to integers, and
the order of the products by variance (see docs/substrate.md).
Needs fontTools (it comes with matplotlib) to list a font's characters.
"""

from __future__ import annotations

import argparse
import json
import logging
import lzma
import sys
import unicodedata
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from fontTools.ttLib import TTFont
from PIL import Image, ImageFont

from nacre.substrate import basis, glyphs

IGNORABLE = [  # Default_Ignorable_Code_Point of Unicode 15.0, DerivedCoreProperties.txt
    (0xAD, 0xAD), (0x34F, 0x34F), (0x61C, 0x61C), (0x115F, 0x1160), (0x17B4, 0x17B5),
    (0x180B, 0x180F), (0x200B, 0x200F), (0x202A, 0x202E), (0x2060, 0x206F), (0x3164, 0x3164),
    (0xFE00, 0xFE0F), (0xFEFF, 0xFEFF), (0xFFA0, 0xFFA0), (0xFFF0, 0xFFF8), (0x1BCA0, 0x1BCA3),
    (0x1D173, 0x1D17A), (0xE0000, 0xE0FFF),
]  # fmt: skip
WINDOWS = (2, 3, 4, 6)
MARGIN = 32  # pixels left of the pen, for marks that reach back


def read_hex(path: Path) -> dict[int, np.ndarray]:
    """Return each code point's pixels, uint8 [16, 8 or 16]."""
    found = {}
    for line in path.read_text("ascii").splitlines():
        point, _, digits = line.partition(":")
        packed = np.frombuffer(bytes.fromhex(digits), np.uint8).reshape(16, -1)
        found[int(point, 16)] = np.unpackbits(packed, axis=1)
    return found


def read_combining(path: Path) -> dict[int, int]:
    """Return the horizontal offset in pixels of each combining mark of the BMP."""
    pairs = (line.split(":") for line in path.read_text("ascii").split())
    return {int(point, 16): int(offset) for point, offset in pairs}


class Renderer:
    """Bitmaps of an OpenType build of Unifont at its design size of 16 pixels."""

    def __init__(self, path: Path) -> None:
        self.font = ImageFont.truetype(str(path), 16, layout_engine=ImageFont.Layout.BASIC)
        outlines = TTFont(path)
        units: int = getattr(outlines["head"], "unitsPerEm")  # noqa: B009 - unknown to type checkers
        self.advance = {
            point: outlines["hmtx"][name][0] * 16 // units
            for point, name in (outlines.getBestCmap() or {}).items()
        }

    def __call__(self, point: int) -> np.ndarray:
        """Return the pixels, uint8 [16, 2 * MARGIN]; the pen stands at column MARGIN."""
        mask, (x, y) = self.font.getmask2(chr(point), mode="1", anchor="ls")
        canvas = np.zeros((16, 2 * MARGIN), np.uint8)
        if all(mask.size):
            pixels = np.asarray(Image.Image()._new(mask)) > 0
            top, left = 14 + y, MARGIN + x
            canvas[top : top + mask.size[1], left : left + mask.size[0]] = pixels
        return canvas


def check_renderer(renderer: Renderer, known: dict[int, np.ndarray], marks: dict[int, int]) -> None:
    """Stop unless the font renders exactly to the bitmaps of the hex file."""
    wrong = []
    for point, pixels in known.items():
        expected = np.zeros((16, 2 * MARGIN), np.uint8)
        start = MARGIN + marks.get(point, 0)
        expected[:, start : start + pixels.shape[1]] = pixels
        if point not in renderer.advance or not np.array_equal(renderer(point), expected):
            wrong.append(f"U+{point:04X}")
    if wrong:
        sys.exit(f"{len(wrong)} glyphs do not render to their bitmaps: {' '.join(wrong[:10])}")
    print(f"rendering is exact for all {len(known):,} glyphs of the hex file")


def read_upper(renderer: Renderer) -> tuple[dict[int, np.ndarray], dict[int, int]]:
    """Return the pixels of the upper planes and the offsets of the marks among them."""
    found, marks = {}, {}
    for point, advance in renderer.advance.items():
        if point < 0x10000:
            continue
        canvas = renderer(point)
        start, width = 0, advance
        if advance == 0:
            ink = np.flatnonzero(canvas.any(axis=0)) - MARGIN
            start = int(ink[0]) // 8 * 8
            width = 16 if ink[-1] - start >= 8 else 8
            start = min(start, 0)
            width = max(width, 16 if ink[-1] - start >= 8 else 8)
            marks[point] = start
        found[point] = canvas[:, MARGIN + start : MARGIN + start + width]
        if found[point].sum() != canvas.sum():
            sys.exit(f"U+{point:04X} reaches out of its cell")
    return found, marks


def left_out(point: int, pixels: np.ndarray) -> bool:
    """Say whether what Unifont has for a code point is a stand-in, not a glyph."""
    category = unicodedata.category(chr(point))
    if category in ("Cc", "Cs", "Co", "Zl", "Zp"):
        return True
    if any(first <= point <= last for first, last in IGNORABLE):
        return True
    if point & 0xFFFE == 0xFFFE or 0xFDD0 <= point <= 0xFDEF:
        return True
    if pixels.shape[1] != 16:
        return False
    dashes = np.tile([1, 0], 8)
    dashed = np.array_equal(pixels[0], dashes) and np.array_equal(pixels[15], 1 - dashes)
    return _is_number_box(pixels) or (dashed and category not in ("So", "Lo", "Cn"))


def _is_number_box(pixels: np.ndarray) -> bool:
    """Recognize the white digits on a black 14 x 14 square of an unassigned code point."""
    square = pixels[1:15, 1:15]
    frame = np.concatenate([square[0], square[-1], square[6], square[7], square[:, 0]])
    paper = pixels.sum() - square.sum()
    return paper == 0 and bool(frame.all()) and bool(square[:, -1].all()) and not square.all()


def pack(
    drawn: dict[int, np.ndarray],
    marks: dict[int, int],
    fitted: dict[str, np.ndarray],
    version: str,
) -> bytes:
    """Return the table as `nacre.substrate.glyphs.unpack` reads it."""
    points = sorted(drawn)
    bits = np.zeros((len(points), 16, 2), np.uint8)
    kinds = np.zeros(len(points), np.uint8)
    squares = []
    for place, point in enumerate(points):
        pixels = drawn[point]
        cells = pixels.shape[1] // 8
        bits[place, :, :cells] = np.packbits(pixels, axis=1).reshape(16, cells)
        back = -(marks.get(point, 0) // 8)  # whole cells, rounded up
        kinds[place] = cells | back << 2
        squares.append(np.repeat(pixels, 2 // cells, axis=1).tobytes())
    count: dict[bytes, int] = {}
    for square in squares:
        count[square] = count.get(square, 0) + 1
    kinds |= np.array([(count[square] > 1) << 4 for square in squares], np.uint8)
    arrays = {
        "steps": np.diff(points, prepend=0).astype("<u4"),
        "kinds": kinds,
        "bits": np.ascontiguousarray(bits.transpose(2, 1, 0)),
        **fitted,
    }
    listed = [[name, array.dtype.str, array.shape] for name, array in arrays.items()]
    header = json.dumps({"version": version, "arrays": listed}, separators=(",", ":"))
    body = b"".join(array.tobytes() for array in arrays.values())
    filters = [{"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME, "lc": 0, "pb": 0}]
    return lzma.compress(header.encode() + b"\n" + body, check=lzma.CHECK_CRC32, filters=filters)


def windows(points: list[int]) -> list[str]:
    """Return the strings of 2, 3, 4 and 6 neighboring drawn code points."""
    text = "".join(map(chr, points))
    return [text[at : at + n] for n in WINDOWS for at in range(0, len(text) - n + 1)]


def fit(packed: bytes, points: list[int]) -> dict[str, np.ndarray]:
    """Return the arrays of the basis, measured on pictures drawn by the library itself."""
    provisional = glyphs.unpack(packed)
    glyphs.table = lambda: provisional
    sets = [[chr(point) for point in points], windows(points)]
    means = np.zeros((2, 16, 16))
    for at, strings in enumerate(sets):
        for pictures in chunks(strings, 16):
            means[at] += pictures.sum(axis=0)
        means[at] /= len(strings)
    mean = np.floor(means.mean(axis=0) + 0.5).astype(np.uint8)
    arrays = {"mean": mean}
    for side in basis.SIDES:
        wide_mean = np.repeat(mean, side // 16, axis=1).astype(np.float64)
        scatters = np.zeros((2, 16 * side, 16 * side))
        for at, strings in enumerate(sets):
            for pictures in chunks(strings, side):
                flat = (pictures - wide_mean).reshape(len(pictures), -1)
                scatters[at] += flat.T @ flat
            scatters[at] /= np.trace(scatters[at])
        both = scatters.sum(axis=0).reshape(16, side, 16, side)
        down = complete(axes(np.einsum("iaja->ij", both)), side)
        across = axes(np.einsum("iaib->ab", both))
        lines = down.reshape(side, 16, side // 16).sum(axis=2)
        variance = np.einsum(
            "ui,iajb,uj,va,vb->uv", lines, both, lines, across, across, optimize=True
        )
        order = np.argsort(-np.round(variance.ravel(), 12), kind="stable")
        arrays[f"order{side}"] = order.astype("<u2")
        for name, matrix in (("down", down), ("across", across)):
            arrays[f"{name}{side}"] = np.rint(matrix * 2**basis.ENTRY_BITS).astype("<i2")
        print(f"side {side}: fitted", flush=True)
    return arrays


def chunks(strings: list[str], side: int) -> Iterator[np.ndarray]:
    """Yield pictures, uint8 [n, 16, S]."""
    for start in range(0, len(strings), glyphs.CHUNK):
        yield glyphs.draw(strings[start : start + glyphs.CHUNK], side)[0]


def axes(scatter: np.ndarray) -> np.ndarray:
    """Return the principal axes as rows, strongest first, largest entry positive."""
    rows = np.linalg.eigh(scatter)[1][:, ::-1].T
    strongest = np.abs(rows).argmax(axis=1)
    return rows * np.sign(rows[np.arange(len(rows)), strongest])[:, None]


def complete(rows: np.ndarray, side: int) -> np.ndarray:
    """Spread 16 axes over S / 16 equal lines each; add differences between such lines: [S, S].

    Unifont has 16 lines, so the differences are zero in it; another font's pictures have more.
    """
    while len(rows) < side:
        twice = np.repeat(rows, 2, axis=1) / 2**0.5
        alternate = np.tile([1.0, -1.0], len(rows))
        rows = np.concatenate([twice, twice * alternate])
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    for name in ("--hex", "--combining", "--bmp-font", "--upper-font", "--out"):
        parser.add_argument(name, type=Path, required=True)
    parser.add_argument("--version", default="15.0.01", help="Unifont's version")
    args = parser.parse_args()
    logging.getLogger("fontTools").setLevel(logging.ERROR)

    bmp, marks = read_hex(args.hex), read_combining(args.combining)
    check_renderer(Renderer(args.bmp_font), bmp, marks)
    upper, upper_marks = read_upper(Renderer(args.upper_font))
    everything = bmp | upper
    drawn = {point: pixels for point, pixels in everything.items() if not left_out(point, pixels)}
    print(f"{len(drawn):,} characters kept, {len(everything) - len(drawn):,} stand-ins left out")

    points = sorted(point for point, pixels in drawn.items() if pixels.any())
    everywhere = marks | upper_marks
    blank: dict[str, np.ndarray] = {"mean": np.zeros((16, 16), np.uint8)}
    for side in basis.SIDES:
        blank |= {f"{name}{side}": np.zeros((side, side), "<i2") for name in ("down", "across")}
        blank[f"order{side}"] = np.zeros(side * side, "<u2")
    fitted = fit(pack(drawn, everywhere, blank, args.version), points)
    packed = pack(drawn, everywhere, fitted, args.version)
    args.out.write_bytes(packed)
    print(f"{args.out}: {len(packed):,} bytes")


if __name__ == "__main__":
    main()
