"""The token store: a corpus as memory-mapped token files with a held-out split.

    FOLDER/store.json               what it was made from, counts, fingerprint
    FOLDER/train.tokens             little-endian uint16 (uint32 from 65,537 token ids on)
    FOLDER/train.documents          little-endian int64 [N + 1]: where documents begin
    FOLDER/validation.tokens, .documents

Every document ends with the end-of-document token. A folder appears complete or not at all.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import secrets
import shutil
import sys
from array import array
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from nacre import tokenizer as tokenizers_
from nacre.data.corpus import DEFAULT, Document, Errors, Inventory, check, read
from nacre.data.holdout import Assignment, assign, content_hash
from nacre.errors import CheckpointError, ConfigError, DataError, Problem

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split: TypeAlias = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

_MANIFEST = "store.json"
_FORMAT = 1
_BATCH = 4_000_000  # characters encoded at a time
_PART = 16_384  # characters of one piece of a long document

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Counts:
    """How much text a split holds; `tokens` includes the end of each document."""

    documents: int
    tokens: int
    bytes: int


@dataclass(frozen=True)
class TokenStore:
    """A tokenized corpus on disk. `tokenize` makes one, `TokenStore.open` reads it.

    `fingerprint` identifies tokens, document boundaries, split and tokenizer; `tokenizer` is the
    tokenizer's own fingerprint; `end` the id that ends each document.
    """

    folder: Path
    fingerprint: str
    tokenizer: str
    vocabulary_size: int
    end: int
    counts: dict[Split, Counts]

    @classmethod
    def open(cls, folder: str | Path) -> TokenStore:
        """Open a store; raises CheckpointError when it is missing, damaged or incomplete."""
        folder = Path(folder)
        manifest = _manifest(folder)
        try:
            store = cls(
                folder=folder,
                fingerprint=manifest["fingerprint"],
                tokenizer=manifest["tokenizer"],
                vocabulary_size=manifest["vocabulary_size"],
                end=manifest["end"],
                counts={split: Counts(**manifest["counts"][split]) for split in SPLITS},
            )
        except (KeyError, TypeError) as error:
            raise CheckpointError(
                f"{folder / _MANIFEST} lacks {error}; delete the folder to tokenize again"
            ) from None
        for split, counts in store.counts.items():
            _check_size(folder / f"{split}.tokens", counts.tokens * store.dtype.itemsize)
            _check_size(folder / f"{split}.documents", (counts.documents + 1) * 8)
        return store

    def verify(self) -> None:
        """Read everything; raise CheckpointError if it is not what was written."""
        if _fingerprint(self.folder, self.tokenizer) != self.fingerprint:
            raise CheckpointError(
                f"{self.folder}: damaged: its tokens are not what was written; delete the folder "
                "to tokenize again"
            )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the tokens: uint16 up to 65,536 token ids, uint32 above."""
        return _dtype(self.vocabulary_size)

    def tokens(self, split: Split) -> npt.NDArray[Any]:
        """Return the split's tokens, memory-mapped and read-only, one document after the other."""
        return _map(self.folder / f"{split}.tokens", self.dtype)

    def documents(self, split: Split) -> npt.NDArray[np.int64]:
        """Return where the split's documents begin, int64 [N + 1]; the last entry is the end."""
        return _map(self.folder / f"{split}.documents", np.dtype("<i8"))


