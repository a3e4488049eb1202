"""Parallel text from local files: sentences of one language with their translations.

`find` tells by names and heads what a folder holds, at any depth, a task for each direction:

    en-ru.en, en-ru.ru          translate-en-ru, translate-ru-en: line n of one is that of the other
    news.en, news.ru, news.zh   translate-news-en-ru, translate-news-en-zh, ..
    en-ru.tsv, news.tsv         the same; the first line names the language of each column

Text must be UTF-8.
"""

from __future__ import annotations

import hashlib
import itertools
from dataclasses import dataclass
from pathlib import Path

from nacre.errors import DataError
from nacre.evaluate.benchmarks import files, read_bytes, read_text

LANGUAGES = {
    "ar": "Arabic", "be": "Belarusian", "bg": "Bulgarian", "bn": "Bengali", "ca": "Catalan",
    "cs": "Czech", "da": "Danish", "de": "German", "el": "Greek", "en": "English",
    "es": "Spanish", "et": "Estonian", "fa": "Persian", "fi": "Finnish", "fr": "French",
    "ga": "Irish", "he": "Hebrew", "hi": "Hindi", "hr": "Croatian", "hu": "Hungarian",
    "id": "Indonesian", "is": "Icelandic", "it": "Italian", "ja": "Japanese", "ka": "Georgian",
    "kk": "Kazakh", "ko": "Korean", "la": "Latin", "lt": "Lithuanian", "lv": "Latvian",
    "nl": "Dutch", "no": "Norwegian", "pl": "Polish", "pt": "Portuguese", "ro": "Romanian",
    "ru": "Russian", "sk": "Slovak", "sl": "Slovenian", "sr": "Serbian", "sv": "Swedish",
    "sw": "Swahili", "ta": "Tamil", "th": "Thai", "tr": "Turkish", "uk": "Ukrainian",
    "ur": "Urdu", "vi": "Vietnamese", "zh": "Chinese",
}  # fmt: skip
"""By the codes that files and columns are named after."""


@dataclass(frozen=True)
class ParallelText:
    """A direction of translation: from one language to another, in one table or two files."""

    name: str
    source: str
    target: str
    files: tuple[Path, ...]


Pair = tuple[str, str]
"""A sentence and its translation."""


def find(folder: str | Path) -> dict[str, ParallelText]:
    """Return the parallel texts in a folder by name, a direction each; hidden files are left out.

    Raises DataError for a missing folder, and two texts of one name.
    """
    places: dict[tuple[Path, str], dict[str, Path]] = {}
    for path in files(Path(folder)):
        language = path.suffix[1:]
        if language in LANGUAGES:
            places.setdefault((path.parent, path.stem), {})[language] = path
        elif path.suffix == ".tsv":
            places |= {(path, path.stem): dict.fromkeys(_head(path), path)}
    found: dict[str, ParallelText] = {}
    for (_, stem), parts in places.items():
        for source, target in itertools.permutations(parts, 2):
            label = "" if {source, target} == set(stem.split("-")) else f"{stem}-"
            name = f"translate-{label}{source}-{target}"
            paths = tuple(dict.fromkeys((parts[source], parts[target])))
            if other := found.get(name):
                fix = "keep one of them"
                raise DataError(f"{paths[0]}: is {name}, as {other.files[0]} is; {fix}")
            found[name] = ParallelText(name, source, target, paths)
    return dict(sorted(found.items()))


def _head(path: Path) -> list[str]:
    """Return the languages of a table's columns, none where its first line does not name them."""
    line = read_bytes(path)[:1000].partition(b"\n")[0].decode(errors="replace")
    names = line.removeprefix("\ufeff").strip("\r ").split("\t")
    return names if len(names) > 1 and set(names) <= set(LANGUAGES) else []


def read(text: ParallelText, limit: int | None = None) -> list[Pair]:
    """Read the first `limit` pairs; lines that are empty on both sides are left out.

    All are checked. Raises DataError, with file and line, for files that are empty, no UTF-8 or not
    as long as each other, for a row with other columns and for a sentence without translation.
    """
    rows = _table(text) if len(text.files) == 1 else _lines(text)
    pairs: list[Pair] = []
    for number, (source, target) in rows:
        if bool(source) != bool(target):
            empty = text.files[-1] if source else text.files[0]
            raise DataError(f"{empty}, line {number}: has no translation; add it, or empty both")
        if source:
            pairs.append((source, target))
    if not pairs:
        raise DataError(f"{text.files[0]}: there is no sentence in it")
    return pairs[:limit]


def fingerprint(text: ParallelText, pairs: list[Pair]) -> str:
    """Return the SHA-256 (hex) of the direction and the pairs."""
    total = hashlib.sha256(f"{text.source} {text.target}".encode())
    for sentence in itertools.chain.from_iterable(pairs):
        total.update(hashlib.sha256(sentence.encode()).digest())
    return total.hexdigest()


def _lines(text: ParallelText) -> list[tuple[int, Pair]]:
    first, second = (_split(path) for path in text.files)
    if len(first) != len(second):
        sizes = f"{len(first):,} lines, {text.files[1]} {len(second):,}"
        fix = "line n of one must be the translation of line n of the other"
        raise DataError(f"{text.files[0]}: has {sizes}; {fix}")
    return list(enumerate(zip(first, second, strict=True), 1))


def _table(text: ParallelText) -> list[tuple[int, Pair]]:
    (path,) = text.files
    head, *lines = _split(path)
    names = head.split("\t")
    columns = names.index(text.source), names.index(text.target)
    rows: list[tuple[int, Pair]] = []
    for number, line in enumerate(lines, 2):
        cells = line.split("\t") if line else [""] * len(names)
        if len(cells) != len(names):
            expected = f"the first line names {len(names)}: {', '.join(names)}"
            raise DataError(f"{path}, line {number}: has {len(cells)} columns; {expected}")
        source, target = (cells[column].strip() for column in columns)
        rows.append((number, (source, target)))
    return rows


def _split(path: Path) -> list[str]:
    """Return the lines of a file, without the empty ones at its end."""
    lines = [line.strip("\r ") for line in read_text(path).split("\n")]
    while lines and not lines[-1]:
        lines.pop()
    return lines
