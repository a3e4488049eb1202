"""Reading a trunk cache.

Shapes: B records, T positions, D width, R bytes of a record; `h_BTD`, `records_BR`.
"""

from __future__ import annotations

import contextlib
import os
import queue
import threading
import weakref
from collections.abc import Generator, Iterable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from nacre.errors import CheckpointError, FingerprintError
from nacre.growth.cache.manifest import (
    FIX,
    FORMAT,
    Identity,
    Manifest,
    Unreadable,
    difference,
    read_manifest,
    segment_name,
)
from nacre.growth.cache.records import DECODED, decode

_BUFFERS = 1024  # that one call of preadv takes


class TrunkCache:
    """A complete cache, read with plain reads: mapped pages would count as the process's memory.

    It goes on reading where its folder was renamed, and never reads a file that was changed or
    replaced after it was opened. Two threads may read at once.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.folder, self.identity, self._manifest = folder, manifest.identity, manifest
        self._folder = os.open(folder, os.O_RDONLY)
        self._finalizer = weakref.finalize(self, os.close, self._folder)
        self._stamps = [_stamp((folder / segment_name(n)).stat()) for n in range(manifest.count)]

    @classmethod
    def open(cls, folder: Path, identity: Identity, *, verify: bool = True) -> TrunkCache:
        """Open the cache in `folder`, reading all of it once to check every SHA-256.

        `verify=False` checks sizes only. Raises FingerprintError with the first field in which it
        differs from `identity`, and CheckpointError where it is missing, incomplete or damaged.
        """
        try:
            manifest = read_manifest(folder)
        except OSError as error:
            raise CheckpointError(
                f"{folder} is no trunk cache: {error.strerror or error} ({FIX})"
            ) from None
        except Unreadable as error:
            if error.format is None:
                raise CheckpointError(f"trunk cache {folder}: {error} ({FIX})") from None
            found, wanted = str(error.format), str(FORMAT)
            raise FingerprintError(f"trunk cache {folder}: format", wanted, found, FIX) from None
        if different := difference(manifest.identity, identity):
            field, found, wanted = different
            raise FingerprintError(f"trunk cache {folder}: {field}", wanted, found, FIX)
        if len(manifest.segments) < manifest.count:
            raise CheckpointError(
                f"trunk cache {folder} is incomplete: {len(manifest.segments)} of "
                f"{manifest.count} segments ({FIX})"
            )
        for number in range(manifest.count):
            if fault := manifest.fault(folder, number, verify=verify):
                raise CheckpointError(f"{fault} ({FIX})")
        return cls(folder, manifest)

    def read(self, slots: npt.NDArray[np.int64], out: Tensor | None = None) -> Tensor:
        """Return `h_BTD` of the records `slots`, int64 [B], in any order, with any repeated.

        fp32 for fp32, bf16 for bf16 and fp8; into `out` where it is given (contiguous, on the
        CPU). Records that follow each other in a segment are one read. Raises IndexError for a
        slot that is none, CheckpointError for a file that was changed since it was opened.
        """
        context, width, dtype = self.identity.context, self.identity.width, self.identity.dtype
        if len(slots) and not 0 <= slots.min() <= slots.max() < self.identity.windows:
            raise IndexError(f"slots outside the {self.identity.windows} windows of the cache")
        if out is None:
            out = torch.empty(len(slots), context, width, dtype=DECODED[dtype])
        assert out.is_contiguous(), "records are read straight into `out`"
        assert (out.shape, out.dtype) == ((len(slots), context, width), DECODED[dtype])
        assert out.device.type == "cpu", "files are read into the memory of the processor"
        if dtype != "fp8":
            self._fill(out.view(torch.uint8).flatten(1).numpy(), slots)
            return out
        records_BR = torch.empty(len(slots), self._manifest.record_bytes, dtype=torch.uint8)
        self._fill(records_BR.numpy(), slots)
        return decode(records_BR, context, width, dtype, out)

    def _fill(self, records_BR: npt.NDArray[np.uint8], slots: npt.NDArray[np.int64]) -> None:
        if not len(slots):
            return
        order = np.argsort(slots, kind="stable")
        segments = slots[order] // self._manifest.segment_windows
        for places in np.split(order, np.flatnonzero(np.diff(segments)) + 1):
            number, begin = divmod(int(slots[places[0]]), self._manifest.segment_windows)
            with self._opened(number) as file:
                runs = np.split(places, np.flatnonzero(np.diff(slots[places]) != 1) + 1)
                for run in runs:
                    offset = int(slots[run[0]] - slots[places[0]]) + begin
                    buffers = [records_BR[place].data for place in run]
                    if not _read_all(file, buffers, offset * self._manifest.record_bytes):
                        raise self._changed(number)

    @contextlib.contextmanager
    def _opened(self, number: int) -> Iterator[int]:
        try:
            file = os.open(segment_name(number), os.O_RDONLY, dir_fd=self._folder)
        except FileNotFoundError:
            raise self._changed(number) from None
        try:
            if _stamp(os.fstat(file)) != self._stamps[number]:
                raise self._changed(number)
            yield file
        finally:
            os.close(file)

    def _changed(self, number: int) -> CheckpointError:
        path = self.folder / segment_name(number)
        return CheckpointError(f"{path} was changed or deleted while it was read ({FIX})")

    def stream(
        self,
        batches: Iterable[npt.NDArray[np.int64]],
        *,
        ahead: int = 2,
        pin_memory: bool = False,
    ) -> Generator[Tensor]:
        """Yield what `read` gives for each of `batches`, read by a thread in advance.

        The thread holds at most `ahead` batches that were not taken yet. It alone iterates
        `batches`, which may be endless; what fails there or in a read is raised here. It ends
        before this generator does. `pin_memory` (CUDA only) gives page-locked tensors.
        """
        assert ahead > 0, "a stream reads at least one batch in advance"
        context, width = self.identity.context, self.identity.width
        room = threading.Semaphore(ahead)
        ready: queue.SimpleQueue[Tensor | BaseException | None] = queue.SimpleQueue()
        stopped = threading.Event()

        def work() -> None:
            try:
                for slots in batches:
                    room.acquire()
                    if stopped.is_set():
                        return
                    out = torch.empty(
                        len(slots),
                        context,
                        width,
                        dtype=DECODED[self.identity.dtype],
                        pin_memory=pin_memory,
                    )
                    ready.put(self.read(slots, out))
                ready.put(None)
            except BaseException as error:
                ready.put(error)

        thread = threading.Thread(target=work, name="cache-reader", daemon=True)
        thread.start()
        try:
            while (item := ready.get()) is not None:
                if isinstance(item, BaseException):
                    raise item
                room.release()
                yield item
        finally:
            stopped.set()
            room.release()
            thread.join()

    def close(self) -> None:
        """Let go of the folder; no stream may be running. Called again, it does nothing."""
        self._finalizer()


def _stamp(state: os.stat_result) -> tuple[int, int, int]:
    return state.st_ino, state.st_size, state.st_mtime_ns


def _read_all(file: int, buffers: list[memoryview], offset: int) -> bool:
    """Fill the buffers from one place of a file; say whether the file was long enough."""
    first = 0
    while first < len(buffers):
        count = os.preadv(file, buffers[first : first + _BUFFERS], offset)
        if not count:
            return False
        offset += count
        while first < len(buffers) and count >= len(buffers[first]):
            count -= len(buffers[first])
            first += 1
        if count:
            buffers[first] = buffers[first][count:]
    return True
