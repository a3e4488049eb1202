from __future__ import annotations

import json
import shutil
from pathlib import Path

import matplotlib
import numpy as np
import pytest
import safetensors.numpy
from PIL import Image
from pydantic import ValidationError

from nacre.errors import CheckpointError, ConfigError, FingerprintError
from nacre.substrate import (
    Substrate,
    SubstrateRecipe,
    blocks,
    check_recipe,
    nearest,
    picture,
    reconstruction,
    save_png,
)

FONT = Path(matplotlib.get_data_path()) / "fonts" / "ttf" / "DejaVuSans.ttf"
TOKENS: list[str | bytes] = [
    *map(chr, range(32, 127)),
    "Α",
    "А",
    "the",
    "ing",
    "語",
    "\u0378",
    "\ud800",
    b"\x80",
    b"<s>",
]
RECIPES = {
    "glyph": SubstrateRecipe(),
    "vocabulary": SubstrateRecipe(fit="vocabulary"),
    "font": SubstrateRecipe(font=FONT),
    "font-vocabulary": SubstrateRecipe(font=FONT, fit="vocabulary"),
    "code": SubstrateRecipe(kind="code"),
    "recode": SubstrateRecipe(kind="code", bits=8, lift="tile", recode=2),
    "random": SubstrateRecipe(kind="random", seed=4),
    "trained": SubstrateRecipe(kind="trained", seed=4),
}


@pytest.fixture
def glyph() -> Substrate:
    return Substrate.build(SubstrateRecipe(), TOKENS, 64)


@pytest.mark.parametrize("name", RECIPES)
def test_build_save_load(name: str, tmp_path: Path) -> None:
    built = Substrate.build(RECIPES[name], TOKENS, 64)
    assert built.rows.shape == (len(TOKENS), 64)
    assert built.rows.dtype == np.float32
    assert len({row.tobytes() for row in built.rows}) == len(TOKENS)
    assert built.fingerprint == Substrate.build(RECIPES[name], TOKENS, 64).fingerprint
    built.save(tmp_path / "a" / "b")
    assert sorted(path.name for path in (tmp_path / "a" / "b").iterdir()) == [
        "substrate.json",
        "substrate.safetensors",
    ]
    loaded = Substrate.load(tmp_path / "a" / "b")
    assert loaded.tokens == tuple(TOKENS)
    assert np.array_equal(loaded.rows, built.rows)
    for field in ("recipe", "width", "fingerprint", "report", "source"):
        assert getattr(loaded, field) == getattr(built, field)
    assert loaded.trainable == (name == "trained")


def test_fingerprints_tell_recipes_widths_and_tokens_apart() -> None:
    prints = [Substrate.build(recipe, TOKENS, 64).fingerprint for recipe in RECIPES.values()]
    prints += [
        Substrate.build(SubstrateRecipe(), TOKENS, 32).fingerprint,
        Substrate.build(SubstrateRecipe(), TOKENS[::-1], 64).fingerprint,
        Substrate.build(SubstrateRecipe(kind="random", seed=4), TOKENS[::-1], 64).fingerprint,
        Substrate.build(SubstrateRecipe(kind="code"), [*TOKENS[:-1], "<s>"], 64).fingerprint,
    ]
    assert len(set(prints)) == len(prints)


def test_a_field_without_effect_does_not_change_the_fingerprint() -> None:
    plain = Substrate.build(SubstrateRecipe(), TOKENS, 64)
    assert Substrate.build(SubstrateRecipe(seed=9), TOKENS, 64).fingerprint == plain.fingerprint
    default = Substrate.build(SubstrateRecipe(kind="code"), TOKENS, 64)
    stated = Substrate.build(SubstrateRecipe(kind="code", bits=16), TOKENS, 64)
    assert default.fingerprint == stated.fingerprint


def test_the_fingerprint_is_the_golden_one(glyph: Substrate) -> None:
    assert glyph.fingerprint == "c7fe23596bbc8492e5a13607006f6c9e814dd1dedfa6dea98924de7142b600ff"


def test_the_font_is_known_by_its_bytes_not_its_path(tmp_path: Path) -> None:
    copy = shutil.copy(FONT, tmp_path / "copy.ttf")
    first = Substrate.build(SubstrateRecipe(font=FONT), TOKENS, 64)
    second = Substrate.build(SubstrateRecipe(font=copy), TOKENS, 64)
    assert first.fingerprint == second.fingerprint
    assert not np.array_equal(first.rows, Substrate.build(SubstrateRecipe(), TOKENS, 64).rows)


def test_the_report_counts_how_rows_came_about(glyph: Substrate) -> None:
    report = glyph.report
    assert report["tokens"] == len(TOKENS)
    assert report["several"] == 2
    assert report["glyphless"] == 5  # space, unassigned, surrogate, two of bytes
    assert report["unique"] + report["look_alike"] == len(TOKENS) - 7
    assert report["signed"] == len(TOKENS) - report["unique"]
    assert Substrate.build(SubstrateRecipe(kind="code"), TOKENS, 64).report == {
        "tokens": len(TOKENS)
    }


