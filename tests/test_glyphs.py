from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from fractions import Fraction
from importlib import resources
from time import process_time

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from nacre.substrate import glyphs
from nacre.substrate.basis import ENTRY_BITS, SIDES, side_for
from nacre.substrate.glyphs import Picture, draw, glyph_rows, signature, stretch
from nacre.substrate.table import find_duplicate

GOLDEN_TOKENS = [
    *"Aaβж7.!語한あ🌍\U00020b9f",
    "\u0391",
    "the",
    " and",
    "e\u0301",
    "👨\u200d👩\u200d👧",
    "日本語",
    "x" * 100,
    " ",
    "\n",
    "",
    "\u0378",
    b"\xff",
    b"<pad>",
]
GOLDEN = {
    16: "9073a1aa1f243df2315c327bd7865aebcf69e544eb5529e4c85899315e97342d",
    64: "805c1b0e23794140fdd0f88cd9525367d8b4700be183227371ae29df76ac45f3",
    256: "5ec18f02bdd5e53901087bbca3930481da3f46758e232bfe54562f962587f714",
    1024: "a00c57163da89f5573aa895eb167334679ee3332d666a08a7fcbed5f7203a534",
    4096: "20f9db294aaf00372c3c217375a24302c9ea92589045a86cc80de4e4ed1c8286",
}


def digest(rows: np.ndarray) -> str:
    return hashlib.sha256(rows.astype("<f4").tobytes()).hexdigest()


def row(token: str | bytes, width: int = 256) -> np.ndarray:
    return glyph_rows([token], width)[0][0]


def drawn(token: str, side: int = 16) -> np.ndarray:
    return draw([token], side)[0][0]


def all_characters() -> list[str]:
    table = glyphs.table()
    return [character for character, place in table.index.items() if not table.blank[place]]


@pytest.mark.parametrize("width", GOLDEN)
def test_rows_are_the_golden_ones(width: int) -> None:
    assert digest(glyph_rows(GOLDEN_TOKENS, width)[0]) == GOLDEN[width]


SUBPROCESS = """
import json, sys
{setup}
from nacre.substrate import glyphs
import hashlib
tokens = list(glyphs.table().index)[:3000] + ["of", "the", b"x"]
rows = glyphs.glyph_rows(tokens, 1024)[0]
print(json.dumps([hashlib.sha256(rows.tobytes()).hexdigest(), str(rows.dtype)]))
"""
TORCH = (
    "import torch; torch.set_default_dtype(torch.{}); torch.set_float32_matmul_precision('medium')"
)


@pytest.mark.parametrize(
    ("threads", "setup"),
    [("1", ""), ("2", ""), ("2", TORCH.format("float32")), ("1", TORCH.format("float64"))],
)
def test_rows_do_not_depend_on_threads_or_torch_defaults(threads: str, setup: str) -> None:
    names = ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "OMP_NUM_THREADS")
    env = os.environ | dict.fromkeys(names, threads)
    code = SUBPROCESS.format(setup=setup)
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, check=True)
    tokens = [*list(glyphs.table().index)[:3000], "of", "the", b"x"]
    assert json.loads(done.stdout) == [digest(glyph_rows(tokens, 1024)[0]), "float32"]


def test_importing_the_substrate_does_not_import_torch() -> None:
    code = "import sys, nacre.substrate; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


def test_a_row_does_not_depend_on_the_rest_of_the_vocabulary() -> None:
    shared = [*GOLDEN_TOKENS, *all_characters()[:500]]
    first = glyph_rows(shared, 256)[0]
    others = [chr(point) for point in range(0x4E00, 0x5600)]
    mixed = [*others[:1000], *shared[::-1], *others[1000:]]
    second = glyph_rows(mixed, 256)[0]
    assert np.array_equal(first, second[1000 : 1000 + len(shared)][::-1])


@settings(max_examples=60, deadline=None)
@given(st.lists(st.one_of(st.text(max_size=12), st.binary(max_size=6)), unique=True, max_size=8))
@example(["\ud800", "\udfff", "", b"", b"\xed\xa0\x80", "\x00", b"\x00"])
def test_any_strings_have_distinct_unit_rows_of_their_own(tokens: list[str | bytes]) -> None:
    rows, _ = glyph_rows(tokens, 64)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert find_duplicate(rows) is None
    for token, together in zip(tokens, rows, strict=True):
        assert np.array_equal(row(token, 64), together)


def test_no_two_of_131072_tokens_share_a_row() -> None:
    characters = all_characters()
    line = "".join(characters)
    tokens: dict[str | bytes, None] = dict.fromkeys(characters)
    tokens |= dict.fromkeys(bytes([value]) for value in range(256))
    tokens |= dict.fromkeys(f"<special {number}>".encode() for number in range(256))
    tokens |= dict.fromkeys(map(chr, range(0xE000, 0xE800)))
    tokens |= dict.fromkeys(" \n\t\u3000\u200b" + "\ud800")
    tokens |= dict.fromkeys(a + b for a in "AΑАΒBВCСⅭ " for b in "EΕЕKΚКMΜМ\n")
    for size in (2, 3, 5):
        tokens |= dict.fromkeys(line[at : at + size] for at in range(0, 3 * 22_000, 3))
    vocabulary = list(tokens)[:131_072]
    assert len(vocabulary) == 131_072
    assert find_duplicate(glyph_rows(vocabulary, 64)[0]) is None
    assert find_duplicate(glyph_rows(vocabulary[65_536:], 256)[0]) is None


