"""Reading files that somebody else may have written, in bounded memory and time.

A reader that raises its own kind of error calls these and turns `OSError` and `ValueError` into it.
The limits are far above what any real file holds; `SECURITY.md` says what they are for.
"""

from __future__ import annotations

import errno
import json
import os
import re
import stat
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, cast

FILE_BYTES = 64 * 2**20
"""Of a file that is read whole."""

LINE_BYTES = 2**20
"""Of one record in a file of lines."""

HEADER_BYTES = 2**25
"""Of the header of a file of weights; safetensors itself allows three times as much."""

VALUES = 3_000_000
"""Of one JSON text: with these it takes at most about 400 MB as Python's objects."""

DEPTH = 100
"""Of lists and mappings in each other."""

DIGITS = 40
"""Of a whole number; `transformers` writes 10^30 for a length without bound."""

LARGEST_DEPTH = 1024
"""Blocks of a model: a configuration that claims more is refused before anything counts them."""

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


class RefusedFile(OSError):
    """A file that is not read: no regular file, too large, or a link out of its folder."""

    def __init__(self, path: Path, reason: str) -> None:
        super().__init__(errno.EPERM, reason, str(path))

    def __str__(self) -> str:
        return str(self.strerror)


def is_path(text: str) -> bool:
    """Say whether a text can be the path of a file: others make the system raise when asked."""
    parts = text.encode("utf-8", "replace").split(b"/")
    return bool(text) and "\0" not in text and len(text) < 4096 and max(map(len, parts)) <= 255


def read_bytes(path: Path, most: int = FILE_BYTES) -> bytes:
    """Return what a file holds.

    Raises `RefusedFile` for more than `most` bytes and for what is no regular file (a pipe or a
    device could be read for ever), and OSError as `Path.read_bytes`.
    """
    # Without O_NONBLOCK the opening itself of a pipe waits for a writer.
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))
    with os.fdopen(descriptor, "rb") as file:
        about = os.fstat(descriptor)
        if stat.S_ISDIR(about.st_mode):
            raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(path))
        if not stat.S_ISREG(about.st_mode):
            raise RefusedFile(path, "is no regular file")
        # It may have grown since; read(n) would take memory for n at once, whatever there is.
        data = file.read(min(most, about.st_size) + 1) if about.st_size <= most else b""
        size = max(about.st_size, len(data))
        if size > most:
            raise RefusedFile(path, f"has {size:,} bytes, more than the {most:,} that are read")
        return data


def read_text(path: Path, most: int = FILE_BYTES) -> str:
    """Return the text of a file; raises as `read_bytes`, and ValueError where it is no UTF-8."""
    return read_bytes(path, most).decode("utf-8")


def read_lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a file of any length without their ends; no line is over `LINE_BYTES`.

    Raises `RefusedFile` for a longer line and for what is no regular file.
    """
    if not path.is_file():
        raise RefusedFile(path, "is no regular file")
    with path.open("rb") as file:
        while line := file.readline(LINE_BYTES + 1):
            if len(line) > LINE_BYTES:
                raise RefusedFile(path, f"has a line of more than {LINE_BYTES:,} bytes")
            yield line.rstrip(b"\r\n")


def parse_json(text: str | bytes, *, surrogates: bool = True) -> Any:
    """Return what a JSON text says.

    Raises ValueError for what is no JSON, for more values, depth or digits than the limits, and
    without `surrogates` for half of a UTF-16 pair, which no UTF-8 file can hold.
    """
    if isinstance(text, bytes):
        text = text.decode("utf-8")
    values = sum(text.count(mark) for mark in ",[{")
    if values > VALUES:
        raise ValueError(f"about {values:,} values, more than the {VALUES:,} that are read")
    try:
        data: Any = json.loads(text, parse_int=_whole_number)
    except RecursionError:
        raise ValueError(f"nested more than {DEPTH} deep") from None
    if _deeper_than(DEPTH, data):
        raise ValueError(f"nested more than {DEPTH} deep")
    if not surrogates and _SURROGATE.search(text):
        json.dumps(data, ensure_ascii=False).encode("utf-8")
    return data


def read_json(path: Path, most: int = FILE_BYTES) -> Any:
    """Return what a JSON file says; raises as `read_bytes` and `parse_json` do."""
    return parse_json(read_bytes(path, most))


def as_object(data: object) -> dict[str, Any]:
    """Return data that is a JSON object; raise ValueError for what is none."""
    if not isinstance(data, dict):
        raise ValueError(f"expected a JSON object, found {type(data).__name__}")
    return cast("dict[str, Any]", data)


def _whole_number(digits: str) -> int:
    if len(digits) > DIGITS:
        raise ValueError(f"a whole number of {len(digits):,} digits")
    return int(digits)


def _deeper_than(most: int, data: object) -> bool:
    """Say whether lists and mappings are nested more than `most` deep."""
    level = [data]
    for _ in range(most):
        level = list(chain.from_iterable(_containers_in(node) for node in level))
        if not level:
            return False
    return True


def _containers_in(node: object) -> Iterator[object]:
    inside: Any = ()
    if isinstance(node, dict):
        inside = cast("dict[object, object]", node).values()
    elif isinstance(node, list):
        inside = cast("list[object]", node)
    return (child for child in inside if isinstance(child, dict | list))


def check_links(folder: Path) -> None:
    """Raise `RefusedFile` for a file of a folder that is a link to a file somewhere else.

    It would be read, hashed and copied as if it were the folder's. The links of the Hugging Face
    cache, from a snapshot and the folders in it to the blobs of the same repository, are allowed.
    """
    home = folder.resolve()
    allowed = [home]
    snapshots = [place for place in home.parents if place.name == "snapshots"]
    allowed += [place.parent / "blobs" for place in snapshots[:1]]
    for entry in sorted(home.iterdir()):
        if not entry.is_symlink():
            continue
        target = Path(os.path.realpath(entry))
        if not target.is_dir() and not any(target.is_relative_to(place) for place in allowed):
            path = folder / entry.name
            raise RefusedFile(path, f"{entry.name} is a link out of the folder: copy the file here")