def test_a_failed_save_leaves_the_old_files(
    glyph: Substrate, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    glyph.save(tmp_path)

    def fail(_tensors: object, path: Path, _header: object) -> None:
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr("safetensors.numpy.save_file", fail)
    with pytest.raises(OSError, match="disk full"):
        glyph.save(tmp_path)
    assert Substrate.load(tmp_path).fingerprint == glyph.fingerprint
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("name", RECIPES)
def test_progress_counts_the_tokens(name: str) -> None:
    done: list[int] = []
    Substrate.build(RECIPES[name], TOKENS, 64, done.append)
    assert sum(done) == len(TOKENS)


def test_rows_are_read_only(glyph: Substrate) -> None:
    with pytest.raises(ValueError, match="read-only"):
        glyph.rows[0, 0] = 1


def test_rows_of_the_vocabulary_fit_are_its_principal_axes() -> None:
    rows = Substrate.build(SubstrateRecipe(fit="vocabulary"), TOKENS[:95], 64).rows
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    variance = rows.astype(np.float64).var(axis=0)
    assert variance[:8].sum() > 2 * variance[8:16].sum() > variance[16:24].sum()
    letters = Substrate.build(SubstrateRecipe(fit="vocabulary"), list("abcdefgh"), 64).rows
    assert not np.allclose(letters[0], rows[TOKENS.index("a")])


def test_vocabulary_fit_of_nothing_drawn_is_signatures() -> None:
    rows = Substrate.build(SubstrateRecipe(fit="vocabulary"), [b"a", b"b"], 32).rows
    assert np.array_equal(rows, Substrate.build(SubstrateRecipe(), [b"a", b"b"], 32).rows)


def test_what_a_font_lacks_is_glyphless() -> None:
    report = Substrate.build(
        SubstrateRecipe(font=FONT), ["a", "b\u4e2d", "\u4e2d", " \n"], 64
    ).report
    assert (report["look_alike"], report["several"], report["glyphless"]) == (1, 1, 2)


@pytest.mark.parametrize(
    ("recipe", "tokens", "width", "message"),
    [
        ({}, ["a"], 4097, r"width: 4097 is more than the 4096 .*kind: code"),
        ({}, ["a"], 0, r"width: 0 is no width"),
        ({}, [], 64, r"tokens: the vocabulary is empty"),
        ({}, ["a", "b", "a"], 64, r"tokens: the token 'a' stands .* more than once"),
        ({"font": "no/such.ttf"}, ["a"], 64, r"substrate.font: no.such.ttf: no such file"),
        ({"font": __file__}, ["a"], 64, r"substrate.font: .*not a font that FreeType can read"),
        ({"kind": "code", "bits": 2}, list("abcde"), 64, r"substrate.bits: 2 bits .* at least 3"),
        ({"kind": "code", "bits": 3}, list("abcde"), 64, r"width: 64 is not .* 63 or 66"),
        ({"kind": "random"}, list("abcde"), 1, r"width: 1 is too few: .* share a row"),
        ({"font": "no.ttf"}, ["a"], 5000, r"2 problems"),
    ],
)
def test_what_cannot_be_built(recipe: dict, tokens: list[str], width: int, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Substrate.build(SubstrateRecipe(**recipe), tokens, width)


@pytest.mark.parametrize("field", [{"kind": "glyf"}, {"bits": 0}, {"seed": -1}, {"fonts": "x"}])
def test_recipes_refuse_what_they_do_not_know(field: dict) -> None:
    with pytest.raises(ValidationError):
        SubstrateRecipe(**field)


def test_check_recipe_makes_nothing_and_passes_what_is_right() -> None:
    check_recipe(SubstrateRecipe(kind="code"), 2**40, 4096 * 5)


def test_changed_files_are_refused(glyph: Substrate, tmp_path: Path) -> None:
    glyph.save(tmp_path)
    rows = glyph.rows.copy()
    rows[3, 3] += 1e-7
    safetensors.numpy.save_file({"rows": rows}, tmp_path / "substrate.safetensors")
    with pytest.raises(
        FingerprintError, match=f"expected {glyph.fingerprint}.*build the substrate"
    ):
        Substrate.load(tmp_path)
    glyph.save(tmp_path)
    about = json.loads((tmp_path / "substrate.json").read_text())
    about["tokens"][0], about["tokens"][1] = about["tokens"][1], about["tokens"][0]
    (tmp_path / "substrate.json").write_text(json.dumps(about))
    with pytest.raises(FingerprintError):
        Substrate.load(tmp_path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda about: about.pop("tokens"), "damaged .missing 'tokens'"),
        (lambda about: about.update(format=9), "has format 9, this nacre reads format 1"),
        (lambda about: about["recipe"].update(kind="trained"), "recipe and source disagree"),
        (lambda about: about["recipe"].update(font="x.ttf"), "recipe and source disagree"),
        (lambda about: about["tokens"].append(7), "damaged"),
        (lambda about: about["tokens"].append("more"), r"rows are float32 \(104, 64\), not"),
        (lambda about: about.update(source=[]), "damaged"),
    ],
)
def test_damaged_descriptions(change, message: str, glyph: Substrate, tmp_path: Path) -> None:
    glyph.save(tmp_path)
    about = json.loads((tmp_path / "substrate.json").read_text())
    change(about)
    (tmp_path / "substrate.json").write_text(json.dumps(about))
    with pytest.raises(CheckpointError, match=message):
        Substrate.load(tmp_path)


