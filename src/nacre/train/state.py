"""The state of a running stage on disk: what it needs to continue exactly, twice.

`RUN/state` is the newest, `RUN/state.previous` the one before it. Each has the hash of all that it
holds: one that is damaged is noticed, and the run goes on from the other. The tensors are
safetensors files of torch.distributed.checkpoint: each process writes what it holds, and another
number of processes reads them.
"""

from __future__ import annotations

import hashlib
import json
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from nacre import processes
from nacre.atomic import sync_folder
from nacre.errors import CheckpointError, one_line
from nacre.growth import ledger
from nacre.train import files, foreign, schema
from nacre.untrusted import is_path

PROGRESS = tuple(name for name in schema.Progress.model_fields if name != "sha256")
RECORD = "progress.json"


@dataclass(frozen=True)
class SavedState:
    """What `save` wrote; `damaged` says why a newer one could not be read, if there was one."""

    folder: Path
    progress: dict[str, Any]
    damaged: str | None = None

    def holds(self, name: str) -> bool:
        """Tell whether a tensor of this name was saved."""
        return any(name in foreign.read_header(path) for path in self.folder.glob("*.safetensors"))

    def read(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Read named tensors, in place; raise `CheckpointError` if one of them is not there."""
        try:
            with _plainly():
                reader = HuggingFaceStorageReader(str(self.folder))
                load_tensors(dict(tensors), storage_reader=reader)
        except OSError:
            raise
        except Exception as error:  # torch raises about anything for what it did not write
            said = one_line(error)
            raise CheckpointError(f"{self.folder}: cannot be read: {said}") from None


def save(folder: Path, tensors: Mapping[str, torch.Tensor], progress: Mapping[str, Any]) -> None:
    """Save what a running stage needs to continue exactly: named tensors, and plain counters.

    Every process calls it and gives what it holds: all of a tensor, or its part (a DTensor).
    `progress` must have the keys `PROGRESS`. What was saved before stays beside it.
    """
    new = folder.with_name(f".{folder.name}.new")
    with files.new_folder(new) if processes.is_main() else nullcontext() as partial:
        there = processes.agree(partial)
        assert there is not None
        with _plainly():
            writer = HuggingFaceStorageWriter(str(there), save_distributed=True)
            save_tensors(dict(tensors), storage_writer=writer)
        mine = f"shard-{processes.rank() + 1:05d}-"
        written = {path.name: ledger.file_hash(path) for path in there.glob(f"{mine}*")}
        everything = processes.gather(written)
        if partial is not None:
            hashes = {name: value for each in everything for name, value in each.items()}
            hashes[RECORD] = progress_hash(progress)
            files.write_json(partial / RECORD, {**progress, "sha256": hashes})
    if processes.is_main():
        _replace(folder, new)


@contextmanager
def _plainly() -> Iterator[None]:
    """Keep torch from warning of a run in one process; raise what a process met as it was."""
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")
            yield
    except CheckpointException as failed:
        raise next(iter(failed.failures.values()))[0] from None


def _replace(folder: Path, new: Path) -> None:
    if (folder / RECORD).exists():
        _remove(_previous(folder))
        folder.rename(_previous(folder))
    else:
        _remove(folder)
    new.rename(folder)
    sync_folder(folder.parent)


def load(folder: Path) -> SavedState | None:
    """Return the newest saved state that is whole, or None if nothing was saved.

    Raises `CheckpointError` if there are some and all are damaged.
    """
    found = [each for each in (folder, _previous(folder)) if (each / RECORD).exists()]
    damage: list[str] = []
    for each in found:
        try:
            progress = check(each)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        return SavedState(each, progress, damaged=damage[0] if damage else None)
    if damage:
        which = " and ".join(map(str, found))
        raise CheckpointError(
            f"{damage[0]} (restore it, or delete {which} to begin the stage anew)"
        )
    return None


def clear(folder: Path) -> None:
    """Remove the saved states of a stage that has finished."""
    _remove(_previous(folder))
    _remove(folder)


def _remove(folder: Path) -> None:
    """Remove a folder at once: one that lost some of its files would pass for a damaged state."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    if folder.exists():
        folder.rename(doomed)
    shutil.rmtree(doomed, ignore_errors=True)


def _previous(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")


def check(folder: Path) -> dict[str, Any]:
    """Return the progress of one state folder.

    Raises `CheckpointError` if it is damaged, or if another version of nacre wrote it.
    """
    progress = files.read_json(folder / RECORD)
    hashes = progress.pop("sha256", None)
    if not isinstance(hashes, dict) or not all(
        is_path(name) and Path(name).name == name for name in hashes
    ):
        raise CheckpointError(f"{folder / RECORD}: damaged: lacks the hashes of its files")
    for name, expected in hashes.items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: damaged: {name} is missing")
        found = progress_hash(progress) if name == RECORD else ledger.file_hash(folder / name)
        if found != expected:
            raise CheckpointError(f"{folder}: damaged: {name} is not what was saved")
    for path in sorted(folder.glob("*.safetensors")):
        if path.name not in hashes:
            raise CheckpointError(f"{folder}: damaged: {path.name} was not saved with the others")
        foreign.read_header(path)
    lacking = [key for key in PROGRESS if key not in progress]
    if RECORD not in hashes or lacking:
        without = lacking[0] if lacking else f"the hash of {RECORD}"
        raise CheckpointError(f"{folder}: another version of nacre wrote it, without {without}")
    schema.check(folder / RECORD, {**progress, "sha256": hashes}, schema.Progress)
    return progress


def progress_hash(progress: Mapping[str, Any]) -> str:
    """Return the hash that a record keeps of itself; `progress` is without `sha256`."""
    return hashlib.sha256(json.dumps(progress, sort_keys=True).encode()).hexdigest()
