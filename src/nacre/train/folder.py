"""A run's folder: what may be written where, and whether a run may be continued."""

from __future__ import annotations

import os
import platform
import re
import shutil
import stat
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from transformers import PreTrainedConfig

from nacre import config, processes
from nacre.errors import ConfigError, FingerprintError, Problem
from nacre.folders import LOCK, PLAN, RUN
from nacre.growth import budget
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.train import checkpoint, files, state
from nacre.train.engine import CACHE
from nacre.version import VERSION


def claim(out: Path, plan: Plan | None, *, resume: bool, overwrite: bool) -> Plan:
    """Check that `out` may be written to, and return the plan to run.

    Nothing is changed yet. A new run needs a folder that is empty or absent, or that holds a run
    which `overwrite` gives up. To resume, the plan must agree with the run's on every stage that
    has begun; without one, the run's own plan continues. Where there is no run yet, it begins.
    """
    mine = (out / PLAN).exists()
    if resume:
        if mine:
            return _continued(out, plan)
        if plan is None:
            fix = "name the plan to begin it with, or another --out"
            raise ConfigError(Problem("--resume", f"{out} holds no run", fix))
    assert plan is not None
    if out.exists() and not out.is_dir():
        raise ConfigError(Problem("--out", f"{out} is a file", "name a folder"))
    if mine and not overwrite:
        fix = "add --resume to continue it, --overwrite to replace it, or name another folder"
        raise ConfigError(Problem("--out", f"{out} already holds a run", fix))
    left = {out / LOCK, *out.glob(f".{PLAN}.*partial")}  # by a process that died before its plan
    if not mine and out.exists() and set(out.iterdir()) - left:
        message = f"{out} holds files that are not a run's"
        raise ConfigError(Problem("--out", message, "name a new or empty folder"))
    if mine:
        _keep_inputs(out, plan)
    return plan


def _keep_inputs(out: Path, plan: Plan) -> None:
    """Refuse to overwrite a run that the plan itself reads from."""
    read = [plan.start_from, plan.tokenizer.path, plan.substrate.path, plan.substrate.font]
    read += [s for sources in (plan.data, *plan.stages) for s in sources.sources or ()]
    for path in filter(None, read):
        if Path(re.sub("^(hf:|file://)", "", str(path))).resolve().is_relative_to(out.resolve()):
            message = f"--overwrite would delete {path}, which this plan reads"
            raise ConfigError(Problem("--out", message, "name another folder"))


@contextmanager
def held(out: Path) -> Iterator[None]:
    """Make the run's folder if need be, and keep other processes from writing to it.

    The system gives the lock back when its owner dies. Raises `ConfigError` if another has it. Of
    several processes of one run the first holds it for all.
    """
    if not processes.is_main():
        yield
        return
    out.mkdir(parents=True, exist_ok=True)
    lock = FileLock(out / LOCK)
    try:
        lock.acquire(timeout=0.2)  # who only asks, as `nacre ls` does, holds it for an instant
    except Timeout:
        message = f"another process is writing to {out}"
        raise ConfigError(Problem("--out", message, "wait until it ends, or stop it")) from None
    try:
        yield
    finally:
        lock.release()


def make(out: Path, plan: Plan, *, overwrite: bool) -> None:
    """Write the plan into the run's folder; with `overwrite`, what was there goes first."""
    if overwrite:
        _empty(out, keep=LOCK)
    config.write_yaml(plan, out / PLAN)


def remove(out: Path) -> None:
    """Remove a run's folder; of one that has to stay (a link, a mount point, `.`) what is in it."""
    with suppress(OSError):
        _empty(out)
        out.rmdir()


def _empty(out: Path, keep: str | None = None) -> None:
    for path in out.iterdir():
        if path.name == keep:
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def _continued(out: Path, plan: Plan | None) -> Plan:
    old = plans.parse(config.read_yaml(out / PLAN), where=str(out / PLAN))
    if plan is None:
        return old
    saved = state.load(out / "state")
    begun = max(len(files.stages(out)), saved.progress["stage"] if saved else 0)
    if plan.fingerprint(begun) != old.fingerprint(begun):
        where = _first_difference(old.identity(begun), plan.identity(begun))
        fix = "resume without a plan to use the run's own, or start a new run in another --out"
        raise FingerprintError(
            f"the plan of {out}", old.fingerprint(begun)[:12], plan.fingerprint(begun)[:12],
            f"first difference: {where}; {fix}",
        )  # fmt: skip
    return plan


def _first_difference(old: Any, new: Any, path: str = "") -> str:
    if isinstance(old, dict) and isinstance(new, dict):
        for key in old:
            if old[key] != new.get(key):
                return _first_difference(old[key], new.get(key), f"{path}.{key}" if path else key)
    if isinstance(old, list) and isinstance(new, list):
        for index, (a, b) in enumerate(zip(old, new, strict=False)):
            if a != b:
                return _first_difference(a, b, f"{path}[{index}]")
        return f"{path} has {len(old)} entries, now {len(new)}"
    return f"{path} was {old!r}, now {new!r}"


