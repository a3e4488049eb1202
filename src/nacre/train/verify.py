"""Check a run on disk: tensors against the ledger, lineage, tokens, metrics, states, caches."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from nacre import config
from nacre import tokenizer as tokenizers
from nacre.data.shards import TokenStore
from nacre.errors import CheckpointError, NacreError, one_line
from nacre.folders import METRICS, PLAN, RUN
from nacre.growth import ledger
from nacre.growth import plan as plans
from nacre.growth.cache import faults
from nacre.substrate import Substrate
from nacre.train import files, foreign, state
from nacre.train.engine import CACHE
from nacre.train.observer import Observer
from nacre.untrusted import parse_json, read_lines


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what it is, and what is wrong with it, if anything."""

    what: str
    wrong: str | None = None


def verify(run: str | Path, observer: Observer | None = None) -> list[Finding]:
    """Read everything that a run holds and return what was checked, in order; change nothing.

    Raises `CheckpointError` for a folder that is no run.
    """
    run, observer = Path(run), observer or Observer()
    if not (run / PLAN).is_file():
        raise CheckpointError(f"{run}: holds no run ({PLAN} is missing)")
    checks = list(_checks(run))
    observer.phase(f"Verify {run}", len(checks))
    found: list[Finding] = []
    for what, check in checks:
        try:
            check()
            found.append(Finding(what))
        except (NacreError, OSError) as error:
            found.append(Finding(what, str(error)))
        observer.advance(1)
    return found


def _checks(run: Path) -> Iterator[tuple[str, Callable[[], object]]]:
    plan = run / PLAN
    yield "plan", lambda: plans.parse(config.read_yaml(plan), where=str(plan))
    if (run / RUN).exists():
        yield "run record", lambda: files.read_run(run)
    if (run / "tokenizer").exists():
        yield "tokenizer", lambda: _tokenizer(run)
    if (run / "substrate").exists():
        yield "substrate", lambda: _substrate(run)
    for store in sorted((run / "data").glob("*")) if (run / "data").is_dir() else []:
        if not store.name.startswith("."):
            yield f"tokens {store.name}", lambda store=store: TokenStore.open(store).verify()
    try:
        stages = files.stages(run)
    except CheckpointError as error:
        message = str(error)
        yield "stages", lambda: _raise(message)
        stages = []
    for below, stage in zip([None, *stages], stages, strict=False):
        yield f"stage {stage.name}", lambda s=stage: _tensors(s)
        yield f"lineage of {stage.name}", lambda s=stage, b=below: _lineage(s, b)
    if (run / METRICS).exists():
        yield "metrics", lambda: check_metrics(run)
    for cache in sorted((run / CACHE).glob("*/*")):
        if cache.is_dir():
            yield f"cache {cache.relative_to(run / CACHE)}", lambda cache=cache: _cache(cache)
    for name in ("state", "state.previous"):
        if (run / name).exists():
            yield name, lambda name=name: state.check(run / name)


def _raise(message: str) -> None:
    raise CheckpointError(message)


def _recorded(run: Path, part: str) -> str | None:
    record = files.read_run(run) if (run / RUN).exists() else {}
    return record.get("fingerprints", {}).get(part)


def _tokenizer(run: Path) -> None:
    found = tokenizers.fingerprint(tokenizers.load(run / "tokenizer"))
    _same(run / "tokenizer", _recorded(run, "tokenizer"), found)


def _substrate(run: Path) -> None:
    found = Substrate.load(run / "substrate").fingerprint
    _same(run / "substrate", _recorded(run, "substrate"), found)


def _same(where: Path, recorded: str | None, found: str) -> None:
    if recorded is not None and recorded != found:
        raise CheckpointError(f"{where}: is {found[:12]}, the run began with {recorded[:12]}")


def _tensors(stage: Path) -> None:
    """Hash every tensor of a stage, one at a time, and compare it with the ledger."""
    record = files.read_record(stage)
    expected: dict[str, str] = record["frozen"] | record["weights"]
    owners = foreign.weight_map(stage)
    if owners is None:
        raise CheckpointError(f"{stage / foreign.INDEX}: no such file")
    if set(owners) != set(expected):
        odd = sorted(set(owners) ^ set(expected))
        raise CheckpointError(f"{stage}: index and ledger differ in {len(odd)} tensors: {odd[0]}")
    for shard in sorted(set(owners.values())):
        try:
            with safe_open(stage / shard, "pt") as file:
                for name in (name for name, owner in owners.items() if owner == shard):
                    if ledger.tensor_hash(file.get_tensor(name)) != expected[name]:
                        message = f"{name} is not what the ledger recorded"
                        raise CheckpointError(f"{stage / shard}: damaged: {message}")
        except (SafetensorError, OSError, ValueError) as error:
            raise CheckpointError(f"{stage / shard}: damaged: {one_line(error)}") from None
    if ledger.fingerprint(expected) != record["fingerprint"]:
        raise CheckpointError(f"{stage / files.RECORD}: its fingerprint is not of its hashes")


def _lineage(stage: Path, below: Path | None) -> None:
    """Check that a stage stands on the one below, and that what it says is frozen was there."""
    record = files.read_record(stage)
    if below is None:
        return
    under = files.read_record(below)
    if record["parent"] != under["fingerprint"]:
        raise CheckpointError(f"{stage}: does not stand on {below}: another parent is recorded")
    known = under["frozen"] | under["weights"]
    moved = [name for name, value in record["frozen"].items() if known.get(name) != value]
    if moved:
        raise CheckpointError(f"{stage}: {len(moved)} frozen tensors differ from those of {below}")


def _cache(folder: Path) -> None:
    """Check the segments that a trunk cache says it has; an unfinished one is not damaged."""
    if wrong := faults(folder):
        fix = "resume the run, which makes it again"
        raise CheckpointError(f"{'; '.join(wrong)} ({fix})")


def check_metrics(run: Path) -> None:
    """Check that every step of every stage stands there once, without a gap."""
    last: dict[int, int] = {}
    for number, written in enumerate(read_lines(run / METRICS), 1):
        try:
            line: dict[str, Any] = parse_json(written)
            stage, step = int(line["stage"]), int(line["step"])
        except (ValueError, KeyError, TypeError, OverflowError):
            raise CheckpointError(f"{run / METRICS}, line {number}: damaged") from None
        if "lr" in line and step != last.get(stage, 0) + 1:
            after = last.get(stage, 0)
            message = f"step {step} of stage {stage} follows step {after}"
            raise CheckpointError(f"{run / METRICS}, line {number}: {message}")
        if "lr" in line:
            last[stage] = step
