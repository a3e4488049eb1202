"""Evaluation of checkpoints of every kind: what was done is read, the rest is run and kept."""

from __future__ import annotations

import gc
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nacre import composition, hub
from nacre import tokenizer as tokenizers
from nacre.errors import ConfigError, Problem
from nacre.evaluate import results
from nacre.evaluate.tasks import Options, Subject, Task, prepare
from nacre.folders import PLAN
from nacre.train import checkpoint
from nacre.train.files import stages
from nacre.train.interruption import memory_advice
from nacre.train.observer import Observer


@dataclass(frozen=True)
class Target:
    """A checkpoint to evaluate, and for every task what identifies its evaluation."""

    folder: Path
    tokenizer: PreTrainedTokenizerBase
    file: Path
    identities: tuple[dict[str, Any], ...]


def evaluate(
    checkpoints: Sequence[str | Path],
    tasks: Sequence[str] = (),
    *,
    data: str | Path | None = None,
    data_dir: str | Path | None = None,
    limit: int | None = None,
    context: int | None = None,
    stride: int | None = None,
    protocol: str | None = None,
    runs: int | None = None,
    out: str | Path | None = None,
    again: bool = False,
    observer: Observer | None = None,
) -> list[dict[str, Any]]:
    """Score stages, compositions and Hugging Face folders; a run means each of its stages.

    "hf:NAME" is what lies on the hub by that name; it is fetched, and its folder in the client's
    cache keeps its results unless `out` is given.

    `tasks` are names of tasks and families (`tasks.FAMILIES`), or of lm-eval's tasks; default: `lm`
    on the texts in the folder `data`, and the benchmarks and parallel texts whose files are in
    `data_dir`; without both `probes`. `protocol` "paper" scores what the model writes in `runs`
    drawn answers to each question instead. `limit` is the most examples of a task, documents of a
    domain, or questions of a subject. Returns one record a score, in the order of the checkpoints;
    they are also kept in `out`, or beside the checkpoint. An evaluation found there is not run
    again unless `again` asks for it. Everything is checked before any weights are loaded. Raises
    ConfigError, DataError, CheckpointError, FingerprintError and HubError; CheckpointError also for
    a model without finite scores.
    """
    watch = observer or Observer()
    prepared = prepare(tasks, Options(data, data_dir, limit, context, stride, protocol, runs))
    targets = [
        _target(folder, prepared, None if out is None else Path(out))
        for folder in _folders(checkpoints)
    ]
    files = dict.fromkeys(target.file for target in targets)
    for file in files:
        _check_writable(file)
    known = {file: results.read(file) for file in files}
    return [
        record
        for target in targets
        for record in _results(target, prepared, known[target.file], again, watch)
    ]


def known_results(folder: Path, tasks: Sequence[Task]) -> list[dict[str, Any]]:
    """Return what was kept of scoring a checkpoint on these tasks; it loads and runs nothing.

    Raises as `evaluate`.
    """
    target = _target(folder, tasks, None)
    known = results.read(target.file)
    return [r for identity in target.identities for r in results.done(known, identity)]


def _folders(checkpoints: Sequence[str | Path]) -> list[Path]:
    """Return the folders of what is named, stages for runs, each once; "hf:NAME" is fetched."""
    if not checkpoints:
        fix = "name stages, runs, compositions or Hugging Face folders"
        raise ConfigError(Problem("checkpoints", "there are none", fix))
    found: dict[Path, Path] = {}
    for named in checkpoints:
        newest = checkpoint.newest_folder(named)  # raises for a run without a stage
        place = Path(str(named).removeprefix(hub.PREFIX))
        for folder in stages(place) if (place / PLAN).exists() else [newest]:
            found.setdefault(folder.resolve(), folder)
    return list(found.values())


def _target(folder: Path, tasks: Sequence[Task], out: Path | None) -> Target:
    """Read what is known of a checkpoint without its weights, and check every task with it."""
    config = checkpoint.load_config(folder)
    if not composition.is_composition(folder):
        checkpoint.check_has_weights(folder)
    tokenizer = tokenizers.load(folder)
    checkpoint.check_tokenizer(folder, tokenizers.fingerprint(tokenizer))
    fingerprint = results.fingerprint(folder)
    problems: list[Problem] = []
    identities: list[dict[str, Any]] = []
    for task in tasks:
        try:
            settings = task.settings(config, tokenizer)
        except ConfigError as error:
            problems += error.problems
            continue
        values = (fingerprint, task.name, task.version, settings)
        identities.append(dict(zip(results.IDENTITY, values, strict=True)))
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)), str(folder))
    return Target(folder, tokenizer, out or results.home(folder), tuple(identities))


def _check_writable(file: Path) -> None:
    problem = (
        f"{file} is a folder" if file.is_dir()
        else f"there is no folder {file.parent}" if not file.parent.is_dir()
        else f"{file.parent} cannot be written to" if not os.access(file.parent, os.W_OK)
        else None
    )  # fmt: skip
    if problem:
        raise ConfigError(Problem("--out", problem, "name a file in a folder of your own"))


def _results(
    target: Target,
    tasks: Sequence[Task],
    known: Sequence[dict[str, Any]],
    again: bool,
    watch: Observer,
) -> list[dict[str, Any]]:
    """Return a checkpoint's records for every task; load it only if one has to be run."""
    where = str(target.folder)
    before = [[] if again else results.done(known, identity) for identity in target.identities]
    names = [task.name for task, records in zip(tasks, before, strict=True) if records]
    if names:
        watch.note(f"{where}: done before, not run again: {', '.join(names)} ({target.file})")
    found: list[dict[str, Any]] = []
    subject: Subject | None = None
    for task, identity, records in zip(tasks, target.identities, before, strict=True):
        if not records:
            with memory_advice(where):
                if subject is None:
                    gc.collect()  # models refer to themselves: the one before would stay
                    model = composition.load_on_device(target.folder)
                    subject = Subject(model, target.tokenizer, where, watch)
                scores = task.run(subject, identity["settings"])
            records = results.records(scores, target.folder, identity)
            results.append(target.file, records)
        found += [record | {"checkpoint": where} for record in records]
    return found
