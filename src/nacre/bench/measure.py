"""How a benchmark measures: rows with a verdict, interleaved timing, product rates, peak memory.

Nothing here imports torch before it is needed, so that a fresh process starts quickly.
"""

from __future__ import annotations

import gc
import importlib
import os
import statistics
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from multiprocessing import get_all_start_methods, get_context
from typing import TYPE_CHECKING, Any, Literal, TypeVar

if TYPE_CHECKING:
    import torch

R = TypeVar("R")
Clock = Callable[[], float]

FEWEST_ROUNDS = 3
IMPORTED_ONCE = (
    "nacre.bench.stages",
    "transformers.models.llama.modeling_llama",
    "torch._dynamo",
)
_PRODUCT_SECONDS = 0.05  # least time of one timed run of products, and of warming up


@dataclass(frozen=True)
class Effort:
    """How much work a suite may take: `seconds` in all, at most `rounds` a comparison.

    `quick` asks for tiny shapes. A suite tells `say` each case before it measures it.
    """

    quick: bool
    rounds: int
    seconds: float
    say: Callable[[str], None] = lambda case: None


FULL = Effort(quick=False, rounds=7, seconds=90.0)
QUICK = Effort(quick=True, rounds=FEWEST_ROUNDS, seconds=1.0)


@dataclass(frozen=True)
class Target:
    """What a row must reach.

    of: `measured`, in the row's unit; `ratio`, at least so many times better than the peer;
        `peer`, at most so many times worse than the peer;
        `limit`, at most so many times worse than the limit.
    """

    of: Literal["measured", "ratio", "peer", "limit"]
    value: float


@dataclass(frozen=True)
class Sample:
    """The values of one candidate, one a round."""

    values: tuple[float, ...]

    @property
    def median(self) -> float:
        """The middle value."""
        return statistics.median(self.values)

    @property
    def spread(self) -> float:
        """Half the interquartile range; 0 for a single value."""
        if len(self.values) < 2:
            return 0.0
        low, _, high = statistics.quantiles(self.values, n=4, method="inclusive")
        return (high - low) / 2

    def per(self, amount: float) -> Sample:
        """Return seconds as rates: `amount` over each value."""
        return Sample(tuple(amount / value for value in self.values))


@dataclass(frozen=True)
class Row:
    """One measured case of a suite beside what it is compared with.

    `measured`, `peer` and `limit` are in `unit` (`s`, `B` for bytes, or a rate); `spread` and
    `peer_spread` are half an interquartile range over `rounds`. `better` says which way is better.
    """

    suite: str
    case: str
    unit: str
    better: Literal["lower", "higher"]
    measured: float
    spread: float = 0.0
    rounds: int = 1
    peer: float | None = None
    peer_spread: float = 0.0
    peer_name: str = ""
    limit: float | None = None
    limit_name: str = ""
    target: Target | None = None
    note: str = ""

    @property
    def ratio(self) -> float | None:
        """How many times better than the peer; None without one."""
        if self.peer is None:
            return None
        return self.peer / self.measured if self.better == "lower" else self.measured / self.peer

    @property
    def limit_ratio(self) -> float | None:
        """How many times worse than the limit; None without one."""
        if self.limit is None:
            return None
        return self.measured / self.limit if self.better == "lower" else self.limit / self.measured

    @property
    def met(self) -> bool | None:
        """Whether the target is met; None without a target, or without what it rests on."""
        if self.target is None:
            return None
        value = self.target.value
        if self.target.of == "measured":
            return self.measured <= value if self.better == "lower" else self.measured >= value
        if self.target.of == "ratio":
            return None if self.ratio is None else self.ratio >= value
        if self.target.of == "peer":
            return None if self.ratio is None else 1 / self.ratio <= value
        return None if self.limit_ratio is None else self.limit_ratio <= value

    def record(self) -> dict[str, Any]:
        """Return the row as plain data, with `ratio`, `limit_ratio` and `met`."""
        found = {"ratio": self.ratio, "limit_ratio": self.limit_ratio, "met": self.met}
        return asdict(self) | found


