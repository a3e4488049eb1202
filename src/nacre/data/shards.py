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
import itertools
import json
import logging
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from nacre import tokenizer as tokenizers_
from nacre.data.corpus import Errors, check
from nacre.data.encoding import (
    TOKENS,
    encode,
    finish,
    open_index,
    temporary,
    token_type,
    workplace,
)
from nacre.data.holdout import Assignment, assign
from nacre.errors import CheckpointError, ConfigError, DataError, Problem
from nacre.untrusted import read_json

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

Split: TypeAlias = Literal["train", "validation"]
SPLITS: tuple[Split, ...] = ("train", "validation")

_MANIFEST = "store.json"
_FORMAT = 1
_BLOCK = 1 << 20  # tokens or documents copied at a time

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
        if not store._is_sound():
            raise CheckpointError(
                f"{folder / _MANIFEST} is damaged; delete the folder to tokenize again"
            )
        for split, counts in store.counts.items():
            _check_size(folder / f"{split}.tokens", counts.tokens * store.dtype.itemsize)
            _check_size(folder / f"{split}.documents", (counts.documents + 1) * 8)
        return store

    def _is_sound(self) -> bool:
        """Say whether the manifest's values are of their kinds."""
        every = (dataclasses.astuple(counts) for counts in self.counts.values())
        numbers = [self.vocabulary_size, self.end, *itertools.chain.from_iterable(every)]
        whole = all(type(number) is int and 0 <= number < 2**62 for number in numbers)
        named = all(
            isinstance(name, str) and name.isascii() for name in (self.fingerprint, self.tokenizer)
        )
        return whole and named and self.end < self.vocabulary_size < 2**32

    def verify(self) -> None:
        """Read everything; raise CheckpointError if it is not what was written."""
        if fingerprint(self.folder, self.tokenizer) != self.fingerprint:
            raise CheckpointError(
                f"{self.folder}: damaged: its tokens are not what was written; delete the folder "
                "to tokenize again"
            )
        for split in SPLITS:
            begins, tokens = self.documents(split), self.tokens(split)
            ascending = begins[0] == 0 and begins[-1] == len(tokens) and (np.diff(begins) > 0).all()
            parts = (tokens[at : at + _BLOCK] for at in range(0, len(tokens), _BLOCK))
            if not ascending or any(part.max() >= self.vocabulary_size for part in parts):
                raise CheckpointError(
                    f"{self.folder}: damaged: its {split} tokens are none of its tokenizer; delete "
                    "the folder to tokenize again"
                )

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the tokens: uint16 up to 65,536 token ids, uint32 above."""
        return token_type(self.vocabulary_size)

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

    The same means: files of the same path, size and time of change (of a URL: size and what its
    store calls a version; for `hf:` of the hub: the same name), the same tokenizer, holdout and
    errors. Another store in the folder is replaced. About `holdout` of the text is held out by
    document; see `nacre.data.holdout`. Special tokens' names in the text stay text.

    What is there is read once: if it is damaged, it is made again. Work that was cut off is kept
    beside `folder`, and the same call goes on from there. The memory it takes does not grow with
    the text. `progress` receives the bytes of the sources read since its last call; together they
    are about `check(sources).total_bytes`.

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
        "sources": [part.identity for part in inventory.parts],
        "tokenizer": tokenizers_.fingerprint(tokenizer),
        "holdout": holdout,
        "errors": errors,
    }
    if _reusable(folder, key):
        logger.info("%s: tokenized before, used again", folder)
        return TokenStore.open(folder)
    folder.parent.mkdir(parents=True, exist_ok=True)
    with workplace(folder, key) as place:
        encode(inventory, tokenizer, place, key, errors, progress or (lambda _: None))
        _fill(place, tokenizer, key)
        finish(place)
        _publish(place, folder)
    return TokenStore.open(folder)


def _fill(place: Path, tokenizer: PreTrainedTokenizerBase, key: dict[str, Any]) -> None:
    """Divide the encoded documents in `place` into the splits, and describe them."""
    strings = tokenizers_.token_strings(tokenizer)
    lengths = tokenizers_.byte_lengths(tokenizer)
    end = tokenizers_.end_of_document(tokenizer)
    index = open_index(place)
    if not len(index):
        raise DataError("there is no text in the sources")
    tokens = _map(place / TOKENS, token_type(len(strings)))
    assignment = assign(index["hash"], index["tokens"], tokens, strings, key["holdout"])
    counts: dict[Split, Counts] = {}
    for split in SPLITS:
        pieces = _pieces(split, index, assignment)
        counts[split] = _write_split(place, split, pieces, tokens, lengths, end)
    manifest = {
        "key": key,
        "tokenizer": key["tokenizer"],
        "vocabulary_size": len(strings),
        "end": end,
        "counts": {split: dataclasses.asdict(count) for split, count in counts.items()},
        "fingerprint": fingerprint(place, key["tokenizer"]),
    }
    (place / _MANIFEST).write_text(json.dumps(manifest, indent=1) + "\n", encoding="utf-8")


@dataclass(frozen=True)
class _Stretch:
    """Tokens `begin` to `stop` of a document, without its end; its `bytes` if it is whole."""

    begin: int
    stop: int
    bytes: int | None


def _pieces(split: Split, index: npt.NDArray[Any], assignment: Assignment) -> Iterator[_Stretch]:
    """Yield what a split has of each document."""
    begin = 0
    for first in range(0, len(index), _BLOCK):
        for content, length, size in index[first : first + _BLOCK].tolist():
            stop = begin + length - 1
            cut = assignment.cuts.get(content)
            if cut is not None:
                middle = begin + cut
                train = split == "train"
                yield _Stretch(begin if train else middle, middle if train else stop, None)
            elif assignment.holds_out(content) == (split == "validation"):
                yield _Stretch(begin, stop, size)
            begin += length


def _write_split(
    place: Path,
    split: Split,
    pieces: Iterator[_Stretch],
    tokens: npt.NDArray[Any],
    lengths: npt.NDArray[np.int32],
    end: int,
) -> Counts:
    """Copy a split's documents to its own files, each followed by `end`."""
    place_in_split = documents = size = 0
    ending = np.array([end], dtype=tokens.dtype).tobytes()
    with (
        (place / f"{split}.tokens").open("wb") as file,
        (place / f"{split}.documents").open("wb") as begins,
    ):
        begins.write(_offset(0))
        for piece in pieces:
            for first in range(piece.begin, piece.stop, _BLOCK):
                block = tokens[first : min(first + _BLOCK, piece.stop)]
                file.write(block.tobytes())
                if piece.bytes is None:
                    size += int(lengths[block].sum(dtype=np.int64))
            file.write(ending)
            place_in_split += piece.stop - piece.begin + 1
            begins.write(_offset(place_in_split))
            size += piece.bytes or 0
            documents += 1
    return Counts(documents=documents, tokens=place_in_split, bytes=size)


