"""Readers: from files, folders, globs, URLs, the default corpus and data sets to documents.

A source is a file (.txt, .jsonl with a "text" field, .parquet with a "text" column; .txt and .jsonl
also as .gz and .zst), a folder (read recursively, sorted), a glob, the URL of one of these
(`s3://bucket/text/*.jsonl.zst`), `default`, or `hf:NAME[@CONFIG][:SPLIT]`, a data set of the hub or
a folder that `datasets` reads. Text must be UTF-8; it comes out as it stands in the file, line ends
included, without a byte order mark.
"""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

from nacre.data import embedded, formats
from nacre.data.bytestream import Advance
from nacre.data.files import File, find, is_url
from nacre.data.formats import COMPRESSIONS, Errors, Piece
from nacre.data.hub import DataSet
from nacre.errors import DataError

__all__ = [
    "COMPRESSIONS",
    "DEFAULT",
    "Document",
    "Errors",
    "Inventory",
    "check",
    "pieces",
    "read",
    "read_file",
]

DEFAULT = "default"


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    source: str


@dataclass(frozen=True)
class Default:
    """The default corpus as a part of the sources."""

    @property
    def identity(self) -> list[Any]:
        """Plain JSON: it depends on the version of Python alone."""
        return [DEFAULT, sys.version]


Part: TypeAlias = File | DataSet | Default
"""What is read one after the other: one file, or a source that is no file."""


@dataclass(frozen=True)
class Inventory:
    """What `check` found: what there is to read of each source, in reading order."""

    by_source: tuple[tuple[Part, ...], ...]

    @property
    def parts(self) -> tuple[Part, ...]:
        """What there is to read."""
        return tuple(part for parts in self.by_source for part in parts)

    @property
    def files(self) -> tuple[File, ...]:
        """The files among the parts."""
        return tuple(part for part in self.parts if isinstance(part, File))

    @property
    def total_bytes(self) -> int | None:
        """About what there is to read: None when a part, a data set, does not say its size.

        Of compressed files these are the bytes of the file, not of the text.
        """
        total = 0
        for part in self.parts:
            size = size_of(part)
            if size is None:
                return None
            total += size
        return total


def size_of(part: Part) -> int | None:
    """Return the bytes of one part, None where it is not known."""
    if isinstance(part, Default):
        return embedded.ABOUT_BYTES
    return part.size if isinstance(part, File) else None


def check(sources: Sequence[str]) -> Inventory:
    """Find what the sources name without reading it.

    Raises DataError that lists every missing path, unknown extension, empty or unreadable file and
    glob, folder or URL without text; ConfigError when a source needs a package that is not
    installed.
    """
    problems: list[str] = []
    found: list[tuple[Part, ...]] = []
    if not sources:
        problems.append("no source is given: name files, folders, globs, URLs, hf:NAME or default")
    for source in sources:
        try:
            if source == DEFAULT:
                found.append((Default(),))
            elif source.startswith("hf:") and not is_url(source):
                found.append((DataSet.parse(source),))
            else:
                found.append(tuple(find(source, formats.is_readable, formats.READABLE)))
        except DataError as error:
            problems.append(str(error))
    inventory = Inventory(tuple(found))
    for file in inventory.files:
        try:
            formats.check_file(file)
        except DataError as error:
            problems.append(str(error))
    if problems:
        shown = problems[:10]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise DataError(
            shown[0] if len(problems) == 1 else "\n  - ".join(["the data has problems", *shown])
        )
    return inventory


def read(sources: Sequence[str], *, errors: Errors = "strict") -> Iterator[Document]:
    """Yield the documents of the sources in order; those without any text are left out.

    `errors="replace"` puts U+FFFD where the bytes are no UTF-8 and logs a warning with the number.
    The sources are checked at once, the files' content as it is read. A remote file whose
    connection breaks is read on from there, five times. Raises as `check` does, and DataError that
    names file and place for: text that is binary or invalid UTF-8, damaged compression, a line that
    is no JSON object with a "text", a table without text, lone surrogates, a remote file that
    cannot be read or was changed meanwhile.
    """
    return _documents(check(sources).parts, errors)


def read_file(file: File, errors: Errors = "strict") -> Iterator[Document]:
    """Yield the documents of one file; raises DataError when it has none."""
    return _documents([file], errors)


def pieces(part: Part, errors: Errors, advance: Advance = lambda _: None) -> Iterator[Piece]:
    """Yield the documents of one part in pieces that fit into memory.

    `advance` gets the bytes read: of files as they are on disk, of the others those of the text.
    """
    if isinstance(part, File):
        yield from formats.pieces(part, errors, advance)
    elif isinstance(part, DataSet):
        yield from part.pieces(advance)
    else:
        for name, text in embedded.texts():
            advance(len(text.encode()))
            yield Piece(text, f"{DEFAULT}:{name}")


def _documents(parts: Iterable[Part], errors: Errors) -> Iterator[Document]:
    for part in parts:
        begun: list[str] = []
        for piece in pieces(part, errors):
            begun.append(piece.text)
            if piece.last:
                text = "".join(begun)
                begun = []
                if text:
                    yield Document(text, piece.source)
