"""Faults for a growth: it runs in a forked process that dies, or whose disk fails, at some point.

A point is a line of nacre's own code, or an operation that changes the file system, within a named
region of the program: a step, a save, a cache build ... The parent has everything imported, so that
a fault costs about a second. What the child did comes back through a pipe.
"""

from __future__ import annotations

import errno
import gc
import json
import os
import random
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import wraps
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Literal, TypeAlias

import nacre
from nacre.errors import NacreError
from nacre.growth import outputs
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.train import checkpoint, folder, hooks, loop, state
from nacre.train import grow as growing
from nacre.train.files import read_record, stages
from nacre.train.metrics import read_metrics
from nacre.train.observer import Observer

MEASURED = ("tokens_per_second", "peak_memory_bytes")  # of a step: another value every time
SOURCE = str(Path(nacre.__file__).parent)
OPERATIONS = ("open", "write", "rename", "replace", "link", "unlink", "mkdir", "rmdir", "fsync")
DONE, MENDABLE, BUG = 0, 2, 70
STEPS, SAVE_EVERY = 8, 2  # of each stage
SYLLABLES = ["na", "cre", "la", "mi", "so", "ter", "ver", "ba", "dun", "po", "ki", "re"]

Kind: TypeAlias = Literal[
    "kill", "kill at a random time", "ENOSPC", "EIO", "short write", "full disk", "bit flip"
]
KINDS: tuple[Kind, ...] = (
    "kill", "kill at a random time", "ENOSPC", "EIO", "short write", "bit flip"
)  # fmt: skip
"""A full disk needs a small file system of its own: only the benchmark makes one."""
COUNTED = {"kill": "lines", "full disk": "calls"} | dict.fromkeys(
    ("ENOSPC", "EIO", "short write"), "operations"
)
"""What a fault of a kind is placed by, within its region."""

REGIONS: dict[str, tuple[ModuleType, str]] = {
    "the run's folder": (folder, "make"),
    "tokenizer, tokens, substrate": (growing, "make_parts"),
    "a step": (loop, "train_step"),
    "a line of metrics": (hooks, "append_metrics"),
    "a save": (state, "save"),
    "a cache build": (outputs, "build"),
    "a LoRA merge": (growing, "certify_merge"),
    "a stage hand-over": (growing, "save_stage"),
    "a shard link": (checkpoint, "link"),
    "a resume": (growing, "restore"),
}
"""Where faults happen: the function that begins and ends each region."""

FLIPPED = {"a state": "state*/*", "a cache": "cache/*/*/*", "a token shard": "data/*/*"}
"""What a bit may flip in: files of a run."""


