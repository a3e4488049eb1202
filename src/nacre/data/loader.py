"""Resumable batches: windows of a token store in an order that a seed alone decides.

Window w holds tokens `w * context` to `w * context + context` inclusive: `context + 1` tokens, the
last of which is the next window's first, so that every token but the first is predicted once an
epoch. A position counts windows since the first epoch began, whatever the batch size. B: batch,
T: context.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any, TypeAlias, TypedDict, cast

import numpy as np
import numpy.typing as npt

from nacre.data.shards import Split, TokenStore
from nacre.errors import CheckpointError, DataError, FingerprintError

Batch: TypeAlias = npt.NDArray[np.int64]

_ROUNDS = 8


class LoaderState(TypedDict):
    """Where a loader stands: plain JSON."""

    position: int
    seed: int
    context: int
    split: str
    store: str


class Loader:
    """An endless, shuffled, exactly resumable stream of batches.

    Iterating yields `(batch, state)`: int64 [B, T + 1] and the position after that batch.
    `Loader(..., start=state)` continues there, with another batch size if wanted. Each epoch is a
    permutation of the windows that depends on the seed and the epoch alone, on every machine.
    `part` (which, of how many) gives only that part of every batch: positions do not change by it.

    Raises DataError when the split has no complete window or nothing is held out,
    FingerprintError when `start` belongs to another store, split, context or seed.
    """

    def __init__(
        self,
        store: TokenStore,
        split: Split,
        *,
        context: int,
        batch_size: int,
        seed: int,
        start: LoaderState | None = None,
        part: tuple[int, int] = (0, 1),
    ) -> None:
        if context < 1 or batch_size < 1:
            raise ValueError(f"context {context} and batch_size {batch_size} must be at least 1")
        self.store, self.split = store, split
        self.context, self.batch_size, self.seed, self.part = context, batch_size, seed, part
        _require_held_out(store)
        self._tokens = store.tokens(split)
        self.windows = (len(self._tokens) - 1) // context
        """Windows in one epoch."""
        if self.windows < 1:
            raise DataError(
                f"the {split} text has {len(self._tokens):,} tokens, but a window of context "
                f"{context:,} needs {context + 1:,}: the context is longer than the corpus; give "
                "more text or a smaller context"
            )
        self.position = 0 if start is None else self._accept(start)

    def __iter__(self) -> Iterator[tuple[Batch, LoaderState]]:
        position = self.position
        while True:
            ids = self.batch_ids(position)
            position += self.batch_size
            yield self.gather(ids), self.state(position)

    def state(self, position: int) -> LoaderState:
        """Return the state after `position` windows."""
        return {
            "position": position,
            "seed": self.seed,
            "context": self.context,
            "split": self.split,
            "store": self.store.fingerprint,
        }

    def batch_ids(self, position: int) -> npt.NDArray[np.int64]:
        """Return the ids of the windows of the batch at a position, or of this loader's part."""
        which, parts = self.part
        start, stop = (self.batch_size * n // parts for n in (which, which + 1))
        return self.window_ids(position + start, stop - start)

    def window_ids(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """Return the ids of the `count` windows from `position` on, int64 [count]."""
        ids = np.empty(count, dtype=np.int64)
        done = 0
        while done < count:
            epoch, first = divmod(position + done, self.windows)
            part = np.arange(first, min(first + count - done, self.windows), dtype=np.uint64)
            ids[done : done + len(part)] = permute(part, self.windows, self.seed, epoch)
            done += len(part)
        return ids

    def distinct(self, position: int, count: int) -> npt.NDArray[np.int64]:
        """Return the windows among the `count` from `position` on, once each, by first use."""
        ids = self.window_ids(position, min(count, 2 * self.windows))  # two epochs hold a whole one
        _, first_use = np.unique(ids, return_index=True)
        return ids[np.sort(first_use)]

    def gather(self, ids: npt.NDArray[np.int64]) -> Batch:
        """Return the windows with these ids, int64 [len(ids), T + 1]."""
        places = ids[:, None] * self.context + np.arange(self.context + 1)
        return self._tokens[places].astype(np.int64)

    def _accept(self, start: LoaderState) -> int:
        """Return the position of a state that belongs to this loader, or raise."""
        own = cast(dict[str, Any], self.state(0))
        fixes = {
            "store": "resume with the data, tokenizer and holdout of the run",
            "split": "resume the split that the state was saved for",
            "context": "resume with the same context",
            "seed": "resume with the same seed",
        }
        for field, fix in fixes.items():
            found = start.get(field)
            if found != own[field]:
                raise FingerprintError(f"the data cursor's {field}", own[field], str(found), fix)
        position = start.get("position")
        if not isinstance(position, int) or position < 0:
            raise CheckpointError(f"the data cursor's position is {position!r}, not a count")
        return position


def validation_batches(
    store: TokenStore, context: int, batch_size: int, limit_tokens: int | None = None
) -> Iterator[Batch]:
    """Yield the held-out windows in order, int64 [<= B, T + 1].

    Windows share one token, so every held-out token but the first is predicted exactly once. What
    is left after the last complete window comes as one shorter batch [1, < T + 1].
    `limit_tokens` stops after that many predicted tokens, rounded down to complete windows but at
    least one; nothing shorter follows then. Raises DataError when nothing is held out.
    """
    _require_held_out(store)
    tokens = store.tokens("validation")
    predicted = len(tokens) - 1
    windows = predicted // context
    limited = limit_tokens is not None and limit_tokens < predicted
    if limited and limit_tokens is not None:
        windows = min(windows, max(1, limit_tokens // context))
    return _in_order(tokens, context, batch_size, windows, rest=not (limited and windows))


def _in_order(
    tokens: npt.NDArray[Any], context: int, batch_size: int, windows: int, rest: bool
) -> Iterator[Batch]:
    for first in range(0, windows, batch_size):
        ids = np.arange(first, min(first + batch_size, windows))
        yield tokens[ids[:, None] * context + np.arange(context + 1)].astype(np.int64)
    if rest and len(tokens) - 1 > windows * context:
        yield tokens[None, windows * context :].astype(np.int64)


def _require_held_out(store: TokenStore) -> None:
    held_out = len(store.tokens("validation"))
    if held_out < 2:
        raise DataError(
            f"only {held_out} tokens are held out for validation; give more text or a larger "
            "holdout"
        )


def permute(
    index: npt.NDArray[np.uint64], size: int, seed: int, epoch: int
) -> npt.NDArray[np.int64]:
    """Map indices below `size` to their places in the shuffled order of (seed, epoch), int64.

    A Feistel network over the next power of four with cycle walking (Black and Rogaway 2002):
    constant memory, and integers alone, so the order never changes with a NumPy version.
    """
    half = np.uint64(max(1, (max(size - 1, 1).bit_length() + 1) // 2))
    mask = (np.uint64(1) << half) - np.uint64(1)
    keys = [
        np.frombuffer(hashlib.sha256(f"{seed} {epoch} {place}".encode()).digest()[:8], "<u8")
        for place in range(_ROUNDS)
    ]

    def once(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        left, right = x >> half, x & mask
        for key in keys:
            left, right = right, left ^ (_mix(right + key) & mask)
        return left << half | right

    out = once(index)
    while (outside := out >= size).any():
        out[outside] = once(out[outside])
    return out.astype(np.int64)


def _mix(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Scramble 64-bit integers: the finalizer of SplitMix64 (Steele et al. 2014)."""
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))
