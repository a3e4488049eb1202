"""From the bytes of one file to documents: .txt, .jsonl and .parquet, never a whole file in memory.

Documents come as pieces of text, because one document (a large .txt) may not fit into memory.
"""

from __future__ import annotations

import codecs
import json
import logging
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

from nacre.data.bytestream import Advance, chunks, lines, missing_extra
from nacre.data.files import File, is_denied, suffixes
from nacre.errors import DataError, one_line
from nacre.tokenizer import check_text

Errors: TypeAlias = Literal["strict", "replace"]

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
READABLE = "nacre reads .txt, .jsonl (also .gz and .zst) and .parquet"

_ROWS = 64  # of a table at a time
_PAGE = 1 << 20  # bytes of a table read at a time: by default pyarrow reads whole row groups

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Piece:
    """Text as it was read and where it came from; `last` ends the document."""

    text: str
    source: str
    last: bool = True


def name_format(name: str) -> str:
    """Return the format that a file's name says, or raise DataError."""
    extensions = suffixes(name)
    compressed = extensions[-1:] and extensions[-1] in COMPRESSIONS
    kind = (extensions[-2:-1] if compressed else extensions[-1:]) or [""]
    if kind[0] not in FORMATS or (compressed and kind[0] == ".parquet"):
        raise DataError(f"{name}: unknown extension {''.join(extensions[-2:])!r}; {READABLE}")
    return kind[0]


def is_readable(name: str) -> bool:
    """Say whether nacre reads files of that name."""
    try:
        name_format(name)
    except DataError:
        return False
    return True


def check_file(file: File) -> None:
    """Look at a file's name, size, permission and needed packages without opening it."""
    kind = name_format(file.name)
    if file.size == 0:
        raise DataError(f"{file.name}: the file is empty")
    if is_denied(file):
        raise DataError(f"{file.name}: permission to read it is denied")
    if kind == ".parquet":
        _import_pyarrow(file.name)
        if file.size is None:
            raise DataError(
                f"{file.name}: the server does not say how long it is, which parquet needs; "
                "download the file"
            )
    if suffixes(file.name)[-1] == ".zst":
        _import_zstandard(file.name)


def pieces(file: File, errors: Errors, advance: Advance) -> Iterator[Piece]:
    """Yield a file's documents in pieces; `advance` gets the bytes of the file as they are read.

    A document without text is one empty piece. Raises DataError when no document has text.
    """
    reader = {".txt": _txt, ".jsonl": _jsonl, ".parquet": _parquet}[name_format(file.name)]
    decoder = _Decoder(file.name, errors)
    empty = True
    for piece in reader(file, decoder, advance):
        empty = empty and not piece.text
        yield piece
    decoder.warn()
    if empty:
        raise DataError(f"{file.name}: there is no text in it")


def _import_pyarrow(name: str) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing_extra(name, "pyarrow") from None
    return pyarrow


def _import_zstandard(name: str) -> None:
    try:
        import zstandard  # noqa: F401
    except ImportError:
        raise missing_extra(name, "zstandard") from None


class _Decoder:
    """UTF-8 to text for one file, counting what it had to replace."""

    def __init__(self, name: str, errors: Errors) -> None:
        self.name, self.errors, self.replaced = name, errors, 0

    def decode(self, data: bytes, offset: int, row: str = "") -> str:
        """Decode bytes that begin at byte `offset` of the file, or of a table's `row`."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            if self.errors == "strict":
                raise DataError(
                    f"{self.name}{row}: invalid UTF-8 at byte {offset + error.start} "
                    f"(0x{data[error.start]:02X}); convert it to UTF-8 (`nacre grow` and `nacre "
                    "tokenizer build` can also accept the loss, with --errors replace)"
                ) from None
            text = data.decode(errors="replace")
            self.replaced += text.count("\ufffd") - data.count("\ufffd".encode())
            return text

    def warn(self) -> None:
        """Log how many sequences were replaced, if any."""
        if self.replaced:
            logger.warning("%s: %d invalid UTF-8 sequences became U+FFFD", self.name, self.replaced)


def _txt(file: File, decoder: _Decoder, advance: Advance) -> Iterator[Piece]:
    rest, offset = b"", 0
    for block in chunks(file, advance):
        data = rest + block
        whole = len(data) - _begun(data)
        text = decoder.decode(data[:whole], offset)
        yield Piece(text if offset else text.removeprefix("\ufeff"), file.name, last=False)
        rest, offset = data[whole:], offset + whole
    yield Piece(decoder.decode(rest, offset), file.name)


def _begun(data: bytes) -> int:
    """Return how many bytes at the end of `data` begin a character that goes on after it."""
    incremental = codecs.getincrementaldecoder("utf-8")("replace")
    incremental.decode(data[-3:])
    return len(incremental.getstate()[0])


def _jsonl(file: File, decoder: _Decoder, advance: Advance) -> Iterator[Piece]:
    offset = 0
    for number, line in enumerate(lines(file, advance), start=1):
        text = decoder.decode(line, offset)
        if offset == 0:
            text = text.removeprefix("\ufeff")
        offset += len(line)
        if text.strip():
            where = f"{file.name}, line {number}"
            yield Piece(_json_text(text, where), where)


def _json_text(line: str, where: str) -> str:
    try:
        record = json.loads(line)
    except (ValueError, RecursionError) as error:
        raise DataError(f"{where}: it is no JSON ({error})") from None
    text = record.get("text") if isinstance(record, dict) else None
    if not isinstance(text, str):
        raise DataError(f'{where}: it has no "text" with a string; each line is {{"text": "..."}}')
    check_text(text, where)
    return text


def _parquet(file: File, decoder: _Decoder, advance: Advance) -> Iterator[Piece]:
    pyarrow = _import_pyarrow(file.name)
    row = done = 0
    try:
        with (
            file.open() as opened,
            pyarrow.parquet.ParquetFile(opened, buffer_size=_PAGE) as table,
        ):
            _check_column(file.name, table.schema_arrow, pyarrow)
            for batch in table.iter_batches(batch_size=_ROWS, columns=["text"]):
                for value in batch.column(0).cast(pyarrow.large_binary()):
                    row += 1
                    text = decoder.decode(value.as_py() or b"", 0, f", row {row}")
                    yield Piece(text, f"{file.name}, row {row}")
                place = (file.size or 0) * row // table.metadata.num_rows
                advance(place - done)
                done = place
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{file.name}: the parquet file is damaged ({one_line(error)})") from None


def _check_column(name: str, schema: Any, pyarrow: Any) -> None:
    types = pyarrow.types
    if "text" in schema.names:
        kind = schema.field("text").type
        if types.is_string(kind) or types.is_large_string(kind):
            return
        raise DataError(f'{name}: the column "text" holds {kind}, not strings')
    raise DataError(f'{name}: there is no column "text"; the columns are {", ".join(schema.names)}')