@pytest.mark.parametrize("width", [16, 32, 64])
def test_unsigned_rows_differ_over_all_of_unifont(width: int) -> None:
    rows, kinds = glyph_rows(all_characters(), width)
    unsigned = rows[kinds == Picture.UNIQUE]
    assert len(unsigned) > 66_000
    assert find_duplicate(unsigned) is None


def test_find_duplicate_finds_the_pair() -> None:
    rows = np.random.default_rng(0).random((5000, 3), np.float32)
    assert find_duplicate(rows) is None
    rows[4321] = rows[17]
    assert find_duplicate(rows) == (17, 4321)


def test_look_alikes_are_near_and_distinct() -> None:
    tokens = ["A", "\u0391", "\u0410", "B", "ABC"]
    rows, kinds = glyph_rows(tokens, 1024)
    cosines = rows @ rows.T
    assert kinds.tolist() == [Picture.LOOK_ALIKE] * 4 + [Picture.SEVERAL]
    assert (cosines[np.triu_indices(3, 1)] > 0.92).all()
    assert (cosines[np.triu_indices(3, 1)] < 0.96).all()
    assert cosines[0, 3] < 0.8


def test_kinds_follow_the_string() -> None:
    expected = {
        "&": Picture.UNIQUE,
        "語": Picture.UNIQUE,
        "O": Picture.LOOK_ALIKE,
        "go": Picture.SEVERAL,
        "g\u200d": Picture.SEVERAL,
        " ": Picture.GLYPHLESS,
        " \u3000": Picture.GLYPHLESS,
        "\n\x00": Picture.GLYPHLESS,
        "\u0378": Picture.GLYPHLESS,  # unassigned: Unifont has a box with its number
        "\u200d": Picture.GLYPHLESS,  # a joiner: Unifont has its name in a frame
        "\ufe0f": Picture.GLYPHLESS,
        "\ufffe": Picture.GLYPHLESS,
        "\ue000": Picture.GLYPHLESS,
        "\ud800": Picture.GLYPHLESS,
        "": Picture.GLYPHLESS,
        b"g": Picture.GLYPHLESS,
        "⬛": Picture.UNIQUE,  # a real black square, not a box
        "🇫": Picture.UNIQUE,  # a regional indicator keeps its frame
    }
    assert draw(list(expected), 16)[1].tolist() == list(expected.values())


def test_glyphless_rows_are_the_signature_alone() -> None:
    marks = signature(b"\x80", 64)
    assert set(marks % 2) == {1.0}
    assert np.abs(marks).max() <= 255
    assert np.allclose(row(b"\x80", 64), marks / np.linalg.norm(marks), atol=1e-7)
    assert np.array_equal(signature("x", 32), signature("x", 256)[:32])
    assert not np.array_equal(signature("x", 32), signature(b"x", 32))


def test_a_signature_weighs_a_quarter_of_the_picture() -> None:
    side, width = 32, 1024
    pictures, _ = draw(["and"], side)
    own = glyphs.table().bases[side].project(pictures, width)[0]
    added = row("and", width) * np.linalg.norm(own) * (1 + 1 / 16) ** 0.5 - own
    assert np.linalg.norm(added) / np.linalg.norm(own) == pytest.approx(0.25, abs=0.03)
    marks = signature("and", width)
    assert added @ marks > 0.95 * np.linalg.norm(added) * np.linalg.norm(marks)


def test_the_bitmap_of_a_letter() -> None:
    ink = drawn("A")[:, ::2] // 255  # Unifont's A: 8 pixels wide
    assert ["".join(".#"[value] for value in line) for line in ink] == [
        *["........"] * 4,
        "...##...",
        "..#..#..",
        "..#..#..",
        *[".#....#."] * 2,
        ".######.",
        *[".#....#."] * 4,
        *["........"] * 2,
    ]


def test_characters_stand_side_by_side() -> None:
    assert np.array_equal(drawn("AB"), np.hstack([drawn("A")[:, ::2], drawn("B")[:, ::2]]))
    assert np.array_equal(drawn("語AB", 32)[:, :16], drawn("語", 16))
    assert not drawn("A ")[:, 8:].any(), "a blank takes room"
    assert np.array_equal(drawn("A\u200dB\n"), drawn("AB")), "what has no glyph takes none"


