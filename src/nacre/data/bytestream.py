"""Bytes of plain, gzip and zstandard files, with damage reported in one line."""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Callable, Iterator
from typing import BinaryIO, TypeAlias

from nacre.data.files import File, suffixes
from nacre.errors import ConfigError, DataError, Problem, clone_install

Advance: TypeAlias = Callable[[int], object]
"""Receives how many bytes of the sources were read since its last call."""

_BLOCK = 1 << 20
_SLICES = 64, 4096  # bytes of zstandard decompressed at a time: they may grow thousands of times


def missing_extra(source: object, package: str) -> ConfigError:
    """Return the error for a source that needs a package of the extra `data`."""
    return ConfigError(
        Problem("data", f"{source} needs the package {package}", clone_install("data"))
    )


def chunks(file: File, advance: Advance) -> Iterator[bytes]:
    """Yield the decompressed bytes of a text file in blocks; `advance` gets the bytes of the file.

    Raises DataError when it cannot be opened, its compression is damaged, or its first block holds
    a NUL byte and so is no text.
    """
    first = True
    for block in _decompressed(file, advance):
        if first and b"\0" in block[:8192]:
            raise DataError(
                f"{file.name}: it looks binary (a NUL at byte {block.index(0)}); text must be UTF-8"
            )
        first = False
        yield block


def lines(file: File, advance: Advance) -> Iterator[bytes]:
    """Yield the lines of a text file with their line ends; raises as `chunks` does."""
    begun: list[bytes] = []
    for block in chunks(file, advance):
        *ended, rest = block.split(b"\n")
        for part in ended:
            yield b"".join([*begun, part, b"\n"])
            begun = []
        begun.append(rest)
    last = b"".join(begun)
    if last:
        yield last


def _decompressed(file: File, advance: Advance) -> Iterator[bytes]:
    suffix = suffixes(file.name)[-1]
    try:
        with file.open() as opened:
            if suffix == ".gz":
                yield from _gunzip(opened, advance)
            elif suffix == ".zst":
                yield from _unzstd(opened, file, advance)
            else:
                for block in iter(lambda: opened.read(_BLOCK), b""):
                    advance(len(block))
                    yield block
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise DataError(f"{file.name}: the gzip file is cut off or damaged ({error})") from None
    except PermissionError:
        raise DataError(f"{file.name}: permission to read it is denied") from None
    except OSError as error:
        raise DataError(f"{file.name}: cannot be read ({error.strerror or error})") from None


def _gunzip(opened: BinaryIO, advance: Advance) -> Iterator[bytes]:
    done = 0
    with gzip.GzipFile(fileobj=opened) as unzipped:
        for block in iter(lambda: unzipped.read(_BLOCK), b""):
            place = opened.tell()
            advance(place - done)
            done = place
            yield block
        advance(opened.tell() - done)


def _unzstd(opened: BinaryIO, file: File, advance: Advance) -> Iterator[bytes]:
    """Decompress frame by frame: the package's own reader takes a cut file for a complete one."""
    try:
        import zstandard
    except ImportError:
        raise missing_extra(file.name, "zstandard") from None
    frame = zstandard.ZstdDecompressor().decompressobj()
    ended, size = True, _SLICES[0]
    try:
        for block in iter(lambda: opened.read(_BLOCK), b""):
            begin = 0
            while begin < len(block):
                data = block[begin : begin + size]
                begin += size
                while data:
                    out = frame.decompress(data)
                    data, ended = frame.unused_data, frame.eof
                    if ended:
                        frame = zstandard.ZstdDecompressor().decompressobj()
                    if out:
                        size = min(max(size * _BLOCK // len(out), _SLICES[0]), _SLICES[1])
                        yield out
            advance(len(block))
    except zstandard.ZstdError as error:
        raise DataError(f"{file.name}: the zstandard file is damaged ({error})") from None
    if not ended:
        raise DataError(f"{file.name}: the zstandard file is cut off")