def _offset(place: int) -> bytes:
    return place.to_bytes(8, "little", signed=True)


def fingerprint(folder: Path, tokenizer: str) -> str:
    """Return what identifies the files of a store, made with a tokenizer of that fingerprint."""
    total = hashlib.sha256(tokenizer.encode())
    for split in SPLITS:
        for kind in ("tokens", "documents"):
            with (folder / f"{split}.{kind}").open("rb") as file:
                total.update(hashlib.file_digest(file, "sha256").digest())
    return total.hexdigest()


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
        aside = temporary(folder)
        folder.rename(aside)
        shutil.rmtree(aside, ignore_errors=True)
    new.rename(folder)


def _manifest(folder: Path) -> dict[str, Any]:
    path = folder / _MANIFEST
    try:
        manifest = read_json(path)
    except OSError as error:
        raise CheckpointError(f"{folder} is no token store ({error.strerror or error})") from None
    except ValueError:
        raise CheckpointError(f"{path} is damaged; delete the folder to tokenize again") from None
    key = manifest.get("key") if isinstance(manifest, dict) else None
    if not isinstance(key, dict) or key.get("format") != _FORMAT:
        raise CheckpointError(
            f"{path} has another format than this nacre; delete the folder to tokenize again"
        )
    return manifest


def _check_size(path: Path, expected: int) -> None:
    found = path.stat().st_size if path.is_file() else -1
    if found != expected:
        what = f"has {found:,} bytes instead of {expected:,}" if found >= 0 else "is missing"
        raise CheckpointError(f"{path} {what}; delete the folder to tokenize again")


def _map(path: Path, dtype: np.dtype[Any]) -> npt.NDArray[Any]:
    if path.stat().st_size == 0:  # which cannot be mapped
        return np.empty(0, dtype)
    return np.memmap(path, dtype=dtype, mode="r")
