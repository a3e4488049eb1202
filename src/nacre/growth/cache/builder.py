"""Building a trunk cache: a build that is cut off anywhere goes on where it was.

Shapes: B records, T positions, D width; `h_BTD`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from torch import Tensor

from nacre.atomic import sync_folder
from nacre.growth.cache.manifest import (
    FORMAT,
    MANIFEST,
    Identity,
    Manifest,
    Unreadable,
    cache_files,
    difference,
    drop,
    manifest_name,
    other_manifests,
    partial_path,
    read_manifest,
    segment_name,
)
from nacre.growth.cache.records import encode, record_bytes

SEGMENT_BYTES = 64 * 2**20

_PARTS = 2  # pieces that wait for the writing thread


class CacheBuilder:
    """Fills a cache segment by segment, in one background thread; goes on with what is there.

    `replaced` says in a sentence what was there of another kind and was deleted, else None.
    `damaged` counts the segments that were listed but missing or changed; they are built again.
    """

    def __init__(
        self,
        folder: Path,
        identity: Identity,
        *,
        batch_windows: int,
        segment_bytes: int = SEGMENT_BYTES,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        """Open or create the cache in `folder`; reads every segment there to check its SHA-256.

        `part` (which, of how many) shares the work: builders of the same cache write the segments
        of their part, each with a manifest of its own, once number 0 has opened the folder.

        A segment holds about `segment_bytes`, always a whole multiple of `batch_windows` records
        (the last may be shorter). A cache that exists keeps its segments where they are such a
        multiple, and starts anew where not. Only files that are a cache's are ever deleted.
        """
        assert batch_windows > 0, "a batch has windows"
        started = time.perf_counter()
        self.folder, self.identity, self.damaged = folder, identity, 0
        self.part, self.replaced = part, None
        if part[0]:
            opened = read_manifest(folder)
            self._taken = set(opened.segments)
            self._manifest = dataclasses.replace(opened, segments={}, seconds=0.0)
        else:
            self._open(batch_windows, segment_bytes)
            self._taken = set(self._manifest.segments)
        self._started = started - self._manifest.seconds
        self._items: queue.Queue[Any] = queue.Queue(_PARTS)
        self._thread: threading.Thread | None = None
        self._error: BaseException | None = None
        self._file = -1
        self._number = 0
        self._digest = hashlib.sha256()

    def _open(self, batch_windows: int, segment_bytes: int) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        found, self.replaced = self._find(batch_windows)
        if found is None:
            drop(self.folder)
            self.folder.mkdir(exist_ok=True)
            shape = self.identity
            record = record_bytes(shape.context, shape.width, shape.dtype)
            batches = max(1, segment_bytes // (record * batch_windows))
            self._write_manifest(Manifest(shape, batches * batch_windows, {}))
        else:
            self._keep_sound(self._with_parts(found))

    def _find(self, batch_windows: int) -> tuple[Manifest | None, str | None]:
        """Return the manifest to go on with, or what is there instead of it."""
        try:
            found = read_manifest(self.folder)
        except FileNotFoundError:
            left = any(path.suffix == ".bin" for path in cache_files(self.folder))
            return None, f"the trunk cache had no {MANIFEST}" if left else None
        except Unreadable as error:
            return None, f"the trunk cache could not be read: {error}"
        if different := difference(found.identity, self.identity):
            field, old, new = different
            return None, f"the trunk cache had another {field}: {old}, now {new}"
        if found.segment_windows % batch_windows:
            return None, (
                f"the trunk cache had segments of {found.segment_windows} windows, "
                f"no multiple of a batch of {batch_windows}"
            )
        return found, None

    def _with_parts(self, found: Manifest) -> Manifest:
        """Return `found` with the segments that other builders of the cache have listed."""
        segments = dict(found.segments)
        for path in other_manifests(self.folder):
            with contextlib.suppress(OSError, Unreadable):
                other = read_manifest(self.folder, path.name)
                if other.lists_the_same(found):
                    segments |= other.segments
        if segments != found.segments:
            self._write_manifest(dataclasses.replace(found, segments=segments))
            return self._manifest
        return found

    def _keep_sound(self, found: Manifest) -> None:
        """Go on with `found` less what is damaged, and delete every file it does not list."""
        sound = {
            number: sha
            for number, sha in found.segments.items()
            if not found.fault(self.folder, number, verify=True)
        }
        self._manifest, self.damaged = found, len(found.segments) - len(sound)
        if self.damaged:
            self._write_manifest(dataclasses.replace(found, segments=sound))
        keep = {MANIFEST, *map(segment_name, sound)}
        for path in cache_files(self.folder):
            if path.name not in keep:
                path.unlink()

    @property
    def done(self) -> int:
        """The records that are complete on disk."""
        return sum(len(self._manifest.records(number)) for number in self._manifest.segments)

    def missing(self) -> Iterator[range]:
        """Yield the records of each segment of its part still to build, in order, as of now."""
        which, parts = self.part
        numbers = range(which, self._manifest.count, parts)
        return map(self._manifest.records, [n for n in numbers if n not in self._taken])

    def write(self, records: range, parts: Iterable[Tensor]) -> None:
        """Write one segment, `records` as `missing` gave them.

        `parts` are consecutive `h_BTD` (any B, float dtype and device), not to be changed after
        they were given. This returns when the thread has still to write up to two of them; it
        waits while more would wait. Raises ValueError for parts that are not the segment, which
        then stays missing, and whatever an earlier write met: OSError of the disk, ValueError for
        numbers that are not finite.
        """
        number = records.start // self._manifest.segment_windows
        if records not in list(self.missing()):
            raise ValueError(f"{records} is no segment that is missing")
        if self._thread is None:
            self._thread = threading.Thread(target=self._work, name="cache-writer", daemon=True)
            self._thread.start()
        self._put(number)
        shape = (self.identity.context, self.identity.width)
        try:
            have = 0
            for part in parts:
                if part.shape[1:] != shape or not part.is_floating_point():
                    raise ValueError(f"a part of shape {tuple(part.shape)} and {part.dtype}")
                have += len(part)
                if have > len(records):
                    break
                self._put((part.detach(), _event(part)))
            if have != len(records):
                raise ValueError(f"parts of {have} records or more for {len(records)}")
            self._put("publish")
        except BaseException:
            self._items.put("discard")
            raise
        self._taken.add(number)

    def finish(self) -> None:
        """Wait until its part is on disk; raises what a write met; asserts completeness."""
        self._stop()
        if self._error:
            raise self._error
        assert not list(self.missing()), "every segment was written"

    def adopt(self) -> None:
        """List what the builders of the other parts have written, when all have finished."""
        self._manifest = self._with_parts(self._manifest)
        for path in other_manifests(self.folder):
            path.unlink()
        assert self.done == self.identity.windows, "every segment was written"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stop()
        if error is None and self._error:
            raise self._error

    def _put(self, item: Any) -> None:
        if self._error:
            raise self._error
        self._items.put(item)

    def _stop(self) -> None:
        if self._thread is not None:
            self._items.put(None)
            self._thread.join()
            self._thread = None

    def _work(self) -> None:
        """Take items until None: a segment's number, its parts, then "publish" or "discard".

        After an error the items are only taken, so that nobody waits.
        """
        while (item := self._items.get()) is not None:
            if self._error is None:
                try:
                    self._take(item)
                except BaseException as error:
                    self._error = error
                    self._discard()
        self._discard()

    @property
    def _path(self) -> Path:
        return self.folder / segment_name(self._number)

    def _take(self, item: Any) -> None:
        match item:
            case int():
                self._number, self._digest = item, hashlib.sha256()
                self._file = _open_new(partial_path(self._path))
            case (part, event):
                if event is not None:
                    event.synchronize()
                data = encode(part, self.identity.dtype).cpu().flatten().numpy().data
                self._digest.update(data)
                _write_all(self._file, data)
            case "publish":
                os.fsync(self._file)
                self._close()
                partial_path(self._path).replace(self._path)
                segments = {**self._manifest.segments, self._number: self._digest.hexdigest()}
                seconds = time.perf_counter() - self._started
                manifest = dataclasses.replace(self._manifest, segments=segments, seconds=seconds)
                self._write_manifest(manifest)
            case _:
                self._discard()

    def _close(self) -> None:
        if self._file >= 0:
            file, self._file = self._file, -1
            os.close(file)

    def _discard(self) -> None:
        """Leave no part of a segment; what cannot be deleted now, the next builder deletes."""
        with contextlib.suppress(OSError):
            self._close()
            partial_path(self._path).unlink(missing_ok=True)

    def _write_manifest(self, manifest: Manifest) -> None:
        manifest = dataclasses.replace(manifest, segments=dict(sorted(manifest.segments.items())))
        data = {"format": FORMAT, **dataclasses.asdict(manifest)}
        path = self.folder / manifest_name(self.part[0])
        try:
            file = _open_new(partial_path(path))
            try:
                _write_all(file, memoryview(json.dumps(data, indent=1).encode()))
                os.fsync(file)
            finally:
                os.close(file)
            partial_path(path).replace(path)
        except BaseException:
            with contextlib.suppress(OSError):
                partial_path(path).unlink(missing_ok=True)
            raise
        sync_folder(self.folder)
        self._manifest = manifest


def _event(tensor: Tensor) -> torch.Event | None:
    """Return what a thread waits for before it may read a tensor that CUDA still computes."""
    return torch.cuda.current_stream(tensor.device).record_event() if tensor.is_cuda else None


def _open_new(path: Path) -> int:
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o666)


def _write_all(file: int, data: memoryview) -> None:
    while data:
        data = data[os.write(file, data) :]
