"""`nacre bench`: what this machine makes of nacre, beside what else one would run and the limit.

A suite is a module with one function `suite(effort)` that yields rows.
"""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import platform
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from importlib import metadata
from typing import TYPE_CHECKING, Any

import nacre
from nacre.errors import ConfigError, Problem, nearest

if TYPE_CHECKING:
    from nacre.bench.measure import Row

SUITES = {
    "step": ("nacre.bench.step", "one optimizer step against its limit and transformers' Trainer"),
    "paper": ("nacre.bench.paper", "on a GPU, how much of it the papers' third stage uses"),
    "depth": ("nacre.bench.depth", "time and memory of a stage on trunks of 2 to 24 blocks"),
    "head": ("nacre.bench.head", "loss and gradients of a large head, time and memory"),
    "run": ("nacre.bench.growth", "a whole growth of six stages, cached and not, and end to end"),
    "substrate": ("nacre.bench.substrate", "a glyph substrate of 65,536 tokens x 1,024"),
    "tokenizer": ("nacre.bench.tokenizer", "English in MB/s, one thread and two"),
    "generate": ("nacre.bench.generate", "tokens/s of generation with the key-value cache"),
    "compose": ("nacre.bench.compose", "a composition of two experts against one of them"),
    "eval": ("nacre.bench.evaluation", "benchmarks by likelihood against lm-eval's model class"),
}
"""Per suite: the module, and what it measures."""


@dataclasses.dataclass(frozen=True)
class Results:
    """What a run of suites found: the machine, when (UTC), rows and seconds a suite."""

    machine: dict[str, Any]
    date: str
    quick: bool
    suites: dict[str, list[Row]]
    seconds: dict[str, float]

    def record(self) -> dict[str, Any]:
        """Return the results as plain data for JSON."""
        suites = {name: [row.record() for row in rows] for name, rows in self.suites.items()}
        return {
            "machine": self.machine,
            "date": self.date,
            "quick": self.quick,
            "suites": suites,
            "seconds": self.seconds,
        }


def check(names: Sequence[str]) -> list[str]:
    """Return the suites to run, each once, all of them for none named.

    Raises ConfigError that lists every unknown name.
    """
    unknown = [name for name in dict.fromkeys(names) if name not in SUITES]
    if unknown:
        known = f"known: {', '.join(SUITES)}"
        raise ConfigError(
            [
                Problem("SUITE", f"unknown suite {name!r}", nearest(name, SUITES) or known)
                for name in unknown
            ]
        )
    return list(dict.fromkeys(names)) or list(SUITES)


def run(
    names: Sequence[str] = (),
    *,
    quick: bool = False,
    progress: Callable[[str, str], None] | None = None,
) -> Results:
    """Run suites, all of them by default; `progress` receives suite and case before each case.

    `quick` takes tiny shapes, seconds in all, and leaves the targets out: they are not for such.
    Raises ConfigError for an unknown suite.
    """
    chosen = check(names)
    from nacre.bench.measure import FULL, QUICK

    suites: dict[str, list[Row]] = {}
    seconds: dict[str, float] = {}
    for name in chosen:

        def say(case: str, name: str = name) -> None:
            if progress:
                progress(name, case)

        effort = dataclasses.replace(QUICK if quick else FULL, say=say)
        start = time.perf_counter()
        rows = list(importlib.import_module(SUITES[name][0]).suite(effort))
        suites[name] = [dataclasses.replace(row, target=None) for row in rows] if quick else rows
        seconds[name] = round(time.perf_counter() - start, 3)
    return Results(
        machine(), datetime.now(UTC).isoformat(timespec="seconds"), quick, suites, seconds
    )


def machine() -> dict[str, Any]:
    """Return what the numbers depend on: processor, accelerator, system, and installed versions.

    Works where nacre is not installed.
    """
    import psutil
    import torch

    from nacre.bench.measure import default_device
    from nacre.train.device import bf16_is_fast, cpu_features

    device = torch.device(default_device())
    versions: dict[str, str] = {"nacre": nacre.__version__}
    for name in ("torch", "transformers", "accelerate", "tokenizers", "liger-kernel"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cpu_features": cpu_features(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "device": device.type,
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "bf16": bf16_is_fast(device),
        "system": platform.platform(),
        "python": platform.python_version(),
        "versions": versions,
    }