def compare(
    candidates: Mapping[str, Callable[[], object]],
    rounds: int,
    budget_seconds: float,
    *,
    device: str = "cpu",
    clock: Clock = time.perf_counter,
) -> dict[str, Sample]:
    """Time the candidates in seconds: each once to warm up, then in turn, round after round.

    Stops after `rounds` rounds, or after the first from the third on that ends beyond the budget
    (counted from the start). A candidate whose warm-up alone outlasts the budget is not called
    again: its one value is the warm-up. Waits for the device before and after each call.
    """
    assert rounds >= FEWEST_ROUNDS

    def timed(work: Callable[[], object]) -> float:
        synchronise(device)
        start = clock()
        work()
        synchronise(device)
        return clock() - start

    began = clock()
    warm = {name: timed(work) for name, work in candidates.items()}
    values: dict[str, list[float]] = {name: [] for name in candidates}
    repeated = [name for name in candidates if warm[name] <= budget_seconds]
    for done in range(rounds):
        if done >= FEWEST_ROUNDS and clock() - began >= budget_seconds:
            break
        for name in repeated:
            values[name].append(timed(candidates[name]))
    return {name: Sample(tuple(found or [warm[name]])) for name, found in values.items()}


def synchronise(device: str) -> None:
    """Wait until a CUDA device has done all it was given; nothing on other devices."""
    if device.startswith("cuda"):
        import torch

        torch.cuda.synchronize(device)


def default_device() -> str:
    """Return the device that training takes, as accelerate chooses it."""
    from accelerate import PartialState

    device = str(PartialState().device)
    PartialState._reset_state()
    return device


def training_dtype(device: str) -> torch.dtype:
    """Return the dtype of training's products: bf16 where the device is fast in it, else fp32."""
    import torch

    from nacre.train.device import bf16_is_fast

    return torch.bfloat16 if bf16_is_fast(torch.device(device)) else torch.float32


def matrix_rate(
    dtype: torch.dtype,
    M: int,
    K: int,
    N: int,
    device: str = "cpu",
    *,
    clock: Clock = time.perf_counter,
) -> float:
    """Return the FLOP/s of a plain product `[M, K] @ [K, N]`: 2 M K N over its median time."""
    import torch

    left = torch.randn(M, K, device=device).to(dtype)
    right = torch.randn(K, N, device=device).to(dtype)
    out = torch.empty(M, N, dtype=dtype, device=device)

    def products(count: int) -> float:
        synchronise(device)
        start = clock()
        for _ in range(count):
            torch.mm(left, right, out=out)
        synchronise(device)
        return clock() - start

    count = 1
    while products(count) < _PRODUCT_SECONDS:
        count *= 2
    seconds = statistics.median(products(count) for _ in range(5))
    return 2.0 * M * K * N * count / seconds


def fresh_process(
    function: Callable[..., R], *arguments: Any, environment: Mapping[str, str] | None = None
) -> R:
    """Return what an importable function returns in a process of its own.

    `environment` is set there before any of its threads starts. What it raises is raised.

    Where there is fork and no CUDA, which does not survive one, the process is one of a server that
    has imported what takes seconds (`IMPORTED_ONCE`) and computed nothing; else it starts bare.
    """
    import torch

    where = (function.__module__, function.__qualname__)
    forks = "forkserver" in get_all_start_methods() and not torch.cuda.is_available()
    context = get_context("forkserver" if forks else "spawn")
    context.set_forkserver_preload(list(IMPORTED_ONCE))
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(_call, *where, dict(environment or {}), arguments).result()


def _call(module: str, name: str, environment: dict[str, str], arguments: tuple[Any, ...]) -> Any:
    os.environ.update(environment)
    return getattr(importlib.import_module(module), name)(*arguments)


def peak_memory(prepare: Callable[..., Callable[[], object]], *arguments: Any) -> int:
    """Return the peak bytes of a piece of work above what its fresh process held before it.

    The importable function `prepare(*arguments)` makes the inputs and returns the work, which is
    then called once; `peak_memory(functools.partial, function, ...)` measures a plain call.
    Resident memory, or allocated device memory where `prepare` has used CUDA; see
    `train.device.PeakMemory`.
    """
    return fresh_process(_peak, prepare.__module__, prepare.__qualname__, arguments)


def _peak(module: str, name: str, arguments: tuple[Any, ...]) -> int:
    import torch

    from nacre.train.device import PeakMemory

    work = getattr(importlib.import_module(module), name)(*arguments)
    device = "cuda" if torch.cuda.is_initialized() else "cpu"
    gc.collect()
    synchronise(device)
    peak = PeakMemory(torch.device(device))
    before = peak.read()
    work()
    synchronise(device)
    return peak.read() - before
