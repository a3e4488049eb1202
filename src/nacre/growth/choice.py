"""Which trunk mode a stage takes when the plan leaves it open: measured here, then computed."""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import ByteSize

from nacre.growth.cache import CacheBuilder, Identity, TrunkCache
from nacre.growth.trunk import RecomputedTrunk

TRIALS = 3  # batches measured, after one that is not counted


@dataclass(frozen=True)
class Reader:
    """A stage as far as its trunk is concerned.

    `passes` windows go through a trunk of `depth` blocks, evaluations included; `records` of them
    are distinct; `cached_below` blocks need not be run to store these, because the outputs of those
    are stored already.
    """

    depth: int
    passes: int
    records: int
    cached_below: int = 0


@dataclass(frozen=True)
class Rates:
    """Seconds for one window: through one block, onto the disk, and back."""

    block: float
    write: float
    read: float


@dataclass(frozen=True)
class Choice:
    """How a stage's trunk runs, and why."""

    mode: Literal["recompute", "cache"]
    reason: str
    measured: dict[str, float] | None = None

    def record(self) -> dict[str, Any]:
        """Return the choice as plain data."""
        return asdict(self)


def seconds(readers: Sequence[Reader], rates: Rates) -> tuple[float, float]:
    """Return the seconds that the trunk takes in these stages: run for every batch, and cached."""
    recompute = sum(r.passes * r.depth * rates.block for r in readers)
    cache = 0.0
    for reader in readers:
        fresh = reader.depth - reader.cached_below
        from_below = rates.read if reader.cached_below else 0.0
        cache += reader.records * (fresh * rates.block + rates.write + from_below)
        cache += reader.passes * rates.read
    return recompute, cache


def choose(
    readers: Sequence[Reader],
    needed: int,
    available: int,
    measure: Callable[[], Rates],
    *,
    rereads: bool,
) -> Choice:
    """Choose for the first of `readers`; the others are the later stages that could go on from it.

    `needed` and `available` are bytes of disk; `rereads` says that the first trains on some window
    more than once. `measure` is called only if there is a choice.
    """
    if len(readers) == 1 and not rereads and not readers[0].cached_below:
        return Choice("recompute", "every window is read once, and by this stage alone")
    if needed > available:
        return Choice(
            "recompute",
            f"a cache would take {size(needed)}, {size(available)} are allowed",
        )
    rates = measure()
    recompute, cache = seconds(readers, rates)
    measured = asdict(rates) | {"recompute_seconds": recompute, "cache_seconds": cache}
    stages = "this stage" if len(readers) == 1 else f"this stage and {len(readers) - 1} after it"
    reason = (
        f"for {stages} the trunk would take {recompute:.1f} s run for every batch, "
        f"{cache:.1f} s cached"
    )
    return Choice("cache" if cache < recompute else "recompute", reason, measured)


def size(count: int) -> str:
    """Return a number of bytes as people and plans write it, `1.5GB`."""
    return ByteSize(count).human_readable(decimal=True)


def measure(
    trunk: RecomputedTrunk, ids_BT: torch.Tensor, identity: Identity, folder: Path
) -> Rates:
    """Measure this machine: a whole trunk on a batch of ids, and a cache like `identity`'s."""
    depth, batch = identity.depth, len(ids_BT)
    h_BTD = trunk(ids_BT)
    block = _best(lambda: _finish(trunk(ids_BT))) / batch / depth
    folder.mkdir(parents=True, exist_ok=True)
    trial = Path(tempfile.mkdtemp(dir=folder, prefix=".trial-"))
    try:
        small = replace(identity, windows=TRIALS * batch)

        def write() -> None:
            with CacheBuilder(trial, small, batch_windows=batch) as builder:
                for records in builder.missing():
                    builder.write(records, (h_BTD for _ in range(len(records) // batch)))
                builder.finish()

        started = time.perf_counter()
        write()
        written = (time.perf_counter() - started) / small.windows
        cache = TrunkCache.open(trial, small, verify=False)
        slots = np.random.default_rng(0).permutation(small.windows)[:batch]
        read = _best(lambda: cache.read(slots)) / batch
        cache.close()
    finally:
        shutil.rmtree(trial, ignore_errors=True)
    return Rates(block=block, write=written, read=read)


def _finish(h_BTD: torch.Tensor) -> None:
    if h_BTD.is_cuda:
        torch.cuda.synchronize(h_BTD.device)


def _best(work: Callable[[], object]) -> float:
    """Return the shortest of a few runs, in seconds."""
    times: list[float] = []
    for _ in range(TRIALS):
        started = time.perf_counter()
        work()
        times.append(time.perf_counter() - started)
    return min(times)
