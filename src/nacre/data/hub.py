"""Data sets of the hub, streamed, and folders that `datasets` reads: `hf:NAME[@CONFIG][:SPLIT]`."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacre.data.bytestream import Advance, missing_extra
from nacre.data.formats import Piece
from nacre.errors import DataError, one_line
from nacre.tokenizer import check_text


@dataclass(frozen=True)
class DataSet:
    """A data set as a source names it; `split` is "train" by default."""

    source: str
    name: str
    configuration: str | None
    split: str

    @classmethod
    def parse(cls, source: str) -> DataSet:
        """Read a source; DataError for one without a name or a folder that is missing."""
        name, _, split = source.removeprefix("hf:").partition(":")
        name, _, configuration = name.partition("@")
        found = cls(source, name, configuration or None, split or "train")
        if not name:
            raise DataError(f"{source}: a data set's name must follow hf:")
        if name.startswith((".", "/", "~")) and not found.folder.is_dir():
            raise DataError(f"{source}: there is no folder {name}")
        try:
            import datasets  # noqa: F401
        except ImportError:
            raise missing_extra(source, "datasets") from None
        return found

    @property
    def folder(self) -> Path:
        """Where the data set is, if it is a folder."""
        return Path(self.name).expanduser()

    @property
    def identity(self) -> list[Any]:
        """Plain JSON: the name, and for a folder path, size and time of every file in it."""
        inside = sorted(self.folder.rglob("*")) if self.folder.is_dir() else []
        states = [(path, path.stat()) for path in inside if path.is_file()]
        stamps = [[str(path.resolve()), state.st_size, state.st_mtime_ns] for path, state in states]
        return [self.source, stamps]

    def pieces(self, advance: Advance) -> Iterator[Piece]:
        """Yield the documents; `advance` gets their bytes. A few rows are in memory at a time."""
        column = ""
        for number, row in enumerate(_rows(self.source, open_rows(self)), start=1):
            column = column or _text_column(self.source, row)
            text = row[column]
            if text is None or text == "":
                continue
            where = f"{self.source}, row {number}"
            if not isinstance(text, str):
                raise DataError(f"{where}: {column!r} holds {type(text).__name__}, not a string")
            check_text(text, where)
            advance(len(text.encode()))
            yield Piece(text, where)
        if not column:
            raise DataError(f"{self.source}: the data set is empty")


def open_rows(which: DataSet) -> Any:
    """Open a saved data set, a folder of data files, or one of the hub, as a stream of rows."""
    import datasets

    folder, source, split = which.folder, which.source, which.split
    try:
        if (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file():
            saved = datasets.load_from_disk(str(folder))
            if not isinstance(saved, datasets.DatasetDict):
                return _only_text(saved)
            if split not in saved:
                raise DataError(
                    f"{source}: no split {split!r}; there are {', '.join(map(str, saved))}"
                )
            return _only_text(saved[split])
        target = str(folder) if folder.is_dir() else which.name
        return _only_text(
            datasets.load_dataset(target, which.configuration, split=split, streaming=True)
        )
    except DataError:
        raise
    except Exception as error:  # datasets raises about anything here
        raise DataError(f"{source}: cannot open the data set ({one_line(error)})") from error


def _only_text(rows: Any) -> Any:
    """Leave out columns beside a known "text", pictures above all: they would be decoded."""
    return rows.select_columns(["text"]) if "text" in (rows.column_names or ()) else rows


def _rows(source: str, rows: Any) -> Iterator[dict[str, Any]]:
    try:
        yield from rows
    except Exception as error:  # a broken line or connection
        raise DataError(f"{source}: the data set broke off ({one_line(error)})") from error


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
