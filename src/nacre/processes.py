"""One run in several processes: which this is, what only the first does, what all must agree on.

torchrun or `accelerate launch` starts them and Accelerate connects them. In a run of one process
everything here does the plain thing at once. All processes must call these functions in the same
order.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from datetime import timedelta
from functools import lru_cache
from itertools import islice
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.tensor import DTensor

from nacre.errors import FirstFailed

T = TypeVar("T")

PATIENCE = timedelta(days=7)
"""How long processes wait while the first one prepares what all of them read."""


def count() -> int:
    """Return how many processes work on the run; as the launcher says before they are connected."""
    return dist.get_world_size() if connected() else int(os.environ.get("WORLD_SIZE", "1"))


def rank() -> int:
    """Return the number of this process, from 0."""
    return dist.get_rank() if connected() else int(os.environ.get("RANK", "0"))


def is_main() -> bool:
    """Tell whether this is the first process: it alone prepares, writes and reports."""
    return rank() == 0


def connected() -> bool:
    """Tell whether this process is one of several that are connected."""
    return dist.is_available() and dist.is_initialized()


@lru_cache(maxsize=1)
def _patient_group() -> Any:
    """A group for waiting alone. A process that dies ends the wait, one that is slow does not."""
    return dist.new_group(backend="gloo", timeout=PATIENCE)


def disconnect() -> None:
    """Leave the others, if there are any: the end of a run."""
    if connected():
        _patient_group.cache_clear()
        dist.destroy_process_group()


def wait() -> None:
    """Wait until every process is here, however long that takes."""
    if count() > 1:
        dist.barrier(group=_patient_group())


def agree(value: T) -> T:
    """Return the first process's value in all of them."""
    if count() == 1:
        return value
    shared: list[Any] = [value]
    dist.broadcast_object_list(shared, src=0)
    return shared[0]


def on_main(work: Callable[[], T]) -> T:
    """Let the first process do some work; return what it returns, in all of them.

    Raises what it raises there, `FirstFailed` in the others.
    """
    result: T | None = None
    failed: BaseException | None = None
    if is_main():
        try:
            result = work()
        except BaseException as error:
            failed = error
    wait()
    shared, broken = agree((result, failed is not None))
    if failed is not None:
        raise failed
    if broken:
        raise FirstFailed("the first process failed")
    return cast(T, shared)


def on_main_first(work: Callable[[], T]) -> T:
    """Let the first process do some work, then the others the same on what it left."""
    done: list[T] = []
    on_main(lambda: done.append(work()))
    return done[0] if done else work()


def gather(value: T) -> list[T]:
    """Return the values of all processes, by rank, in all of them."""
    if count() == 1:
        return [value]
    values: list[Any] = [None] * count()
    dist.all_gather_object(values, value)
    return values


def total(*numbers: float, device: torch.device) -> list[float]:
    """Return the sum of each number over all processes; `device` is the one they train on."""
    if count() == 1:
        return list(numbers)
    summed = torch.tensor(numbers, dtype=torch.float64, device=device)
    dist.all_reduce(summed)
    return summed.tolist()


def share(items: Iterable[T]) -> Iterator[tuple[T, bool]]:
    """Yield this process's part of a sequence: an item of every `count()`, as many in each process.

    Where the last ones do not suffice, an item is given once more with False: it does not count.
    """
    items = iter(items)
    while group := list(islice(items, count())):
        yield group[min(rank(), len(group) - 1)], rank() < len(group)


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, gathered from all processes if it is sharded: all must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
