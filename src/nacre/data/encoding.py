"""The long part of making a token store: text to tokens on disk, which goes on if it is cut off.

    .NAME.RANDOM/everything      the tokens of all documents, each with its end
    .NAME.RANDOM/index           per document: hash of the text, tokens with the end, UTF-8 bytes
    .NAME.RANDOM/progress.json   how far both are safe on disk, and what they are made from
    .NAME.RANDOM.lock            held by the process at work

Text, tokens and index are never in memory as a whole.
"""

from __future__ import annotations

import contextlib
import glob
import json
import logging
import os
import secrets
import shutil
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import numpy.typing as npt
from filelock import FileLock, Timeout

from nacre import tokenizer as tokenizers_
from nacre.atomic import write_text
from nacre.data.corpus import DEFAULT, Errors, Inventory, Part, pieces, size_of
from nacre.data.files import File
from nacre.data.formats import Piece
from nacre.data.holdout import ContentHash
from nacre.errors import DataError
from nacre.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TOKENS, INDEX = "everything", "index"
RECORD = np.dtype([("hash", "<u8"), ("tokens", "<i8"), ("bytes", "<i8")])
"""What the index says of one document."""

_PROGRESS = "progress.json"
_SAVE_EVERY = 10.0  # seconds
_BATCH = 4_000_000  # characters encoded at a time
_PART = 16_384  # characters of one piece of a long document

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Progress:
    """How far it is: `documents` of the part `part` of the sources are done, and all parts before.

    `all_tokens` and `all_documents` are in the files.
    """

    part: int = 0
    documents: int = 0
    all_tokens: int = 0
    all_documents: int = 0


@contextlib.contextmanager
def workplace(folder: Path, key: dict[str, Any]) -> Iterator[Path]:
    """Give a folder beside `folder` to work in: one that was cut off over the same `key`, or new.

    What others work in is left alone; what was cut off over another key is deleted. On an error
    the folder stays if it holds saved progress.
    """
    place, lock = _abandoned(folder, key) or _new(folder)
    try:
        yield place
    except BaseException:
        if (place / _PROGRESS).exists():
            logger.warning("what was tokenized so far is kept: the same again goes on from there")
        raise
    finally:
        lock.release()
        if not (place / _PROGRESS).exists():
            _remove(place)


def finish(place: Path) -> None:
    """Remove what only the work needed; the folder may then be moved."""
    for name in (_PROGRESS, TOKENS, INDEX):
        (place / name).unlink(missing_ok=True)


def encode(
    inventory: Inventory,
    tokenizer: PreTrainedTokenizerBase,
    place: Path,
    key: dict[str, Any],
    errors: Errors,
    progress: Callable[[int], object],
) -> None:
    """Write TOKENS and INDEX into `place`, from its saved progress on if there is some.

    One thread reads the next batch while all threads of the Rust tokenizer encode this one.
    """
    begun = _saved(place)
    dtype = token_type(len(tokenizers_.token_strings(tokenizer)))
    end = tokenizers_.end_of_document(tokenizer)
    rust = tokenizers_.encoder(tokenizer)

    def encoded(texts: list[str]) -> list[npt.NDArray[Any]]:
        found = rust.encode_batch_fast(texts, add_special_tokens=False)
        return [np.array(encoding.ids, dtype) for encoding in found]

    with _Writer(place, key, begun, dtype, end) as writer, ThreadPoolExecutor(1) as encoder:
        waiting: tuple[_Batch, Future[list[npt.NDArray[Any]]]] | None = None
        read = _read(inventory, errors, begun, place, progress)
        for batch in _batches(read, tokenizers_.splits_exactly(tokenizer)):
            running = encoder.submit(encoded, [text for text, _ in batch])
            if waiting:
                writer.write(waiting[0], waiting[1].result())
            waiting = batch, running
        if waiting:
            writer.write(waiting[0], waiting[1].result())
        writer.finished(len(inventory.parts))