def tokenize(
    sources: Sequence[str],
    tokenizer: PreTrainedTokenizerBase,
    folder: str | Path,
    *,
    holdout: float = 0.02,
    errors: Errors = "strict",
    progress: Callable[[int], None] | None = None,
) -> TokenStore:
    """Tokenize the sources into `folder`, or open what is there when it was made from the same.

    What is there is read once: if it is damaged, it is made again.
    The same means: files of the same path, size and time of change (for `hf:` of the hub: the same
    name), the same tokenizer, holdout and errors. Another store in the folder is replaced. About
    `holdout` of the text is held out by document; see `nacre.data.holdout`. Special tokens' names
    in the text stay text. `progress` receives the bytes of text done since its last call.

    Raises as `nacre.data.read` does, and ConfigError for a holdout outside (0, 0.5] or a folder
    that holds something else.
    """
    folder = Path(folder)
    if not 0 < holdout <= 0.5:
        raise ConfigError(
            Problem("holdout", f"{holdout} is not above 0 and at most 0.5", "0.02 is usual")
        )
    inventory = check(sources)
    key = {
        "format": _FORMAT,
        "sources": _identity(sources, inventory),
        "tokenizer": tokenizers_.fingerprint(tokenizer),
        "holdout": holdout,
        "errors": errors,
    }
    if _reusable(folder, key):
        logger.info("%s: tokenized before, used again", folder)
        return TokenStore.open(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    new = _temporary(folder)
    new.mkdir()
    try:
        _fill(new, read(sources, errors=errors), tokenizer, key, progress)
        _publish(new, folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
    return TokenStore.open(folder)


def _fill(
    new: Path,
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    key: dict[str, Any],
    progress: Callable[[int], None] | None,
) -> None:
    """Write a whole store into the folder `new`."""
    strings = tokenizers_.token_strings(tokenizer)
    lengths = tokenizers_.byte_lengths(tokenizer)
    dtype = _dtype(len(strings))
    end = tokenizers_.end_of_document(tokenizer)
    everything = new / "everything"
    with everything.open("wb") as file:
        index = _encode(documents, tokenizer, end, dtype, file, progress)
    if not len(index.tokens):
        raise DataError("there is no text in the sources")
    tokens = _map(everything, dtype)
    assignment = assign(index.hashes, index.tokens, tokens, strings, key["holdout"])
    counts: dict[Split, Counts] = {}
    for split in SPLITS:
        pieces = _pieces(split, index, assignment)
        counts[split] = _write_split(new, split, pieces, tokens, index, lengths, end)
    del tokens
    everything.unlink()
    manifest = {
        "key": key,
        "tokenizer": key["tokenizer"],
        "vocabulary_size": len(strings),
        "end": end,
        "counts": {split: dataclasses.asdict(count) for split, count in counts.items()},
        "fingerprint": _fingerprint(new, key["tokenizer"]),
    }
    (new / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Index:
    """Per document: hash of the text uint64, tokens with the end int64, UTF-8 bytes int64; [N]."""

    hashes: npt.NDArray[np.uint64]
    tokens: npt.NDArray[np.int64]
    bytes: npt.NDArray[np.int64]


def _encode(
    documents: Iterator[Document],
    tokenizer: PreTrainedTokenizerBase,
    end: int,
    dtype: np.dtype[Any],
    file: BinaryIO,
    progress: Callable[[int], None] | None,
) -> _Index:
    """Append the documents' tokens to `file`, all threads of the Rust tokenizer at work."""
    rust = tokenizers_.encoder(tokenizer)
    hashes, tokens, sizes = array("Q"), array("q"), array("q")

    def described() -> Iterator[Document]:
        for document in documents:
            hashes.append(content_hash(document.text))
            sizes.append(len(document.text.encode()))
            yield document

    running = 0
    for batch in _batches(described(), tokenizers_.splits_exactly(tokenizer)):
        encodings = rust.encode_batch_fast([text for text, _ in batch], add_special_tokens=False)
        for (_, last), encoding in zip(batch, encodings, strict=True):
            ids = [*encoding.ids, end] if last else encoding.ids
            running += len(ids)
            file.write(np.array(ids, dtype=dtype).tobytes())
            if last:
                tokens.append(running)
                running = 0
        if progress:
            progress(sum(len(text.encode()) for text, _ in batch))
    return _Index(
        np.frombuffer(hashes, np.uint64) if hashes else np.empty(0, np.uint64),
        np.frombuffer(tokens, np.int64) if tokens else np.empty(0, np.int64),
        np.frombuffer(sizes, np.int64) if sizes else np.empty(0, np.int64),
    )


def _batches(documents: Iterator[Document], may_split: bool) -> Iterator[list[tuple[str, bool]]]:
    """Yield lists of (text, whether it ends a document) of about `_BATCH` characters."""
    batch: list[tuple[str, bool]] = []
    room = _BATCH
    for document in documents:
        text = document.text
        parts = tokenizers_.split(text, _PART) if may_split else [text]
        for number, part in enumerate(parts, start=1):
            batch.append((part, number == len(parts)))
            room -= len(part)
            if room <= 0:
                yield batch
                batch, room = [], _BATCH
    if batch:
        yield batch


def _pieces(split: Split, index: _Index, assignment: Assignment) -> Iterator[tuple[int, int, int]]:
    """Yield (document, first token, token after the last) of a split, without end tokens."""
    after = np.cumsum(index.tokens)
    for document, held_out in enumerate(assignment.held_out.tolist()):
        stop = int(after[document]) - 1
        begin = stop + 1 - int(index.tokens[document])
        cut = assignment.cuts.get(document)
        if cut is not None:
            middle = begin + cut
            yield (document, begin, middle) if split == "train" else (document, middle, stop)
        elif held_out == (split == "validation"):
            yield document, begin, stop


def _write_split(
    new: Path,
    split: Split,
    pieces: Iterator[tuple[int, int, int]],
    tokens: npt.NDArray[Any],
    index: _Index,
    lengths: npt.NDArray[np.int32],
    end: int,
) -> Counts:
    """Copy a split's documents to its own files, each followed by `end`."""
    begins = array("q", [0])
    size = 0
    ending = np.array([end], dtype=tokens.dtype).tobytes()
    with (new / f"{split}.tokens").open("wb") as file:
        for document, begin, stop in pieces:
            piece = tokens[begin:stop]
            file.write(piece.tobytes())
            file.write(ending)
            begins.append(begins[-1] + len(piece) + 1)
            whole = len(piece) + 1 == index.tokens[document]
            size += int(index.bytes[document] if whole else lengths[piece].sum(dtype=np.int64))
    offsets = np.frombuffer(begins, np.int64).astype("<i8")
    (new / f"{split}.documents").write_bytes(offsets.tobytes())
    return Counts(documents=len(offsets) - 1, tokens=int(offsets[-1]), bytes=size)


def _fingerprint(folder: Path, tokenizer: str) -> str:
    total = hashlib.sha256(tokenizer.encode())
    for split in SPLITS:
        for kind in ("tokens", "documents"):
            with (folder / f"{split}.{kind}").open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


def _identity(sources: Sequence[str], inventory: Inventory) -> list[list[Any]]:
    """Return what says, without reading them, whether the sources are the same as before."""
    identity: list[list[Any]] = []
    for source in sources:
        if source == DEFAULT:
            identity.append([DEFAULT, sys.version])
        elif source.startswith("hf:"):
            folder = Path(source.split(":")[1]).expanduser()
            inside = sorted(folder.rglob("*")) if folder.is_dir() else []
            identity.append([source, [_stamp(path) for path in inside if path.is_file()]])
    identity += [_stamp(path) for path in inventory.files]
    return identity


def _stamp(path: Path) -> list[Any]:
    state = path.stat()
    return [str(path.resolve()), state.st_size, state.st_mtime_ns]


def _reusable(folder: Path, key: dict[str, Any]) -> bool:
    """Say whether the folder holds a store of this key; raise when it holds something else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    if not (folder / _MANIFEST).is_file():
        raise ConfigError(
            Problem(
                "data", f"{folder} holds something that is no token store", "name another folder"
            )
        )
    try:
        same = _manifest(folder).get("key") == json.loads(json.dumps(key))
        if same:
            TokenStore.open(folder).verify()
    except CheckpointError as error:
        logger.warning("%s; tokenizing again", error)
        return False
    return same


def _publish(new: Path, folder: Path) -> None:
    """Put the finished folder `new` in the place of `folder`."""
    if folder.exists():
        aside = _temporary(folder)
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    new.rename(folder)


def _temporary(folder: Path) -> Path:
    """Return a name beside `folder` that nothing else has."""
    return folder.with_name(f".{folder.name}.{secrets.token_hex(4)}")


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{folder} is no token store ({error.strerror or error})") from None
    except ValueError:
        raise CheckpointError(f"{path} is damaged; delete the folder to tokenize again") from None
    if not isinstance(manifest, dict) or manifest.get("key", {}).get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has another format than this nacre; delete the folder to tokenize again"
        )
    return manifest


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        what = f"has {found:,} bytes instead of {expected:,}" if found >= 0 else "is missing"
        raise CheckpointError(f"{path} {what}; delete the folder to tokenize again")


def _dtype(vocabulary_size: int) -> np.dtype[Any]:
    return np.dtype("<u2" if vocabulary_size <= 65_536 else "<u4")


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
