"""Readers: from files, folders, globs, the default corpus and data sets to documents.

A source is a file (.txt, .jsonl with a "text" field, .parquet with a "text" column; .txt and .jsonl
also as .gz and .zst), a folder (read recursively, sorted), a glob, `default`, or
`hf:NAME[@CONFIG][:SPLIT]`, a data set of the hub or a folder that `datasets` reads. Text must be
UTF-8; it comes out as it stands in the file, line ends included, without a byte order mark.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

from nacre.data import embedded
from nacre.data.bytestream import chunks, lines, missing_extra
from nacre.errors import DataError
from nacre.tokenizer import check_text

DEFAULT = "default"
Errors: TypeAlias = Literal["strict", "replace"]

FORMATS = (".txt", ".jsonl", ".parquet")
COMPRESSIONS = (".gz", ".zst")
READABLE = "nacre reads .txt, .jsonl (also .gz and .zst) and .parquet"

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Document:
    """One text and where it came from."""

    text: str
    source: str


@dataclass(frozen=True)
class Inventory:
    """What `check` found: the files, in reading order, and their bytes on disk.

    `total_bytes` is about what there is to read: None for data sets, whose size is not known,
    bytes on disk for compressed files.
    """

    files: tuple[Path, ...]
    total_bytes: int | None


def check(sources: Sequence[str]) -> Inventory:
    """Find what the sources name without reading it.

    Raises DataError that lists every missing path, unknown extension, empty or unreadable file and
    glob or folder without text; ConfigError when a source needs a package that is not installed.
    """
    problems: list[str] = []
    files: list[Path] = []
    total: int | None = 0
    if not sources:
        problems.append("no source is given: name files, folders, globs, hf:NAME or default")
    for source in sources:
        try:
            if source == DEFAULT:
                total = None if total is None else total + embedded.ABOUT_BYTES
            elif source.startswith("hf:"):
                _check_data_set(source)
                total = None
            else:
                files += _files(source)
        except DataError as error:
            problems.append(str(error))
    for path in files:
        try:
            size = _check_file(path)
            total = None if total is None else total + size
        except DataError as error:
            problems.append(str(error))
    if problems:
        shown = problems[:10]
        if len(problems) > len(shown):
            shown.append(f"... and {len(problems) - len(shown)} more")
        raise DataError(
            shown[0] if len(problems) == 1 else "\n  - ".join(["the data has problems", *shown])
        )
    return Inventory(tuple(files), total)


def read(sources: Sequence[str], *, errors: Errors = "strict") -> Iterator[Document]:
    """Yield the documents of the sources in order; those without any text are left out.

    `errors="replace"` puts U+FFFD where the bytes are no UTF-8 and logs a warning with the number.
    The sources are checked at once, the files' content as it is read. Raises as `check` does, and
    DataError that names file and place for: text that is binary or invalid UTF-8, damaged
    compression, a line that is no JSON object with a "text", a table without text, lone surrogates.
    """
    check(sources)
    return _read(sources, errors)


def _read(sources: Sequence[str], errors: Errors) -> Iterator[Document]:
    for source in sources:
        if source == DEFAULT:
            for name, text in embedded.texts():
                yield Document(text, f"{DEFAULT}:{name}")
        elif source.startswith("hf:"):
            yield from _read_data_set(source)
        else:
            for path in _files(source):
                yield from read_file(path, errors)


def read_file(path: Path, errors: Errors = "strict") -> Iterator[Document]:
    """Yield the documents of one file; raises DataError when it has none."""
    kind = _format(path)
    reader = {".txt": _read_txt, ".jsonl": _read_jsonl, ".parquet": _read_parquet}[kind]
    decoder = _Decoder(path, errors)
    empty = True
    for document in reader(path, decoder):
        if document.text:
            empty = False
            yield document
    decoder.warn()
    if empty:
        raise DataError(f"{path}: there is no text in it")


def _format(path: Path) -> str:
    """Return the format a file name says, or raise DataError."""
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = suffixes[-1:] and suffixes[-1] in COMPRESSIONS
    kind = (suffixes[-2:-1] if compressed else suffixes[-1:]) or [""]
    if kind[0] not in FORMATS or (compressed and kind[0] == ".parquet"):
        raise DataError(f"{path}: unknown extension {''.join(suffixes[-2:])!r}; {READABLE}")
    return kind[0]


def _readable(path: Path) -> bool:
    try:
        _format(path)
    except DataError:
        return False
    return True


def _files(source: str) -> list[Path]:
    """Return the files a source names, sorted; of a folder or glob those that nacre reads."""
    if not source:
        raise DataError("an empty source: name a file, folder, glob, hf:NAME or default")
    path = Path(source)
    with contextlib.suppress(RuntimeError):  # no such user's home: the name stands as it is
        path = path.expanduser()
    if path.is_file():
        return [path]
    if path.is_dir():
        found = [item for item in path.rglob("*") if item.is_file() and not _hidden(item, path)]
        what = "the folder"
    elif glob.has_magic(source):
        found = [Path(item) for item in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        found = [item for item in found if item.is_file()]
        what = "the pattern"
    elif path.exists():
        raise DataError(f"{source}: it is no regular file")
    else:
        raise DataError(f"{source}: there is no such file, folder or pattern")
    chosen = sorted(item for item in found if _readable(item))
    if not chosen:
        others = f"; {len(found)} files have other extensions" if found else ""
        raise DataError(f"{source}: {what} has no file that nacre reads{others}; {READABLE}")
    if len(chosen) < len(found):
        logger.info("%s: %d files are left out: %s", source, len(found) - len(chosen), READABLE)
    return chosen


def _hidden(path: Path, root: Path) -> bool:
    return any(part.startswith(".") for part in path.relative_to(root).parts)


def _check_file(path: Path) -> int:
    """Return the file's bytes after a look at its name, size, permission and needed packages."""
    kind = _format(path)
    size = path.stat().st_size
    if size == 0:
        raise DataError(f"{path}: the file is empty")
    if not os.access(path, os.R_OK):
        raise DataError(f"{path}: permission to read it is denied")
    if kind == ".parquet":
        _import_pyarrow(path)
    if path.suffix.lower() == ".zst":
        _import_zstandard(path)
    return size


