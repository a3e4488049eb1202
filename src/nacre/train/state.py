"""The state of a running stage on disk: what it needs to continue exactly, twice.

`RUN/state` is the newest, `RUN/state.previous` the one before it. Each has the hash of every file
that it holds: one that is damaged is noticed, and the run goes on from the other.
"""

from __future__ import annotations

import hashlib
import pickle
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nacre.errors import CheckpointError
from nacre.train import checkpoint

PROGRESS = (
    "stage", "step", "tokens", "seconds", "best", "stale", "cursor", "peak_memory_bytes",
    "history", "end", "skipped",
)  # fmt: skip
WEIGHTS, OPTIMIZER, RECORD = "trainable.safetensors", "optimizer.pt", "progress.json"


@dataclass(frozen=True)
class SavedState:
    """What `save` wrote; `damaged` says why a newer one could not be read, if there was one."""

    weights: dict[str, torch.Tensor]
    optimizer: dict[str, Any]
    random_state: torch.Tensor
    progress: dict[str, Any]
    damaged: str | None = None


def save(
    folder: Path,
    weights: Mapping[str, torch.Tensor],
    optimizer: Mapping[str, Any],
    progress: Mapping[str, Any],
) -> None:
    """Save what a running stage needs to continue exactly: trained weights, optimizer, counters.

    `progress` must have the keys `PROGRESS`. What was saved before stays beside it.
    """
    new = folder.with_name(f".{folder.name}.new")
    with checkpoint.new_folder(new) as partial:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
        save_file(tensors, partial / WEIGHTS)
        torch.save({"optimizer": optimizer, "rng": torch.get_rng_state()}, partial / OPTIMIZER)
        hashes = {name: _hash(partial / name) for name in (WEIGHTS, OPTIMIZER)}
        checkpoint.write_json(partial / RECORD, {**progress, "sha256": hashes})
    before = _previous(folder)
    if (folder / RECORD).exists():
        shutil.rmtree(before, ignore_errors=True)
        folder.rename(before)
    else:
        shutil.rmtree(folder, ignore_errors=True)
    new.rename(folder)
    checkpoint.sync_folder(folder.parent)


def load(folder: Path) -> SavedState | None:
    """Return the newest saved state that is whole, or None if nothing was saved.

    Raises `CheckpointError` if there are some and all are damaged.
    """
    found = [each for each in (folder, _previous(folder)) if (each / RECORD).exists()]
    damage: list[str] = []
    for each in found:
        try:
            state = read(each)
        except CheckpointError as error:
            damage.append(str(error))
            continue
        return SavedState(*state, damaged=damage[0] if damage else None)
    if damage:
        raise CheckpointError(damage[0])
    return None


def clear(folder: Path) -> None:
    """Remove the saved states of a stage that has finished."""
    shutil.rmtree(folder, ignore_errors=True)
    shutil.rmtree(_previous(folder), ignore_errors=True)


def _previous(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.previous")


def read(
    folder: Path,
) -> tuple[dict[str, torch.Tensor], dict[str, Any], torch.Tensor, dict[str, Any]]:
    """Return weights, optimizer, random state and progress of one state folder.

    Raises `CheckpointError` if it is damaged.
    """
    progress = checkpoint.require(folder / RECORD, (*PROGRESS, "sha256"))
    for name, expected in progress.pop("sha256").items():
        if not (folder / name).is_file():
            raise CheckpointError(f"{folder}: damaged: {name} is missing")
        if _hash(folder / name) != expected:
            raise CheckpointError(f"{folder}: damaged: {name} is not what was saved")
    try:
        weights = load_file(folder / WEIGHTS)
        saved = torch.load(folder / OPTIMIZER, weights_only=True, map_location="cpu")
        return weights, saved["optimizer"], saved["rng"], progress
    except (
        OSError, SafetensorError, RuntimeError, EOFError, KeyError, pickle.UnpicklingError,
    ) as error:  # fmt: skip
        raise CheckpointError(f"{folder}: damaged: {checkpoint.one_line(error)}") from None


def _hash(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
