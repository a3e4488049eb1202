"""Files of text on this machine or at a URL: found and described without reading, then opened.

URLs go through fsspec: s3://, gs://, hf://, https:// and every other kind that it or an installed
package of its knows. A remote file that breaks off is opened again and read on from that byte.
"""

from __future__ import annotations

import contextlib
import glob
import io
import logging
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any, BinaryIO
from urllib.parse import urlsplit

from nacre.errors import ConfigError, DataError, Problem, nearest, one_line
from nacre.untrusted import is_path

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

_PAUSES = (1, 2, 4, 8, 16)
"""Seconds to wait before a remote read is tried again."""
_AHEAD = 8 << 20  # bytes fetched at a time
# What stores call the things that change with a file's content; the first there is counts.
_MARKS = (
    "ETag", "etag", "blob_id", "xet_hash", "md5Hash", "generation", "content_md5", "Content-MD5",
    "LastModified", "Last-Modified", "last_modified", "mtime", "created",
)  # fmt: skip

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class File:
    """A file as it was found: `name` is its path or URL, `size` in bytes (None: nobody says).

    `identity`, plain JSON, differs when the file may have changed.
    """

    name: str
    size: int | None
    identity: list[Any] = field(compare=False)
    system: AbstractFileSystem | None = field(default=None, compare=False, repr=False)

    def open(self) -> BinaryIO:
        """Open for reading; DataError if a remote file cannot be, OSError for a local one."""
        if self.system is None:
            return Path(self.name).open("rb")
        return io.BufferedReader(_Remote(self, self.system), 1 << 20)  # type: ignore[return-value]


def suffixes(name: str) -> list[str]:
    """Return the extensions of a path or URL, in lower case, without the query of a URL."""
    path = PurePosixPath(urlsplit(name).path) if name.startswith("http") else Path(name)
    return [suffix.lower() for suffix in path.suffixes]


def is_url(source: str) -> bool:
    """Say whether a source is a URL, `s3://...`, and no path."""
    return "://" in source and not source.startswith("file://")


def find(source: str, readable: Callable[[str], bool], what_is_read: str) -> list[File]:
    """Return the files that a path, folder, glob or URL names, sorted.

    Of a folder or glob those that are `readable`; hidden ones are left out of folders. Raises
    DataError when there are none or they cannot be listed, ConfigError when the kind of URL needs
    a package that is not installed.
    """
    if not source:
        raise DataError("an empty source: name a file, folder, glob, URL, hf:NAME or default")
    if is_url(source):
        system, path = _system(source)
        with _told(source):
            found, what = _listed(system, path, source)
    else:
        system = None
        found, what = _on_disk(source.removeprefix("file://"))
    chosen = {name: info for name, info in found.items() if not what or readable(name)}
    if not chosen:
        others = f"; {len(found)} files have other extensions" if found else ""
        raise DataError(f"{source}: {what} has no file that nacre reads{others}; {what_is_read}")
    if len(chosen) < len(found):
        logger.info("%s: %d files are left out: %s", source, len(found) - len(chosen), what_is_read)
    if system is None:
        return [_local(Path(name)) for name in chosen]
    with _told(source):
        return [_remote(system, name, info) for name, info in chosen.items()]


def _on_disk(source: str) -> tuple[dict[str, Any], str]:
    """Return the paths of files, sorted, and what named them: "" when the source is the file."""
    if not is_path(source):
        raise DataError(f"{source[:100]!r}: is no path of a file, folder or pattern")
    path = Path(source)
    with contextlib.suppress(RuntimeError):  # no such user's home: the name stands as it is
        path = path.expanduser()
    if path.is_file():
        return {str(path): None}, ""
    if path.is_dir():
        inside = [item for item in path.rglob("*") if not _hidden(item.relative_to(path).parts)]
        what = "the folder"
    elif glob.has_magic(source):
        inside = [Path(item) for item in glob.glob(str(path), recursive=True)]  # noqa: PTH207
        what = "the pattern"
    elif path.exists():
        raise DataError(f"{source}: it is no regular file")
    else:
        raise DataError(f"{source}: there is no such file, folder or pattern")
    return {str(item): None for item in sorted(inside) if item.is_file()}, what


def _local(path: Path) -> File:
    state = path.stat()
    return File(str(path), state.st_size, [str(path.resolve()), state.st_size, state.st_mtime_ns])


def _listed(system: AbstractFileSystem, path: str, url: str) -> tuple[dict[str, Any], str]:
    """Return the files at a URL with what the store says of each, sorted, and what named them."""
    system.invalidate_cache()
    signs = "*[" if url.startswith("http") else "*[?"  # a ? begins the query of a web address
    found: Any
    if any(sign in path for sign in signs):
        found, what = system.glob(path, detail=True), "the pattern"
    else:
        info = system.info(path)
        if info["type"] != "directory":
            return {path: info}, ""
        root = path.rstrip("/") + "/"
        listed: Any = system.find(path, detail=True)
        found = {
            name: info
            for name, info in listed.items()
            if not _hidden(name.removeprefix(root).split("/"))
        }
        what = "the folder"
    files = {name: info for name, info in sorted(found.items()) if info["type"] != "directory"}
    return files, what


