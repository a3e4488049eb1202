"""A trunk's outputs for what one stage reads: made once, stored, read back in training order.

The stage's training windows are stored each once, in the order of their first use, and its held-out
windows beside them. If the stage below stored the outputs of its own, shorter trunk for the same
windows, only the blocks that were frozen since are run: a growth of L blocks costs each block one
pass over the text instead of one for every stage above it.

Shapes: B batch, T positions, D width; `ids_BT`, `h_BTD`.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Generator, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from functools import partial
from itertools import count as numbers
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch.nn import functional

from nacre import processes
from nacre.data.loader import Batch, Loader, LoaderState, validation_batches
from nacre.growth.cache import CacheBuilder, Dtype, Identity, TrunkCache, cache_bytes, read_identity
from nacre.growth.trunk import RecomputedTrunk

Windows = npt.NDArray[np.int64]
TRAIN, HELD_OUT = "train", "validation"


@dataclass(frozen=True)
class Reading:
    """What a stage reads: `count` windows from position `first` of a loader, and the held-out text.

    `batch_windows` windows go through the model at once.
    """

    loader: Loader
    first: int
    count: int
    batch_windows: int
    validation_tokens: int

    def windows(self) -> Windows:
        """Return the distinct training windows in order of first use, int64 [n]."""
        return self.loader.distinct(self.first, self.count)

    def held_out(self) -> Iterator[Batch]:
        """Yield the held-out windows, int64 [<= B, <= T + 1]."""
        return validation_batches(
            self.loader.store,
            context=self.loader.context,
            batch_size=self.batch_windows,
            limit_tokens=self.validation_tokens,
        )

    def held_out_windows(self) -> int:
        """Return how many windows `held_out` yields."""
        return sum(map(len, self.held_out()))

    def order(self) -> str:
        """Return what identifies the training windows and their order; `covered_by` reads it."""
        return f"seed {self.loader.seed}, windows {self.first} + {self.count}"

    def covered_by(self, order: str) -> Windows | None:
        """Return the slot of every window of the corpus in a cache of that order, or None.

        int64 [windows], -1 for a window that the cache does not hold. None if it lacks a window
        that is read here, or if `order` is none that `order` writes.
        """
        match = re.fullmatch(r"seed (\d+), windows (\d+) \+ (\d+)", order)
        if match is None:
            return None
        seed, first, count = map(int, match.groups())
        if seed != self.loader.seed:
            return None
        slots = slots_of(self.loader.distinct(first, count), self.loader.windows)
        return slots if (slots[self.windows()] >= 0).all() else None


def slots_of(windows: Windows, total: int) -> Windows:
    """Return the place of each of `total` windows in a list of windows, -1 if not there."""
    slots = np.full(total, -1, dtype=np.int64)
    slots[windows] = np.arange(len(windows))
    return slots


@dataclass(frozen=True)
class Identities:
    """What the two caches of a stage must hold."""

    train: Identity
    held_out: Identity

    @property
    def bytes(self) -> int:
        """Disk that both take."""
        return self.bytes_of(self.train.windows)

    def bytes_of(self, windows: int) -> int:
        """Return the disk that both would take with that many training windows."""
        return cache_bytes(replace(self.train, windows=windows)) + cache_bytes(self.held_out)


def identities(
    reading: Reading, fingerprint: str, depth: int, width: int, dtype: Dtype
) -> Identities:
    """Return the identities of the caches of a trunk (its fingerprint and depth) for a stage."""
    loader = reading.loader

    def identity(order: str, windows: int) -> Identity:
        return Identity(
            trunk=fingerprint,
            depth=depth,
            corpus=loader.store.fingerprint,
            order=order,
            windows=windows,
            context=loader.context,
            width=width,
            dtype=dtype,
        )

    held_out = f"held out, {reading.validation_tokens} tokens at most"
    return Identities(
        identity(reading.order(), len(reading.windows())),
        identity(held_out, reading.held_out_windows()),
    )


@dataclass(frozen=True)
class Below:
    """The caches of the stage below: outputs of the first `depth` blocks for the same windows."""

    depth: int
    train: TrunkCache
    held_out: TrunkCache
    slots: Windows

    def close(self) -> None:
        """Close the files."""
        self.train.close()
        self.held_out.close()


def find_below(
    folder: Path, wanted: Identities, reading: Reading, fingerprint_at: Callable[[int], str]
) -> Below | None:
    """Open the caches that `wanted` can be made from, if they are in `folder`, else None.

    `fingerprint_at(depth)` is the fingerprint of the present trunk's first `depth` blocks: only a
    cache of exactly those will do. Raises `CheckpointError` if they are damaged.
    """
    train, held_out = read_identity(folder / TRAIN), read_identity(folder / HELD_OUT)
    if train is None or held_out is None:
        return None
    depth = train.depth
    for found, want in ((train, wanted.train), (held_out, wanted.held_out)):
        same = ("corpus", "context", "width", "dtype")
        if any(getattr(found, name) != getattr(want, name) for name in same):
            return None
        if found.depth != depth or not 0 < depth <= want.depth:
            return None
        if found.trunk != fingerprint_at(depth):
            return None
    slots = reading.covered_by(train.order)
    if slots is None or held_out.order != wanted.held_out.order:
        return None
    return Below(
        depth,
        TrunkCache.open(folder / TRAIN, train),
        TrunkCache.open(folder / HELD_OUT, held_out),
        slots,
    )


def build(
    folder: Path,
    wanted: Identities,
    reading: Reading,
    trunk: RecomputedTrunk,
    below: Below | None,
    device: torch.device,
    advance: Callable[[int], None] = lambda windows: None,
) -> list[str]:
    """Make the caches of a stage in `folder`, or complete them; return what was found wrong.

    `trunk` takes token ids, or what `below` holds if that is given. `advance` is told of windows.
    Batches are as large as training's: how a window is rounded may depend on how many are computed
    together (on a GPU it does), and both modes are to see the same numbers.
    """
    windows, loader = reading.windows(), reading.loader
    said: list[str] = []

    def train(records: range) -> Iterator[torch.Tensor]:
        for first in range(records.start, records.stop, reading.batch_windows):
            ids = windows[first : min(first + reading.batch_windows, records.stop)]
            if below is None:
                inputs = torch.from_numpy(loader.gather(ids)[:, :-1])
            else:
                inputs = below.train.read(below.slots[ids])
            yield trunk(_filled(inputs, reading.batch_windows).to(device))[: len(ids)]
            advance(len(ids) * processes.count())

    def held_out(records: range) -> Iterator[torch.Tensor]:
        for first, batch in numbered(reading.held_out()):
            if first not in records:
                continue
            length = batch.shape[1] - 1
            if below is None:
                inputs = torch.from_numpy(batch[:, :-1])
            else:
                inputs = below.held_out.read(np.arange(first, first + len(batch)))[:, :length]
            h_BTD = trunk(inputs.to(device))
            yield functional.pad(h_BTD, (0, 0, 0, loader.context - length))
            advance(len(batch) * processes.count())

    for name, identity, make in (
        (TRAIN, wanted.train, train),
        (HELD_OUT, wanted.held_out, held_out),
    ):
        part = (processes.rank(), processes.count())
        size = reading.batch_windows
        opened = partial(CacheBuilder, folder / name, identity, batch_windows=size, part=part)
        with processes.on_main_first(opened) as builder:
            if builder.replaced:
                said.append(builder.replaced)
            if builder.damaged:
                said.append(f"{builder.damaged} damaged segments of {folder / name} are made again")
            advance(builder.done)
            for records in builder.missing():
                builder.write(records, make(records))
            builder.finish()
            processes.wait()
            processes.on_main(builder.adopt)
    return said


def _filled(batch: torch.Tensor, windows: int) -> torch.Tensor:
    """Return a batch of so many windows: one that is shorter is filled up with its own."""
    return batch if len(batch) == windows else batch[torch.arange(windows) % len(batch)]


def numbered(batches: Iterator[Batch]) -> Iterator[tuple[int, Batch]]:
    """Yield batches, each with the number of its first window."""
    first = 0
    for batch in batches:
        yield first, batch
        first += len(batch)


class Outputs:
    """The stored outputs of a stage's trunk, in the order in which training asks for them."""

    def __init__(self, folder: Path, wanted: Identities, reading: Reading) -> None:
        """Open both caches; raises `FingerprintError` or `CheckpointError` as `TrunkCache.open`."""
        self.train = TrunkCache.open(folder / TRAIN, wanted.train, verify=False)
        self.validation = TrunkCache.open(folder / HELD_OUT, wanted.held_out, verify=False)
        self.slots = slots_of(reading.windows(), reading.loader.windows)

    def stream(
        self, loader: Loader, *, pin_memory: bool = False
    ) -> Generator[tuple[Batch, LoaderState, torch.Tensor | None]]:
        """Yield the loader's batches, each with its state and the trunk's output `h_BTD`.

        Reads ahead in a thread. Endless, as the loader is; a window that the stage was not said to
        read ends in an `AssertionError`.
        """

        def wanted() -> Iterator[Windows]:
            for position in numbers(loader.position, loader.batch_size):
                slots = self.slots[loader.batch_ids(position)]
                yield slots[slots >= 0]

        with closing(self.train.stream(wanted(), pin_memory=pin_memory)) as outputs:
            for (batch, state), h_BTD in zip(loader, outputs, strict=True):
                assert len(batch) == len(h_BTD), "the cache holds what the stage reads"
                yield batch, state, h_BTD

    def held_out(self, first: int, batch: Batch) -> torch.Tensor:
        """Return `h_BTD` of a held-out batch, numbered as `numbered(Reading.held_out())` does."""
        slots = np.arange(first, first + len(batch))
        return self.validation.read(slots)[:, : batch.shape[1] - 1]

    def close(self) -> None:
        """Close the files."""
        self.train.close()
        self.validation.close()
