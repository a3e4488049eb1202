"""What stands below a folder: runs, studies, compositions.

Hundreds of runs are listed in a moment: of each only small files are read, and neither torch nor
transformers is imported. What is damaged is listed with the reason.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from nacre.config import read_yaml
from nacre.errors import ConfigError, Problem
from nacre.folders import COMPOSITION, LOCK, METRICS, PLAN, STAGE, STAGES, STUDY, stages
from nacre.untrusted import parse_json, read_json

State = Literal["running", "interrupted", "finished", "damaged"]
Files = dict[tuple[int, int], int]
"""The bytes that each file takes on disk, by device and inode: a file of many names counts once."""

TAIL_BYTES = 8192  # of metrics.jsonl: enough for its last line
BLOCK_BYTES = 512  # the unit of st_blocks


@dataclass(frozen=True)
class Entry:
    """A folder that nacre wrote: where, how many bytes on disk, when last changed (seconds)."""

    path: Path
    files: Files
    changed: float

    @property
    def bytes(self) -> int:
        """What its files take on disk; hard links count once."""
        return sum(self.files.values())

    def record(self) -> dict[str, Any]:
        """Return the entry as plain data."""
        named = {key: value for key, value in vars(self).items() if key != "files"}
        changed = datetime.fromtimestamp(self.changed, UTC).isoformat(timespec="seconds")
        return named | {"path": str(self.path), "bytes": self.bytes, "changed": changed}


@dataclass(frozen=True)
class Run(Entry):
    """A run: `stages` are finished, of `planned`; the rest is of the newest finished stage.

    `tokens` are of all stages, the one in progress included. `damage` says why the state is
    `damaged`.
    """

    state: State
    stages: int
    planned: int
    depth: int | None
    bits_per_byte: float | None
    tokens: int
    damage: str | None = None


@dataclass(frozen=True)
class Study(Entry):
    """A study: those of its runs that have begun, of `planned`."""

    state: State
    planned: int
    runs: tuple[Run, ...]
    damage: str | None = None

    @property
    def finished(self) -> int:
        """How many of its runs are whole."""
        return sum(run.state == "finished" for run in self.runs)

    def record(self) -> dict[str, Any]:
        """Return the study as plain data, its runs inside."""
        runs = [run.record() for run in self.runs]
        return super().record() | {"runs": runs, "finished": self.finished}


@dataclass(frozen=True)
class Composition(Entry):
    """A composition: its experts by name, and the rule that mixes them."""

    state: State
    experts: tuple[str, ...]
    rule: str | None
    parameters: int | None
    damage: str | None = None


@dataclass(frozen=True)
class Listing:
    """All that stands below `folder`; the runs of a study stand in it."""

    folder: Path
    runs: list[Run] = field(default_factory=list)
    studies: list[Study] = field(default_factory=list)
    compositions: list[Composition] = field(default_factory=list)

    @property
    def bytes(self) -> int:
        """What all of it takes on disk; a file that several share counts once."""
        everything = _together([*self.runs, *self.studies, *self.compositions])
        return sum(everything.values())

    def record(self) -> dict[str, Any]:
        """Return the listing as plain data."""
        kinds = ("runs", "studies", "compositions")
        entries = {kind: [entry.record() for entry in getattr(self, kind)] for kind in kinds}
        return {"folder": str(self.folder), **entries, "bytes": self.bytes}


def read(folder: str | Path) -> Listing:
    """Return what stands in a folder and below it, in the order of the names.

    Of a study that is named itself the runs are listed one by one. Raises `ConfigError` if there is
    no such folder.
    """
    top = Path(folder)
    if not top.is_dir():
        message = f"there is no folder {folder}"
        raise ConfigError(Problem("FOLDER", message, "name the folder that holds your runs"))
    listing = Listing(top)
    for path, kind in _marked(top):
        if kind == PLAN:
            listing.runs.append(_run(path))
        elif kind == COMPOSITION:
            listing.compositions.append(_composition(path))
        else:
            study = _study(path)
            listing.studies.append(study)
            if path == top:
                listing.runs.extend(study.runs)
    return listing


def _marked(top: Path) -> Iterator[tuple[Path, str]]:
    """Yield every folder that nacre wrote with the file by which it is known; not what is in it."""
    for here, folders, names in os.walk(top):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        kind = next((mark for mark in (PLAN, STUDY, COMPOSITION) if mark in names), None)
        if kind is not None:
            folders.clear()
            yield Path(here), kind


def _run(path: Path) -> Run:
    about = {"path": path, "files": _files(path), "changed": _changed(path)}
    done: list[dict[str, Any]] = []
    planned = 0
    try:
        planned = len(_read_yaml(path / PLAN)["stages"])
        done = [_read_json(stage / STAGE) for stage in stages(path)]
        depth = done[-1]["depth"] if done else None
        bits = done[-1]["validation"]["bits_per_byte"] if done else None
        tokens = sum(stage["tokens"] for stage in done) + _tokens_since(path, len(done))
    except (OSError, ValueError, KeyError, TypeError) as error:
        nothing = {"depth": None, "bits_per_byte": None, "tokens": 0}
        return Run(
            **about, state="damaged", stages=len(done), planned=planned, **nothing,
            damage=_reason(error),
        )  # fmt: skip
    state: State = "finished" if len(done) >= planned else "interrupted"
    return Run(
        **about, state="running" if is_held(path) else state, stages=len(done), planned=planned,
        depth=depth, bits_per_byte=bits, tokens=tokens,
    )  # fmt: skip


def _tokens_since(run: Path, finished: int) -> int:
    """Return the tokens of the stage in progress, by the end of the metrics."""
    last = last_metric(run)
    return int(last["tokens"]) if last is not None and last["stage"] > finished else 0


def last_metric(run: Path) -> dict[str, Any] | None:
    """Return the last whole line of a run's metrics, None without one; only their end is read."""
    path = run / METRICS
    if not path.exists():
        return None
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - TAIL_BYTES))
        lines = file.read().splitlines()
    for line in reversed(lines):
        with contextlib.suppress(ValueError):  # cut off: at the end by a crash, or by the tail
            return parse_json(line)
    return None