def open_index(place: Path) -> npt.NDArray[Any]:
    """Return the index, memory-mapped: `RECORD` [N]."""
    path = place / INDEX
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, RECORD)
    return np.memmap(path, dtype=RECORD, mode="r")


def token_type(vocabulary_size: int) -> np.dtype[Any]:
    """Return the type of stored tokens: uint16 up to 65,536 token ids, uint32 above."""
    return np.dtype("<u2" if vocabulary_size <= 65_536 else "<u4")


def temporary(folder: Path) -> Path:
    """Return a name beside `folder` that nothing else has."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def _new(folder: Path) -> tuple[Path, FileLock]:
    place = temporary(folder)
    place.mkdir(parents=True)
    lock = _lock(place)
    lock.acquire()
    return place, lock


def _lock(place: Path) -> FileLock:
    return FileLock(place.with_name(f"{place.name}.lock"))


def _remove(place: Path) -> None:
    shutil.rmtree(place, ignore_errors=True)
    place.with_name(f"{place.name}.lock").unlink(missing_ok=True)


def _abandoned(folder: Path, key: dict[str, Any]) -> tuple[Path, FileLock] | None:
    """Return a folder with progress over `key` that nobody works in, locked; delete the others."""
    chosen: tuple[Path, FileLock] | None = None
    for path in sorted(folder.parent.glob(f".{glob.escape(folder.name)}.*/{_PROGRESS}")):
        lock = _lock(path.parent)
        try:
            lock.acquire(timeout=0)
        except Timeout:
            continue
        if chosen is None and _fits(path, key):
            chosen = path.parent, lock
        else:
            lock.release()
            _remove(path.parent)
    return chosen


def _fits(path: Path, key: dict[str, Any]) -> bool:
    """Say whether progress was saved over `key`, and all that it counts is there."""
    try:
        saved = read_json(path)
        done = Progress(**saved["progress"])
        written = [(path.with_name(INDEX), done.all_documents * RECORD.itemsize)]
        written += [(path.with_name(TOKENS), done.all_tokens * saved["token_bytes"])]
        return saved["key"] == json.loads(json.dumps(key)) and all(
            file.stat().st_size >= size for file, size in written
        )
    except (OSError, ValueError, KeyError, TypeError):
        return False


def _saved(place: Path) -> Progress:
    path = place / _PROGRESS
    if not path.exists():
        return Progress()
    done = Progress(**read_json(path)["progress"])
    logger.info("tokenizing goes on after %d documents", done.all_documents)
    return done


@dataclass(frozen=True)
class _End:
    """The end of a document: its hash and UTF-8 bytes, its part, its number in the part from 1."""

    hash: int
    bytes: int
    part: int
    number: int


_Batch = list[tuple[str, _End | None]]


def _read(
    inventory: Inventory,
    errors: Errors,
    begun: Progress,
    place: Path,
    progress: Callable[[int], object],
) -> Iterator[tuple[str, _End | None]]:
    """Yield the texts that are not done yet, the last of each document with its end."""
    progress(sum(size_of(part) or 0 for part in inventory.parts[: begun.part]))
    for index, part in enumerate(inventory.parts[begun.part :], start=begun.part):
        texts = _ended(pieces(part, errors, progress), index)
        if index == begun.part and begun.documents:
            _skip(texts, part, begun, place)
        yield from texts


def _ended(read: Iterator[Piece], part: int) -> Iterator[tuple[str, _End | None]]:
    """Add the ends of documents; leave out those without text."""
    content, size, number = ContentHash(), 0, 0
    for piece in read:
        data = piece.text.encode()
        content.update(data)
        size += len(data)
        if piece.last:
            if size:
                number += 1
                yield piece.text, _End(content.value(), size, part, number)
            content, size = ContentHash(), 0
        elif data:
            yield piece.text, None


def _skip(
    texts: Iterator[tuple[str, _End | None]], part: Part, begun: Progress, place: Path
) -> None:
    """Read over the documents that are done, which must be what they were."""
    known = open_index(place)["hash"][begun.all_documents - begun.documents :]
    ends = (end for _, end in texts if end)
    for number in range(begun.documents):
        end = next(ends, None)
        if end is None or end.hash != known[number]:
            (place / _PROGRESS).unlink()
            name = part.name if isinstance(part, File) else getattr(part, "source", DEFAULT)
            raise DataError(
                f"{name}: it has changed since its tokenizing was cut off; start it again, it "
                "begins anew"
            )


def _batches(texts: Iterator[tuple[str, _End | None]], may_split: bool) -> Iterator[_Batch]:
    """Yield batches of about `_BATCH` characters, whose texts are cut to about `_PART`.

    A document is whole in one text unless the tokenizer allows cuts.
    """
    batch: _Batch = []
    room = _BATCH
    begun: list[str] = []
    size, wanted = 0, _PART
    for text, end in texts:
        begun.append(text)
        size += len(text)
        if end is None and (size < wanted or not may_split):
            continue
        joined = "".join(begun)
        parts = tokenizers_.split(joined, _PART) if may_split else [joined]
        begun = [] if end else [parts.pop()]
        size = sum(map(len, begun))
        wanted = 2 * max(size, _PART)  # a rest that cannot be cut is not searched at each text
        for number, part in enumerate(parts, start=1):
            batch.append((part, end if number == len(parts) else None))
            room -= len(part)
            if room <= 0:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch


class _Writer:
    """Appends tokens and index, and saves now and then how far they are."""

    def __init__(
        self, place: Path, key: dict[str, Any], begun: Progress, dtype: np.dtype[Any], end: int
    ) -> None:
        self.place, self.key = place, key
        self.done = self.saved = begun
        self.token_bytes = dtype.itemsize
        self.end = np.array([end], dtype).tobytes()
        self.tokens = _from(place / TOKENS, begun.all_tokens * dtype.itemsize)
        self.index = _from(place / INDEX, begun.all_documents * RECORD.itemsize)
        self.running = 0
        self.saved_at = time.monotonic()

    def __enter__(self) -> _Writer:
        return self

    def __exit__(self, kind: object, *_: object) -> None:
        try:
            if self.done != self.saved and (self._is_due() or (self.place / _PROGRESS).exists()):
                with contextlib.suppress(OSError) if kind else contextlib.nullcontext():
                    self._save()
        finally:
            self.tokens.close()
            self.index.close()

    def write(self, batch: _Batch, encoded: list[npt.NDArray[Any]]) -> None:
        """Append a batch."""
        for (_, end), ids in zip(batch, encoded, strict=True):
            self.tokens.write(ids.tobytes())
            self.running += len(ids)
            if end:
                self.tokens.write(self.end)
                count = self.running + 1
                self.index.write(np.array([(end.hash, count, end.bytes)], RECORD).tobytes())
                self.done = Progress(
                    end.part,
                    end.number,
                    self.done.all_tokens + count,
                    self.done.all_documents + 1,
                )
                self.running = 0
        if self._is_due():
            self._save()

    def finished(self, parts: int) -> None:
        """Note that all parts are done."""
        self.done = replace(self.done, part=parts, documents=0)

    def _is_due(self) -> bool:
        return time.monotonic() - self.saved_at >= _SAVE_EVERY

    def _save(self) -> None:
        for file in (self.tokens, self.index):
            file.flush()
            os.fsync(file.fileno())
        content = {
            "key": self.key,
            "token_bytes": self.token_bytes,
            "progress": asdict(self.done),
        }
        write_text(self.place / _PROGRESS, json.dumps(content))
        self.saved, self.saved_at = self.done, time.monotonic()


def _from(path: Path, size: int) -> BinaryIO:
    """Open a file to go on writing after its first `size` bytes."""
    file = path.open("r+b" if path.exists() else "w+b")
    file.truncate(size)
    file.seek(size)
    return file