def short_plan(place: Path) -> Plan:
    """Five stages of a few steps on a small text that is written into `place`.

    Their trunks: none, cached, run for every batch, changed by adapters, chosen by measuring.
    """
    draw = random.Random(0)
    words = ["".join(draw.choices(SYLLABLES, k=draw.randrange(1, 5))) for _ in range(150)]
    texts = [" ".join(draw.choices(words, k=draw.randrange(30, 90))) for _ in range(18)]
    (place / "text.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in texts))
    plan = plans.load("tiny", ["training.precision=fp32"]).model_dump(mode="json", by_alias=True)
    plan["training"] |= {"save_every": SAVE_EVERY, "evaluate_every": 4, "validation_tokens": 512}
    plan["data"] |= {"order": "restart", "sources": [str(place / "text.jsonl")], "holdout": 0.1}
    block: dict[str, Any] = {"add_blocks": 1, "tokens": 256 * STEPS}
    own: list[dict[str, Any]] = [
        {}, {"trunk": "cache"}, {"trunk": "recompute"}, {"lora": {"rank": 2, "alpha": 4}}, {},
    ]  # fmt: skip
    return plans.parse(plan | {"stages": [block | more for more in own]})


@dataclass(frozen=True)
class Fault:
    """What happens to a growth at the `at`-th line or operation, from 1, within a region.

    A kill at a random time has no region, and `seconds` until it comes.
    """

    kind: Kind
    region: str | None = None
    at: int = 0
    seconds: float = 0.0


@dataclass
class Attempt:
    """How a growth ended: `DONE`, `MENDABLE` for an error with a message of its own, `BUG` for any
    other, or minus the signal; whether the fault came; the steps trained, as (stage, step); and
    how many lines and operations each region had.
    """

    code: int
    came: bool = False
    steps: list[tuple[int, int]] = field(default_factory=list)
    counts: dict[str, dict[str, int]] = field(default_factory=dict)
    said: str = ""


class Child(Observer):
    """The forked process: it counts lines and operations by region, and lets the fault come."""

    def __init__(self, pipe: int, out: Path, fault: Fault | None) -> None:
        self.pipe, self.out, self.fault = pipe, out, fault
        self.counts = {region: {"calls": 0, "lines": 0, "operations": 0} for region in REGIONS}
        self.within: list[str] = []
        self.synced = {path.stat().st_ino: path.stat().st_size for path in _files(out)}
        self.write = os.write

    def say(self, **what: Any) -> None:
        """Tell the parent."""
        self.write(self.pipe, json.dumps(what).encode() + b"\n")

    def trained(self, step: dict[str, Any]) -> None:
        self.say(step=(step["stage"], step["step"]))

    def enter_regions(self) -> None:
        """Put a wrapper around the function of every region, and around every operation."""
        for region, (module, name) in REGIONS.items():
            setattr(module, name, self._region(region, getattr(module, name)))
        for name in OPERATIONS:
            setattr(os, name, self._operation(name, getattr(os, name)))

    def _region(self, region: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def entered(*arguments: Any, **named: Any) -> Any:
            outside = sys.gettrace()
            self.within.append(region)
            if self._counts_lines(region):
                threading.settrace(self._trace)
                sys.settrace(self._trace)
            self._count("calls", [region])
            try:
                return original(*arguments, **named)
            finally:
                sys.settrace(outside)
                if outside is None:
                    threading.settrace(None)  # pyright: ignore[reportArgumentType]
                self.within.remove(region)

        return entered

    def _counts_lines(self, region: str) -> bool:
        return self.fault is None or (self.fault.kind, self.fault.region) == ("kill", region)

    def _trace(self, frame: FrameType, event: str, argument: object) -> Any:
        if not frame.f_code.co_filename.startswith(SOURCE):
            return None
        if event == "line":
            self._count("lines", self.within)
        return self._trace

    def _operation(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(original)
        def operated(*arguments: Any, **named: Any) -> Any:
            self._count("operations", self.within)
            if name in ("unlink", "rename", "replace"):  # what had this name is gone
                gone = arguments[0 if name == "unlink" else 1]
                self.synced.pop(_inode(gone, named.get("dir_fd")), None)
            result = original(*arguments, **named)
            if name == "fsync":
                self.synced[os.fstat(arguments[0]).st_ino] = os.fstat(arguments[0]).st_size
            return result

        return operated

    def _count(self, what: str, regions: list[str]) -> None:
        for region in dict.fromkeys(regions):
            self.counts[region][what] += 1
            fault = self.fault
            if fault is None or region != fault.region or what != COUNTED[fault.kind]:
                continue
            if self.counts[region][what] == fault.at:
                self._fail(fault.kind)

    def _fail(self, kind: Kind) -> None:
        self.say(came=True)
        if kind in ("ENOSPC", "EIO"):
            code = getattr(errno, kind)
            raise OSError(code, os.strerror(code))
        if kind == "full disk":
            fill_disk(self.out.parent)
            return
        if kind == "short write":
            for path in _files(self.out):
                kept = self.synced.get(path.stat().st_ino, 0)
                if path.stat().st_size > kept:
                    os.truncate(path, kept)
        os.kill(os.getpid(), signal.SIGKILL)

    def run(self, plan: Plan) -> int:
        """Grow, or go on with what is there; return how it ended."""
        code = BUG
        try:
            self.enter_regions()
            resume = (self.out / "plan.yaml").exists()
            growing.grow(None if resume else plan, self.out, resume=resume, observer=self)
            code = DONE
        except (NacreError, OSError) as error:
            code = MENDABLE
            self.say(said=str(error)[:1000])
        except BaseException as error:
            self.say(said=f"{type(error).__name__}: {error}"[:1000])
        return code


def attempt(plan: Plan, out: Path, fault: Fault | None) -> Attempt:
    """Grow in a forked process until it ends or the fault ends it."""
    receive, send = os.pipe()
    gc.collect()
    pid = os.fork()
    if not pid:
        gc.freeze()
        child, code = Child(send, out, fault), BUG
        try:
            code = child.run(plan)
            child.say(counts=child.counts)
        finally:
            os._exit(code)
    os.close(send)
    killer = None
    if fault is not None and fault.kind == "kill at a random time":
        killer = threading.Timer(fault.seconds, os.kill, (pid, signal.SIGKILL))
        killer.start()
    lines = list(_lines(receive))
    if killer is not None:
        killer.cancel()
        killer.join()
    _, status = os.waitpid(pid, 0)
    ended = Attempt(os.waitstatus_to_exitcode(status))
    for line in lines:
        ended.came |= line.get("came", False)
        ended.counts |= line.get("counts", {})
        ended.said = line.get("said", ended.said)
        ended.steps += [tuple(line["step"])] if "step" in line else []
    if fault is not None and fault.kind == "kill at a random time":
        ended.came = ended.code == -signal.SIGKILL
    return ended


def _lines(pipe: int) -> Iterator[dict[str, Any]]:
    """Yield what a child says until it ends."""
    with os.fdopen(pipe, "rb") as file:
        for line in file:
            yield json.loads(line)


def _files(out: Path) -> Iterator[Path]:
    return (path for path in sorted(out.rglob("*")) if path.is_file())


def _inode(path: Any, folder: int | None) -> int | None:
    try:
        return os.stat(path, dir_fd=folder, follow_symlinks=False).st_ino
    except OSError:
        return None


def fill_disk(place: Path) -> None:
    """Leave nothing of the file system that `place` is on; `filler` there takes the rest."""
    free = os.statvfs(place)
    left = random.Random(time.time_ns()).randrange(0, 64) * 1024
    with (place / "filler").open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, free.f_bavail * free.f_frsize - left))


def places(kind: Kind, whole: Attempt) -> list[str | None]:
    """Return the regions in which a fault of a kind can come, by a growth that was whole."""
    if kind == "kill at a random time":
        return [None]
    if kind == "bit flip":
        return ["a step"]
    return [region for region in REGIONS if whole.counts[region][COUNTED[kind]]]


def draw_fault(
    draw: random.Random, kind: Kind, region: str | None, whole: Attempt, seconds: float
) -> Fault:
    """Return a fault at a point within a region of a growth that was `whole` and took `seconds`."""
    if region is None:
        return Fault(kind, seconds=draw.uniform(0, seconds))
    what = "kill" if kind == "bit flip" else kind  # bits flip in what a killed run has left
    return Fault(what, region, draw.randint(1, whole.counts[region][COUNTED[what]]))


def flip(out: Path, what: str, draw: random.Random) -> tuple[Path, bytes] | None:
    """Flip one bit in a file; return the file and what it held, None where there is none."""
    files = [path for path in sorted(out.glob(FLIPPED[what])) if path.stat().st_size]
    if not files:
        return None
    path = draw.choice(files)
    data = path.read_bytes()
    damaged = bytearray(data)
    damaged[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    path.write_bytes(damaged)
    return path, data


def redone(reached: tuple[int, int], again: tuple[int, int]) -> int:
    """Return how many steps up to `reached` a run trains again that goes on with step `again`."""
    (stage, step), (stage_again, step_again) = reached, again
    return max(0, (stage - stage_again) * STEPS + step - step_again + 1)


def result(out: Path) -> dict[str, Any]:
    """Return what a growth must end in, whatever happened: tensors, scores, metrics."""
    records = [read_record(stage) for stage in stages(out)]
    kept = ("stage", "tokens", "validation", "history", "cursor", "parent", "fingerprint")
    return {
        "tensors": [record["frozen"] | record["weights"] for record in records],
        "records": [{key: record[key] for key in kept} for record in records],
        "metrics": [
            {key: value for key, value in line.items() if key not in MEASURED}
            for line in read_metrics(out)
        ],
    }