def is_held(run: Path) -> bool:
    """Tell whether a process writes to a run; its lock is free again when the process dies."""
    if not (run / LOCK).exists():
        return False
    try:
        with FileLock(run / LOCK).acquire(timeout=0):
            return False
    except Timeout:
        return True
    except OSError:  # where one may only read, nothing is known: nobody of this user's writes
        return False


def _study(path: Path) -> Study:
    runs = tuple(_run(run) for run, kind in _runs_below(path) if kind == PLAN)
    files = _together(runs) | _files(path, deep=False)
    changed = max([_changed(path, STUDY), *(run.changed for run in runs)])
    about = {"path": path, "files": files, "changed": changed, "runs": runs}
    try:
        data = _read_yaml(path / STUDY)
        budgets = [arm.get("budgets") or data["budgets"] for arm in data["arms"].values()]
        planned = len(data["seeds"]) * sum(map(len, budgets))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return Study(**about, state="damaged", planned=0, damage=_reason(error))
    states = {run.state for run in runs}
    whole = states == {"finished"} and len(runs) >= planned
    state: State = (
        "running" if "running" in states
        else "damaged" if "damaged" in states
        else "finished" if whole
        else "interrupted"
    )  # fmt: skip
    return Study(**about, state=state, planned=planned)


def _runs_below(study: Path) -> Iterator[tuple[Path, str]]:
    for child in sorted(study.iterdir()):
        if child.is_dir() and not child.name.startswith("."):
            yield from _marked(child)


def _composition(path: Path) -> Composition:
    about = {"path": path, "files": _files(path), "changed": _changed(path, COMPOSITION)}
    try:
        data = _read_json(path / COMPOSITION)
        names = tuple(expert["name"] for expert in data["experts"])
        said = {"rule": data["mix"]["name"], "parameters": data["parameters"]}
    except (OSError, ValueError, KeyError, TypeError) as error:
        said = {"rule": None, "parameters": None, "damage": _reason(error)}
        return Composition(**about, state="damaged", experts=(), **said)
    return Composition(**about, state="finished", experts=names, **said)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_json(path)
    except ValueError as error:
        raise ValueError(f"{path.name} cannot be read: {error}") from None


def _read_yaml(path: Path) -> dict[str, Any]:
    try:
        return read_yaml(path)
    except ConfigError as error:
        said = error.problems[0].message
        raise ValueError(f"{path.name} cannot be read: {said}") from None


def _reason(error: Exception) -> str:
    said = f"lacks {error}" if isinstance(error, KeyError) else str(error)
    return " ".join(said.split())[:200]


def _changed(path: Path, *names: str) -> float:
    """Return when the newest of a run's files, or of these files, was written."""
    candidates = [path / name for name in names or (PLAN, METRICS, "state", STAGES)]
    return max((each.stat().st_mtime for each in candidates if each.exists()), default=0.0)


def _files(path: Path, deep: bool = True) -> Files:
    """Return the files of a folder and, if `deep`, of those in it; what vanishes is left out."""
    found: Files = {}
    for here, folders, names in os.walk(path):
        if not deep:
            folders.clear()
        for name in names:
            try:
                about = os.stat(os.path.join(here, name), follow_symlinks=False)  # noqa: PTH116, PTH118
            except OSError:
                continue
            blocks = getattr(about, "st_blocks", None)
            on_disk = about.st_size if blocks is None else blocks * BLOCK_BYTES
            found[about.st_dev, about.st_ino] = on_disk
    return found


def _together(entries: Iterable[Entry]) -> Files:
    return {inode: size for entry in entries for inode, size in entry.files.items()}
