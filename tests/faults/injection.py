"""Faults for a growth: it runs in a forked process that dies, or whose disk fails, at some point.

A point is a step of training or the n-th operation that changes the file system. The parent has
everything imported, so that a fault costs a second.
"""

from __future__ import annotations

import errno
import itertools
import os
import random
import signal
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nacre.errors import NacreError
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.train import checkpoint
from nacre.train.grow import grow
from nacre.train.observer import Observer

OPERATIONS = ("rename", "replace", "link", "unlink", "mkdir", "rmdir", "fsync")
DONE, MENDABLE, BUG = 0, 2, 70
STEPS = 8  # of each stage

Kind = Literal["kill at an operation", "kill at a step", "ENOSPC", "EIO", "short write", "bit flip"]
KINDS: tuple[Kind, ...] = (
    "kill at an operation", "kill at a step", "ENOSPC", "EIO", "short write", "bit flip",
)  # fmt: skip


def short_plan() -> Plan:
    """Three stages of a few steps, plain, on a cached trunk, with adapters; many saved states."""
    plan = plans.load("tiny", ["training.precision=fp32"]).model_dump(mode="json", by_alias=True)
    plan["training"] |= {"save_every": 2, "evaluate_every": 4, "validation_tokens": 512}
    plan["data"]["order"] = "restart"
    for stage, own in zip(plan["stages"], ({}, {"trunk": "cache"}, {}), strict=True):
        stage |= {"tokens": 256 * STEPS, **own}
    return plans.parse(plan)


@dataclass(frozen=True)
class Fault:
    """What happens to a growth, and at which of its operations or steps, from 1."""

    kind: Kind
    at: int


class Dies(Observer):
    """Kills its process when a step of training is done."""

    def __init__(self, at: int) -> None:
        self.left = at

    def trained(self, step: dict[str, Any]) -> None:
        self.left -= 1
        if not self.left:
            os.kill(os.getpid(), signal.SIGKILL)


def attempt(plan: Plan, out: Path, fault: Fault | None) -> int:
    """Grow in a forked process until it ends or the fault ends it; return how it ended.

    `DONE`, `MENDABLE` for an error with a message of its own, `BUG` for any other, or the signal.
    """
    child = os.fork()
    if not child:
        code = BUG
        try:
            if fault is not None and fault.kind != "kill at a step":
                _break_operations(fault)
            dies = fault is not None and fault.kind == "kill at a step"
            observer = Dies(fault.at) if dies and fault is not None else Observer()
            resume = (out / "plan.yaml").exists()
            grow(None if resume else plan, out, resume=resume, observer=observer)
            code = DONE
        except (NacreError, OSError):
            code = MENDABLE
        finally:
            os._exit(code)
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status)


def _break_operations(fault: Fault) -> None:
    """Make the n-th operation on the file system in this process fail, or kill it there."""
    counter = itertools.count(1)

    def broken(original: Callable[..., Any]) -> Callable[..., Any]:
        def operation(*arguments: Any, **named: Any) -> Any:
            if next(counter) != fault.at:
                return original(*arguments, **named)
            if fault.kind in ("ENOSPC", "EIO"):
                code = getattr(errno, fault.kind)
                raise OSError(code, os.strerror(code))
            if fault.kind == "short write":
                _cut(arguments[0])
            os.kill(os.getpid(), signal.SIGKILL)

        return operation

    for name in OPERATIONS:
        setattr(os, name, broken(getattr(os, name)))


def _cut(written: object) -> None:
    """Cut what is being written in half: a file about to be renamed, or an open one."""
    if isinstance(written, int):
        size = os.fstat(written).st_size
        path: str | Path = f"/proc/self/fd/{written}"
    else:
        path = Path(str(written))
        size = path.stat().st_size if path.is_file() else 0
    if size and Path(path).is_file():
        os.truncate(path, size // 2)


def draw_fault(draw: random.Random, kind: Kind) -> Fault:
    """Return a fault of a kind at a point within the growth of `short_plan`, most of the time."""
    if kind in ("kill at a step", "bit flip"):  # a state in which a bit flips belongs to a kill
        return Fault("kill at a step", draw.randrange(1, STEPS + 1))
    return Fault(kind, draw.randrange(1, 60))


def flip(out: Path, draw: random.Random) -> Path | None:
    """Flip one bit in a file of the newest saved state; return the file, None without a state."""
    files = [path for path in sorted((out / "state").glob("*")) if path.stat().st_size]
    if not files or not (out / "state.previous").exists():
        return None
    path = draw.choice(files)
    data = bytearray(path.read_bytes())
    data[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(data)
    return path


def hashes(out: Path) -> list[dict[str, str]]:
    """Return the hashes of every tensor of every stage."""
    records = [checkpoint.read_record(stage) for stage in checkpoint.stages(out)]
    return [record["frozen"] | record["weights"] for record in records]
