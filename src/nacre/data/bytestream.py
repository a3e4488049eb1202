"""Bytes of plain, gzip and zstandard files, with damage reported in one line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

from nacre.errors import ConfigError, DataError, Problem

_BLOCK = 1 << 20


def missing_extra(source: object, package: str) -> ConfigError:
    """Return the error for a source that needs a package of the extra `nacre[data]`."""
    return ConfigError(
        Problem("data", f"{source} needs the package {package}", "pip install 'nacre[data]'")
    )


def chunks(path: Path) -> Iterator[bytes]:
    """Yield the decompressed bytes of a text file in blocks.

    Raises DataError when it cannot be opened, its compression is damaged, or its first block holds
    a NUL byte and so is no text.
    """
    first = True
    for block in _decompressed(path):
        if first and b"\0" in block[:8192]:
            raise DataError(
                f"{path}: it looks binary (a NUL at byte {block.index(0)}); text must be UTF-8"
            )
        first = False
        yield block


def lines(path: Path) -> Iterator[bytes]:
    """Yield the lines of a text file with their line ends; raises as `chunks` does."""
    begun: list[bytes] = []
    for block in chunks(path):
        *ended, rest = block.split(b"\n")
        for part in ended:
            yield b"".join([*begun, part, b"\n"])
            begun = []
        begun.append(rest)
    last = b"".join(begun)
    if last:
        yield last


def _decompressed(path: Path) -> Iterator[bytes]:
    suffix = path.suffix.lower()
    try:
        with path.open("rb") as file:
            if suffix == ".gz":
                yield from _gunzip(file)
            elif suffix == ".zst":
                yield from _unzstd(file, path)
            else:
                yield from iter(lambda: file.read(_BLOCK), b"")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{path}: the gzip file is cut off or damaged ({error})") from None
    except PermissionError:
        raise DataError(f"{path}: permission to read it is denied") from None
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror or error})") from None


def _gunzip(file: BinaryIO) -> Iterator[bytes]:
    with gzip.GzipFile(fileobj=file) as unzipped:
        yield from iter(lambda: unzipped.read(_BLOCK), b"")


def _unzstd(file: BinaryIO, path: Path) -> Iterator[bytes]:
    """Decompress frame by frame: the package's own reader takes a cut file for a complete one."""
    try:
        import zstandard
    except ImportError:
        raise missing_extra(path, "zstandard") from None
    frame = zstandard.ZstdDecompressor().decompressobj()
    ended = True
    try:
        for block in iter(lambda: file.read(_BLOCK), b""):
            data = block
            while data:
                out = frame.decompress(data)
                data, ended = frame.unused_data, frame.eof
                if ended:
                    frame = zstandard.ZstdDecompressor().decompressobj()
                if out:
                    yield out
    except zstandard.ZstdError as error:
        raise DataError(f"{path}: the zstandard file is damaged ({error})") from None
    if not ended:
        raise DataError(f"{path}: the zstandard file is cut off")
