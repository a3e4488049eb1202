"""The files of runs and checkpoints: written whole or not at all, read with their shape checked.

Imports no torch: what only reads and writes small files, a report say, starts at once.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from nacre import folders
from nacre.atomic import sync_folder, write_text
from nacre.errors import CheckpointError
from nacre.train import schema
from nacre.untrusted import as_object, parse_json, read_bytes

RECORD = folders.STAGE


@contextmanager
def new_folder(target: Path) -> Iterator[Path]:
    """Give a temporary folder that becomes `target` if the body succeeds, else disappears."""
    partial = target.with_name(f".{target.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    try:
        with writing(target):
            yield partial
        sync(partial)
        old = target.with_name(f".{target.name}.old")
        shutil.rmtree(old, ignore_errors=True)
        if target.exists():
            target.rename(old)
        partial.rename(target)
        sync_folder(target.parent)
        shutil.rmtree(old, ignore_errors=True)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


@contextmanager
def writing(target: Path) -> Iterator[None]:
    """Turn what the libraries raise when a disk is full or fails into the error of the system.

    safetensors, tokenizers and torch report it in words of their own; these hold the system's.
    """
    try:
        yield
    except OSError:
        raise
    except Exception as error:  # of tokenizers: it has none more special
        said = str(error)
        for code in (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EROFS):
            if os.strerror(code) in said or f"os error {code}" in said:
                raise OSError(code, os.strerror(code), str(target)) from None
        if "PytorchStreamWriter" in said or "unexpected pos" in said:
            raise OSError(errno.EIO, os.strerror(errno.EIO), str(target)) from None
        raise


def sync(folder: Path) -> None:
    """Make sure that every file in a folder, at any depth, has reached the disk."""
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            with path.open("rb") as file:
                os.fsync(file.fileno())
        else:
            sync_folder(path)
    sync_folder(folder)


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write JSON under a temporary name and rename it."""
    write_text(path, json.dumps(data, indent=2, ensure_ascii=False) + "\n")


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object that nacre wrote; raise `CheckpointError` if it is missing or damaged."""
    try:
        data = parse_json(read_bytes(path), surrogates=False)
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    try:
        return as_object(data)
    except ValueError as error:
        raise CheckpointError(f"{path}: {error}") from None


def link(source: str | Path, target: str | Path) -> None:
    """Make `target` the same file as `source`; copy where the file system has no hard links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def stages(run: Path) -> list[Path]:
    """Return the finished stages of a run, in order; raise `CheckpointError` if one is missing."""
    try:
        return folders.stages(run)
    except ValueError as error:
        raise CheckpointError(f"{run}: {error}") from None


def read_record(stage: Path) -> dict[str, Any]:
    """Return the record of a stage or of what a run was grown from.

    Raises `CheckpointError` if it is damaged.
    """
    return read_shaped(stage / RECORD, schema.Record)


def read_stage(stage: Path, kind: type[schema.StageRecord] = schema.StageRecord) -> dict[str, Any]:
    """Return the record of a stage that a run trained; raise `CheckpointError` if it is damaged."""
    record = read_shaped(stage / RECORD, kind)
    if f"{record['stage']:02d}" != stage.name:
        raise CheckpointError(f"{stage / RECORD}: damaged: it is of stage {record['stage']}")
    return record


def read_shaped(path: Path, kind: type[schema.Shape]) -> dict[str, Any]:
    """Return a JSON object of a kind; raise `CheckpointError` for a file that holds another."""
    data = read_json(path)
    schema.check(path, data, kind)
    return data


def read_run(run: Path) -> dict[str, Any]:
    """Return `run.json`; raise `CheckpointError` if it is damaged."""
    return read_shaped(run / folders.RUN, schema.Run)
