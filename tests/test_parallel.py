"""Parallel text: what a folder holds, every direction, every message."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from nacre.errors import DataError
from nacre.evaluate import parallel


def write(path: Path, text: str | bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return path


def pairs(folder: Path, name: str, limit: int | None = None) -> list[parallel.Pair]:
    return parallel.read(parallel.find(folder)[name], limit)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


def test_every_direction_is_found(tmp_path: Path) -> None:
    for name in ("en-ru.en", "en-ru.ru", "news.en", "news.ru", "news.zh", "alone.en", ".x/a.en",
                 ".x/a.ru", "notes.txt", "code.py"):  # fmt: skip
        write(tmp_path / "deep" / name, "x\n")
    write(tmp_path / "zh-en.tsv", "en\tzh\nyes\t是\n")
    write(tmp_path / "talks.tsv", b"\xef\xbb\xbfen\tde\r\nyes\tja\r\n")
    write(tmp_path / "verses.tsv", "Gen.1.1\tIn the beginning\tВ начале\n")
    write(tmp_path / "one.tsv", "en\nyes\n")
    assert list(parallel.find(tmp_path)) == [
        "translate-en-ru", "translate-en-zh", "translate-news-en-ru", "translate-news-en-zh",
        "translate-news-ru-en", "translate-news-ru-zh", "translate-news-zh-en",
        "translate-news-zh-ru", "translate-ru-en", "translate-talks-de-en",
        "translate-talks-en-de", "translate-zh-en",
    ]  # fmt: skip
    assert pairs(tmp_path, "translate-talks-de-en") == [("ja", "yes")]
    assert pairs(tmp_path, "translate-en-zh") == [("yes", "是")]


def test_lines_stand_beside_their_translation(tmp_path: Path) -> None:
    write(tmp_path / "en-ru.en", "one\r\n\r\ntwo \n\n\n")
    write(tmp_path / "en-ru.ru", "раз\n\nдва")
    assert pairs(tmp_path, "translate-ru-en") == [("раз", "one"), ("два", "two")]
    assert pairs(tmp_path, "translate-en-ru", 1) == [("one", "раз")]


def test_a_fingerprint_is_that_of_direction_and_sentences(tmp_path: Path) -> None:
    def made(folder: str, text: str, name: str = "translate-en-ru") -> str:
        write(tmp_path / folder / "en-ru.tsv", text)
        found = parallel.find(tmp_path / folder)[name]
        return parallel.fingerprint(found, parallel.read(found))

    one = made("a", "en\tru\na\tb\n")
    assert made("b", "ru\ten\nb\ta\n\n") == one
    assert len({one, made("c", "en\tru\na\tc\n"),
                made("d", "en\tru\nb\ta\n", "translate-ru-en")}) == 3  # fmt: skip


def test_what_is_wrong_with_a_file(tmp_path: Path) -> None:
    first, second = write(tmp_path / "en-ru.en", "one\ntwo\n"), tmp_path / "en-ru.ru"
    write(second, "раз\n")
    assert refused(lambda: pairs(tmp_path, "translate-ru-en")) == (
        f"{second}: has 1 lines, {first} 2; line n of one must be the translation of line n of "
        "the other"
    )
    write(second, "раз\n\n\n")
    write(first, "one\n\ntwo\n")
    write(second, "раз\nдва\nтри\n")
    assert refused(lambda: pairs(tmp_path, "translate-en-ru")) == (
        f"{first}, line 2: has no translation; add it, or empty both"
    )
    write(second, "раз\n\xff".encode("latin-1", "replace"))
    assert "invalid UTF-8" in refused(lambda: pairs(tmp_path, "translate-en-ru"))
    write(second, "")
    assert refused(lambda: pairs(tmp_path, "translate-en-ru")) == f"{second}: the file is empty"
    second.unlink()
    table = write(tmp_path / "en-ru.tsv", "en\tru\none\tраз\ntwo\n")
    assert refused(lambda: pairs(tmp_path, "translate-en-ru")) == (
        f"{table}, line 3: has 1 columns; the first line names 2: en, ru"
    )
    write(table, "en\tru\n\n")
    assert refused(lambda: pairs(tmp_path, "translate-en-ru")) == (
        f"{table}: there is no sentence in it"
    )
    other = write(tmp_path / "b" / "en-ru.tsv", "en\tru\na\tb\n")
    assert refused(lambda: parallel.find(tmp_path)) == (
        f"{table}: is translate-en-ru, as {other} is; keep one of them"
    )
    assert "there is no such folder" in refused(lambda: parallel.find(tmp_path / "none"))


def test_a_head_that_only_looks_like_languages_names_no_table(tmp_path: Path) -> None:
    (tmp_path / "a.tsv").write_bytes(b"\x1f en\tru\nday\tday\n")
    (tmp_path / "b.tsv").write_bytes(b"en\tru\t\nday\tday\t\n")
    assert parallel.find(tmp_path) == {}