def test_missing_and_broken_files(glyph: Substrate, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no substrate.safetensors here"):
        Substrate.load(tmp_path)
    glyph.save(tmp_path)
    (tmp_path / "substrate.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"substrate.json: damaged"):
        Substrate.load(tmp_path)
    glyph.save(tmp_path)
    (tmp_path / "substrate.safetensors").write_bytes(b"short")
    with pytest.raises(CheckpointError, match=r"substrate.safetensors: damaged"):
        Substrate.load(tmp_path)


def test_pictures_are_square_and_reconstructions_lose_what_truncation_drops() -> None:
    whole = picture("g", 256)
    assert whole.shape == (16, 16)
    assert picture("g", 1024).shape == (32, 32)
    assert np.array_equal(picture("g", 1024), np.kron(whole, np.ones((2, 2), np.uint8)))
    assert not picture(b"g", 64).any()
    unsigned = picture("ж", 256).astype(int)
    errors = [np.abs(reconstruction("ж", width) - unsigned).mean() for width in (16, 64, 256)]
    assert errors[0] > errors[1] > 1 > errors[2]
    grain = np.abs(reconstruction("g", 256) - whole.astype(int))
    assert 1 < grain.mean() < 30, "a look-alike shows its signature"
    assert reconstruction(b"g", 64).std() > 10


def test_pictures_with_a_font() -> None:
    recipe = SubstrateRecipe(font=FONT)
    assert picture("g", 1024, recipe).shape == (32, 32)
    assert len(np.unique(picture("g", 1024, recipe))) > 2
    assert reconstruction("g", 1024, recipe).shape == (32, 32)


def test_what_cannot_be_drawn() -> None:
    with pytest.raises(ConfigError, match="code rows have no picture"):
        picture("a", 64, SubstrateRecipe(kind="code"))
    with pytest.raises(ConfigError, match="their basis is not kept"):
        reconstruction("a", 64, SubstrateRecipe(fit="vocabulary"))


def test_terminal_and_png(tmp_path: Path) -> None:
    drawn = picture("A", 64)
    lines = blocks(drawn).split("\n")
    assert [len(line) for line in lines] == [16] * 8
    assert lines[2] == "    ▄▄▀▀▀▀▄▄    "
    assert blocks(drawn, ansi=True).count("▀") == 16 * 8
    save_png(drawn, tmp_path / "a.png", scale=4)
    with Image.open(tmp_path / "a.png") as image:
        pixels = np.asarray(image)
    assert pixels.shape == (64, 64)
    assert np.array_equal(255 - pixels[::4, ::4], drawn)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_nearest_finds_look_alikes(glyph: Substrate) -> None:
    found = nearest(glyph, "A", 3)
    assert {token for _, token, _ in found[:2]} == {"Α", "А"}
    assert all(glyph.tokens[number] == token for number, token, _ in found)
    assert found[0][2] >= found[1][2] > 0.88 > found[2][2]
    assert nearest(glyph, TOKENS.index("A"), 3) == found
    assert len(nearest(glyph, "A", 10_000)) == len(TOKENS) - 1


def test_nearest_of_a_string_outside_the_vocabulary(glyph: Substrate) -> None:
    assert nearest(glyph, "ℎ", 1)[0][1] in TOKENS
    assert nearest(glyph, "Ａ", 1)[0][1] in ("A", "Α", "А")
    with pytest.raises(ConfigError, match=r"'outside' is not in the vocabulary"):
        nearest(Substrate.build(SubstrateRecipe(kind="code"), TOKENS, 64), "outside")
    with pytest.raises(ConfigError, match=r"there is no token 999 .ids are 0 to 103"):
        nearest(glyph, 999)


def test_nearest_needs_the_font_unchanged(tmp_path: Path) -> None:
    font = Path(shutil.copy(FONT, tmp_path / "font.ttf"))
    drawn = Substrate.build(SubstrateRecipe(font=font), list("abcO"), 64)
    assert nearest(drawn, "0", 1)[0][1] == "O"
    shutil.copy(FONT.with_name("DejaVuSerif.ttf"), font)
    with pytest.raises(ConfigError, match="no longer the file"):
        nearest(drawn, "0")


def test_nearest_with_a_row_of_zeros() -> None:
    code = Substrate.build(SubstrateRecipe(kind="code"), TOKENS, 64)
    assert {cosine for _, _, cosine in nearest(code, 0, 3)} == {0.0}
    assert nearest(code, 3, 1)[0][0] != 0