def base_of(plan: Plan, out: Path) -> str | Path | None:
    """Return the checkpoint that a run grows, None if it starts anew.

    That is what the plan's `from` meant when the run began, if it is still there: a run grown from
    may have gained stages since.
    """
    if plan.start_from is None:
        return None
    begun = _base_record(files.read_run(out) if (out / RUN).exists() else {}, plan.start_from)
    if begun and (Path(begun["path"]) / files.RECORD).exists():
        return Path(begun["path"])
    return checkpoint.newest(plan.start_from)


def _base_record(run: Mapping[str, Any], named: str | None) -> dict[str, str] | None:
    """Return what `run.json` says of the checkpoint that a plan's `from` names."""
    base = run.get("fingerprints", {}).get("base")
    return base if base and base["named"] == named else None


def check_parts(out: Path, fingerprints: Mapping[str, Any]) -> None:
    """Refuse to resume on a tokenizer, substrate or corpus that is not the one the run began with.

    So too a checkpoint grown from, before the first stage is finished: from then on it is not read.
    Raises `FingerprintError`. Corpora that only later stages read may be new.
    """
    if not (out / RUN).exists():
        return
    before = files.read_run(out).get("fingerprints", {})
    fix = "restore it, or start a new run in another --out"
    for name in ("tokenizer", "substrate"):
        old, new = before.get(name), fingerprints.get(name)
        if old is not None and old != new:
            raise FingerprintError(f"the {name} of {out}", old[:12], str(new)[:12], fix)
    base = fingerprints.get("base")
    begun = _base_record({"fingerprints": before}, base["named"]) if base else None
    if base and begun and begun["fingerprint"] != base["fingerprint"] and not files.stages(out):
        what = f"the checkpoint {base['path']}, which {out} grows,"
        raise FingerprintError(what, begun["fingerprint"][:12], base["fingerprint"][:12], fix)
    for sources, old in before.get("corpora", {}).items():
        new = fingerprints["corpora"].get(sources, old)
        if old != new:
            raise FingerprintError(f"the text of {sources}", old[:12], new[:12], fix)


def check_disk(
    out: Path, plan: Plan, base: PreTrainedConfig | None, extra: int, *, overwrite: bool = False
) -> None:
    """Raise `ConfigError` if the run's stages, states and `extra` bytes would not fit the disk.

    What stands in `out` already need not fit again; with `overwrite` it goes, and leaves its place.
    """
    costs = budget.estimate(plan, base=base)
    needed = budget.disk_needed(costs) + extra
    parent = next(path for path in [out, *out.absolute().parents] if path.exists())
    free = shutil.disk_usage(parent).free
    cached = any(cost.cache_bytes for cost in costs)
    here = _bytes_freed(out) if overwrite else _bytes_kept(out, cached=cached)
    if needed > free + here:
        message = (
            f"the run needs about {needed / 1e9:.2f} GB, {parent} has {free / 1e9:.2f} GB free"
        )
        if here:
            share = "are freed by overwriting" if overwrite else "of the run are there already"
            message += f" and {here / 1e9:.2f} GB {share}"
        raise ConfigError(Problem("--out", message, "free some space or name another disk"))


def _bytes_kept(out: Path, *, cached: bool) -> int:
    """Return the bytes in a run's folder that count for the run: of caches those that it demands.

    A file of several names counts once.
    """
    kept = (found for path, found in _files(out) if cached or path.parts[0] != CACHE)
    return sum({found.st_ino: found.st_size for found in kept}.values())


def _bytes_freed(out: Path) -> int:
    """Return the bytes that emptying a folder frees: what has a name elsewhere too stays."""
    found = [found for _, found in _files(out)]
    names = Counter(each.st_ino for each in found)
    gone = (each for each in found if each.st_nlink <= names[each.st_ino])
    return sum({each.st_ino: each.st_size for each in gone}.values())


def _files(out: Path) -> Iterator[tuple[Path, os.stat_result]]:
    for path in out.rglob("*"):
        with suppress(FileNotFoundError):  # a run that is being written replaces its files
            found = path.lstat()
            if stat.S_ISREG(found.st_mode):
                yield path.relative_to(out), found


def versions() -> dict[str, str]:
    """Return the versions of nacre and of the packages that decide what a run computes."""
    names = ["torch", "transformers", "accelerate", "peft", "tokenizers", "safetensors"]
    return {"nacre": VERSION} | {name: metadata.version(name) for name in names}


def start_record(
    plan: Plan, fingerprints: Mapping[str, Any], device: torch.device, before: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the contents of `run.json`: versions, seed, machine and fingerprints.

    `before` is what it held: machines and versions that are not these are kept in `earlier`, and
    the checkpoint that the run began on stays.
    """
    here = {
        "versions": versions() | {"python": platform.python_version()},
        "machine": {
            "system": platform.platform(),
            "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
            "device": str(device),
            "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
            "threads": torch.get_num_threads(),
        },
    }
    known = [{name: before[name] for name in here}] if before.get("machine") else []
    base = _base_record(before, plan.start_from)
    return {
        "name": plan.name,
        "seed": plan.seed,
        "plan": plan.fingerprint(),
        **here,
        "earlier": [each for each in [*before.get("earlier", []), *known] if each != here],
        "fingerprints": dict(fingerprints) | ({"base": base} if base else {}),
    }