def test_combining_marks_overlay_what_they_follow() -> None:
    letter, mark = drawn("e"), drawn("\u0301")
    assert mark.any()
    assert np.array_equal(drawn("e\u0301"), letter | mark)
    assert np.array_equal(drawn("e\u0301x")[:, :8], (letter | mark)[:, ::2])
    circled = drawn("語\u20dd", 16)
    assert np.array_equal(circled, drawn("語") | drawn("\u20dd"))
    assert drawn("\U000116a0\U000116ab").any(), "marks of the upper planes too"


@settings(max_examples=40, deadline=None)
@given(st.integers(1, 90), st.sampled_from([16, 32, 64]), st.randoms(use_true_random=False))
def test_stretch_is_the_exact_area_average(pixels: int, side: int, random) -> None:
    line = [random.randrange(256) for _ in range(pixels)]
    expected = []
    for place in range(side):
        left, right = Fraction(place * pixels, side), Fraction((place + 1) * pixels, side)
        total = Fraction(0)
        for number, grey in enumerate(line):
            total += grey * max(Fraction(0), min(right, number + 1) - max(left, number))
        expected.append(int(total / (right - left) + Fraction(1, 2)))
    assert stretch(np.array([[line]], np.uint8), side)[0, 0].tolist() == expected


@pytest.mark.parametrize("side", SIDES)
def test_projection_is_exact_integer_arithmetic(side: int) -> None:
    fixed = glyphs.table().bases[side]
    pictures, _ = draw(["A", "the", "語", "x" * 70], side)
    found = fixed.project(pictures, side * side)
    centered = np.repeat(pictures.astype(np.int64) - fixed.mean, side // 16, axis=1)
    down, across = fixed.down.astype(np.int64), fixed.across.astype(np.int64)
    full = (down @ centered @ across.T).reshape(len(pictures), -1)[:, fixed.order]
    shift = 2 * ENTRY_BITS - 8
    assert np.array_equal(found, (full + (1 << shift - 1)) >> shift)
    assert np.array_equal(fixed.project(pictures, 20), found[:, :20])


@pytest.mark.parametrize("side", SIDES)
def test_the_basis_is_orthonormal_and_its_order_complete(side: int) -> None:
    fixed = glyphs.table().bases[side]
    for matrix in (fixed.down / 2.0**ENTRY_BITS, fixed.across / 2.0**ENTRY_BITS):
        assert np.abs(matrix @ matrix.T - np.eye(side)).max() < 1e-3
    assert sorted(fixed.order.tolist()) == list(range(side * side))
    assert (fixed.order[: 16 * side] < 16 * side).all(), "differences of equal lines come last"


@pytest.mark.parametrize("side", SIDES)
def test_a_picture_can_be_had_back_from_all_coefficients(side: int) -> None:
    fixed = glyphs.table().bases[side]
    pictures, _ = draw(["A", "word", "語"], side)
    back = fixed.reconstruct(fixed.project(pictures, side * side))
    assert np.abs(back - np.repeat(pictures, side // 16, axis=1)).max() < 0.5


def test_truncation_keeps_most_of_the_variance() -> None:
    fixed = glyphs.table().bases[16]
    energy = np.zeros(256)
    for start in range(0, 20_000, 2000):
        pictures, _ = draw(all_characters()[start : start + 2000], 16)
        energy += (fixed.project(pictures, 256) ** 2).sum(axis=0)
    assert energy[:64].sum() / energy.sum() > 0.6
    assert energy[:128].sum() / energy.sum() > 0.78


def test_the_side_follows_from_the_width() -> None:
    widths = (1, 256, 257, 1024, 1025, 4096)
    assert [side_for(width) for width in widths] == [16, 16, 32, 32, 64, 64]
    with pytest.raises(ValueError, match="64 x 64"):
        side_for(4097)


def test_the_shared_flag_says_which_bitmaps_coincide() -> None:
    table = glyphs.table()
    wide = np.unpackbits(table.bits, axis=2).reshape(-1, 16, 16)
    narrow = table.cells == 1
    wide[narrow] = np.repeat(wide[narrow][:, :, :8], 2, axis=2)
    _, inverse, counts = np.unique(
        np.packbits(wide.reshape(len(wide), -1), axis=1),
        axis=0,
        return_inverse=True,
        return_counts=True,
    )
    assert np.array_equal(counts[inverse.ravel()] > 1, table.shared)


def test_the_shipped_table_is_small_and_quick_to_read() -> None:
    packed = resources.files("nacre.substrate").joinpath(glyphs.DATA).read_bytes()
    assert len(packed) < 2_000_000
    notice = resources.files("nacre.substrate").joinpath("unifont-OFL.txt").read_text("utf-8")
    assert "SIL OPEN FONT LICENSE" in notice
    start = process_time()
    table = glyphs.unpack(packed)
    assert process_time() - start < 1
    planes = {ord(character) >> 16 for character in table.index}
    assert {0, 1} <= planes
    assert len(table.index) > 68_000


def test_progress_counts_the_tokens() -> None:
    done: list[int] = []
    glyph_rows(all_characters()[:2500], 64, done.append)
    assert sum(done) == 2500
    assert len(done) > 1