def _import_pyarrow(path: Path) -> Any:
    try:
        import pyarrow.parquet
    except ImportError:
        raise missing_extra(path, "pyarrow") from None
    return pyarrow


def _import_zstandard(path: Path) -> None:
    try:
        import zstandard  # noqa: F401
    except ImportError:
        raise missing_extra(path, "zstandard") from None


class _Decoder:
    """UTF-8 to text for one file, counting what it had to replace."""

    def __init__(self, path: Path, errors: Errors) -> None:
        self.path, self.errors, self.replaced = path, errors, 0

    def decode(self, data: bytes, offset: int, row: str = "") -> str:
        """Decode bytes that begin at byte `offset` of the file, or of a table's `row`."""
        try:
            return data.decode()
        except UnicodeDecodeError as error:
            if self.errors == "strict":
                raise DataError(
                    f"{self.path}{row}: invalid UTF-8 at byte {offset + error.start} "
                    f"(0x{data[error.start]:02X}); convert it to UTF-8 (`nacre grow` and `nacre "
                    "tokenizer build` can also accept the loss, with --errors replace)"
                ) from None
            text = data.decode(errors="replace")
            self.replaced += text.count("\ufffd") - data.count("\ufffd".encode())
            return text

    def warn(self) -> None:
        """Log how many sequences were replaced, if any."""
        if self.replaced:
            logger.warning("%s: %d invalid UTF-8 sequences became U+FFFD", self.path, self.replaced)


def _read_txt(path: Path, decoder: _Decoder) -> Iterator[Document]:
    data = b"".join(chunks(path))
    yield Document(decoder.decode(data, 0).removeprefix("\ufeff"), str(path))