def _remote(system: AbstractFileSystem, path: str, info: dict[str, Any]) -> File:
    if info.get("size") is None:  # a list of links has none
        info = system.info(path)
    name, size = system.unstrip_protocol(path), info.get("size")
    mark = next((str(info[mark]) for mark in _MARKS if info.get(mark) is not None), None)
    return File(name, size, [name, size, mark], system)


def _hidden(parts: tuple[str, ...] | list[str]) -> bool:
    return any(part.startswith(".") for part in parts)


def _system(url: str) -> tuple[AbstractFileSystem, str]:
    """Return what reads such URLs, and the URL's path in it."""
    import fsspec
    from fsspec.core import url_to_fs

    protocol = re.split("::|://", url)[0]
    try:
        if protocol not in fsspec.available_protocols():
            hint = nearest(protocol, ("s3", "gs", "hf", "https", "http"))
            fix = hint or "nacre reads s3://, gs://, hf://, https:// and what fsspec knows"
            raise DataError(f"{url}: there are no {protocol}:// URLs ({fix})")
        with _told(url):
            return url_to_fs(url)
    except ImportError as error:
        package = getattr(error.__cause__, "name", None) or protocol
        raise ConfigError(
            Problem("data", f"{url} needs the package {package}", f"pip install {package}")
        ) from None


@contextlib.contextmanager
def _told(url: str) -> Iterator[None]:
    """Turn whatever a store raises into one message that names the URL."""
    try:
        yield
    except (DataError, ConfigError, ImportError):
        raise
    except Exception as error:  # every store has errors of its own
        if isinstance(error, FileNotFoundError) and error.__cause__ is None:
            raise DataError(f"{url}: there is no such file or folder") from error
        if isinstance(error, PermissionError):
            raise DataError(
                f"{url}: permission is denied ({one_line(error)}); check the credentials"
            ) from error
        raise DataError(
            f"{url}: cannot be read ({one_line(error.__cause__ or error)}); check the address, "
            "the network and the credentials"
        ) from error


class _Remote(io.RawIOBase):
    """A remote file that survives a broken connection: it is opened again where it broke off."""

    def __init__(self, file: File, system: AbstractFileSystem) -> None:
        self.file, self.system = file, system
        self.position = 0
        self.inner: Any = None
        self.broken = False

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return self.file.size is not None

    def tell(self) -> int:
        return self.position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        size = self.file.size
        if size is None:
            raise io.UnsupportedOperation("the server does not say how long the file is")
        self.position = offset + (0, self.position, size)[whence]
        if self.inner is not None:
            self.inner.seek(self.position)
        return self.position

    def readinto(self, buffer: Any) -> int:
        for pause in (*_PAUSES, None):
            try:
                data = self._read(len(buffer))
                break
            except Exception as error:  # every store has errors of its own
                self._drop()
                self.broken = True
                if pause is None or _lasts(error):
                    with _told(self.file.name):
                        raise
                message = "%s: %s at byte %d; trying again in %d s"
                logger.warning(message, self.file.name, one_line(error), self.position, pause)
                time.sleep(pause)
        buffer[: len(data)] = data
        self.position += len(data)
        return len(data)

    def _read(self, count: int) -> bytes:
        if self.inner is None:
            self.inner = self._open()
        data = self.inner.read(count)
        if not data and count and self.position < (self.file.size or 0):
            raise EOFError(f"the connection ended before its {self.file.size:,} bytes")
        return data

    def _open(self) -> Any:
        """Open at the position; after a break it must still be the same file."""
        if self.broken:
            self.system.invalidate_cache()
            name = self.file.name
            if _remote(self.system, name, self.system.info(name)).identity != self.file.identity:
                raise DataError(f"{self.file.name}: it was changed while it was read")
        inner = self.system.open(self.file.name, "rb", block_size=_AHEAD)
        if self.position:
            inner.seek(self.position)
        return inner

    def _drop(self) -> None:
        if self.inner is not None:
            with contextlib.suppress(Exception):  # it is broken
                self.inner.close()
        self.inner = None

    def close(self) -> None:
        self._drop()
        super().close()


def _lasts(error: Exception) -> bool:
    """Say whether trying again would be in vain."""
    if isinstance(error, FileNotFoundError):  # fsspec says so of a web server that is away, too
        return error.__cause__ is None
    return isinstance(error, (DataError, PermissionError, NotImplementedError, ValueError))


def is_denied(file: File) -> bool:
    """Say whether reading a local file is denied; a remote one says so when it is opened."""
    return file.system is None and not os.access(file.name, os.R_OK)