def _read_jsonl(path: Path, decoder: _Decoder) -> Iterator[Document]:
    offset = 0
    for number, line in enumerate(lines(path), start=1):
        text = decoder.decode(line, offset)
        if offset == 0:
            text = text.removeprefix("\ufeff")
        offset += len(line)
        if text.strip():
            where = f"{path}, line {number}"
            yield Document(_json_text(text, where), where)


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


def _read_parquet(path: Path, decoder: _Decoder) -> Iterator[Document]:
    pyarrow = _import_pyarrow(path)
    row = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as table:
            _check_column(path, table.schema_arrow, pyarrow)
            for batch in table.iter_batches(batch_size=1024, columns=["text"]):
                for value in batch.column(0).cast(pyarrow.large_binary()):
                    row += 1
                    text = decoder.decode(value.as_py() or b"", 0, f", row {row}")
                    yield Document(text, f"{path}, row {row}")
    except (pyarrow.ArrowException, OSError) as error:
        raise DataError(f"{path}: the parquet file is damaged ({_first_line(error)})") from None


def _check_column(path: Path, schema: Any, pyarrow: Any) -> None:
    types = pyarrow.types
    if "text" in schema.names:
        kind = schema.field("text").type
        if types.is_string(kind) or types.is_large_string(kind):
            return
        raise DataError(f'{path}: the column "text" holds {kind}, not strings')
    raise DataError(f'{path}: there is no column "text"; the columns are {", ".join(schema.names)}')


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _data_set_name(source: str) -> tuple[str, str | None, str]:
    """Split "hf:NAME[@CONFIG][:SPLIT]" into name, configuration and split ("train" by default)."""
    name, _, split = source.removeprefix("hf:").partition(":")
    name, _, configuration = name.partition("@")
    return name, configuration or None, split or "train"


def _check_data_set(source: str) -> None:
    name, *_ = _data_set_name(source)
    if not name:
        raise DataError(f"{source}: a data set's name must follow hf:")
    if name.startswith((".", "/", "~")) and not Path(name).expanduser().is_dir():
        raise DataError(f"{source}: there is no folder {name}")
    try:
        import datasets  # noqa: F401
    except ImportError:
        raise missing_extra(source, "datasets") from None


def _read_data_set(source: str) -> Iterator[Document]:
    rows = _rows(source, _open_data_set(source, *_data_set_name(source)))
    column = ""
    for number, row in enumerate(rows, start=1):
        column = column or _text_column(source, row)
        text = row[column]
        if text is None or text == "":
            continue
        where = f"{source}, row {number}"
        if not isinstance(text, str):
            raise DataError(f"{where}: {column!r} holds {type(text).__name__}, not a string")
        check_text(text, where)
        yield Document(text, where)
    if not column:
        raise DataError(f"{source}: the data set is empty")


def _open_data_set(source: str, name: str, configuration: str | None, split: str) -> Any:
    """Open a saved data set, a folder of data files, or one of the hub, as a stream."""
    import datasets

    folder = Path(name).expanduser()
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return saved
            if split not in saved:
                raise DataError(
                    f"{source}: no split {split!r}; there are {', '.join(map(str, saved))}"
                )
            return saved[split]
        target = str(folder) if folder.is_dir() else name
        return datasets.load_dataset(target, configuration, split=split, streaming=True)
    except DataError:
        raise
    except Exception as error:  # datasets raises about anything here
        raise DataError(f"{source}: cannot open the data set ({_first_line(error)})") from error


def _rows(source: str, rows: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except Exception as error:  # a broken line or connection
        raise DataError(f"{source}: the data set broke off ({_first_line(error)})") from error


def _text_column(source: str, row: dict[str, Any]) -> str:
    strings = [name for name, value in row.items() if isinstance(value, str)]
    if "text" in row:
        return "text"
    if len(strings) == 1:
        return strings[0]
    raise DataError(
        f'{source}: no column "text" and not exactly one column of strings; '
        f"the columns are {', '.join(row)}"
    )
