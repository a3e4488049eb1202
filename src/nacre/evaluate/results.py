"""Results on disk: JSON lines that say what was scored, on what, by which version.

A record is a score with the checkpoint's path and fingerprint, the task's version and settings, the
version and commit of nacre and the date. Fingerprint, task, version and settings identify an
evaluation: what agrees in them need not run again.
"""

from __future__ import annotations

import hashlib
import json
import reprlib
import subprocess
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from filelock import FileLock

from nacre.atomic import write_text
from nacre.errors import CheckpointError
from nacre.evaluate.scores import Score
from nacre.folders import COMPOSITION
from nacre.train import files
from nacre.untrusted import HEADER_BYTES, parse_json, read_bytes
from nacre.version import VERSION

FILE = "evaluations.jsonl"
IDENTITY = ("fingerprint", "task", "version", "settings")
KEYS = (
    "checkpoint", *IDENTITY, "metric", "subset", "value", "n", "interval", "chance", "corrected",
    "nacre", "commit", "date",
)  # fmt: skip
PIECES, PIECE_BYTES = 64, 4096  # of a foreign folder's weights


def home(folder: Path) -> Path:
    """Return the file that a checkpoint's results are kept in: the run's, where it is a stage."""
    run = folder.resolve().parent.parent
    is_stage = folder.resolve().parent.name == "stages" and (run / "plan.yaml").is_file()
    return (run if is_stage else folder) / FILE


def fingerprint(folder: Path) -> str:
    """Return what identifies a checkpoint's outputs, as SHA-256 (hex); no weights are loaded.

    Of a stage a hash over the fingerprint in its `stage.json` and its `config.json`. Of a
    composition one over its experts, each taken as a folder of its own, its rule and what was
    trained; the experts must be where it says and be the recorded ones. Of any other folder one
    over the names, sizes and contents of its .json, .txt and .model files; of .safetensors files
    the header and 64 pieces of 4 KiB, evenly spaced, stand for the contents. Raises CheckpointError
    and FingerprintError for a folder that is damaged or whose parts are missing.
    """
    if (folder / COMPOSITION).is_file():
        return _composition(folder)
    if (folder / files.RECORD).is_file():
        tensors = files.read_record(folder)["fingerprint"]
        config = hashlib.sha256(_content(folder / "config.json")).hexdigest()
        return hashlib.sha256(f"{tensors} {config}".encode()).hexdigest()
    total = hashlib.sha256()
    for path in sorted(folder.iterdir()):
        if path.suffix in (".json", ".txt", ".model", ".safetensors") and path.is_file():
            content = _sample(path) if path.suffix == ".safetensors" else _content(path)
            total.update(f"{path.name} {path.stat().st_size} ".encode())
            total.update(hashlib.sha256(content).digest())
    return total.hexdigest()


def _content(path: Path) -> bytes:
    try:
        return read_bytes(path)
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None


def _composition(folder: Path) -> str:
    from nacre import composition  # imports torch

    record = composition.verify(folder)
    parts = {
        "experts": [fingerprint(folder / expert["path"]) for expert in record["experts"]],
        "mix": record["mix"],
        "trained": record["trained"]["sha256"] if record.get("trained") else None,
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _sample(path: Path) -> bytes:
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        pieces = [file.read(min(length, size, HEADER_BYTES))]
        for place in range(PIECES):
            file.seek(size * place // PIECES)
            pieces.append(file.read(PIECE_BYTES))
    return b"".join(pieces)


def records(
    scores: Sequence[Score], folder: Path, identity: Mapping[str, Any]
) -> list[dict[str, Any]]:
    """Return scores of one task as records; `identity` has the keys `IDENTITY`."""
    about = {
        "checkpoint": str(folder),
        **identity,
        "nacre": VERSION,
        "commit": commit(),
        "date": datetime.now(UTC).isoformat(timespec="seconds"),
    }
    return [{**score.record(), **about} for score in scores]


def commit(source: Path = Path(__file__)) -> str | None:
    """Return the git commit of nacre's source, with "-dirty" where a tracked file was changed.

    None where `source`, a file of it, is not tracked by the git checkout it lies in.
    """
    git = ("git", "-C", str(source.parent))
    tracked = ("ls-files", "--error-unmatch", source.name)
    describe = ("describe", "--always", "--abbrev=40", "--dirty", "--exclude=*")
    try:
        subprocess.run([*git, *tracked], capture_output=True, check=True)
        said = subprocess.run([*git, *describe], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return said.stdout.strip()


def read(path: Path) -> list[dict[str, Any]]:
    """Return the records of a file, oldest first; raise CheckpointError for a damaged line."""
    if not path.exists():
        return []
    found: list[dict[str, Any]] = []
    for number, line in enumerate(_content(path).splitlines(), 1):
        try:
            record = {"commit": None} | parse_json(line)  # records were once without
            wrong = [f"lacks {key}" for key in KEYS if key not in record] or _wrong(record)
        except (ValueError, TypeError):
            wrong = ["lacks a record"]
        if wrong:
            fix = "remove the line; what it said can be evaluated again"
            raise CheckpointError(f"{path}, line {number}: damaged: {wrong[0]}; {fix}")
        found.append(record)
    return found


def _wrong(record: Mapping[str, Any]) -> list[str]:
    """Return which values of a record are not of their kind."""
    kinds = (
        dict.fromkeys(("fingerprint", "task", "subset", "metric", "version", "date"), (str,))
        | {"settings": (dict,), "interval": (list, type(None)), "n": (int,), "value": (int, float)}
        | dict.fromkeys(("chance", "corrected"), (int, float, type(None)))
    )
    wrong = [
        f"{key} is {reprlib.repr(record[key])}"
        for key, kind in kinds.items()
        if type(record[key]) not in kind
    ]
    ends = record["interval"]
    if (
        not wrong
        and ends is not None
        and not (len(ends) == 2 and all(type(end) in (int, float) for end in ends))
    ):
        wrong.append(f"interval is {reprlib.repr(ends)}")
    return wrong


def append(path: Path, new: Sequence[Mapping[str, Any]]) -> None:
    """Add records to a file; who reads it meanwhile sees all of them or none."""
    lines = "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in new)
    with FileLock(path.with_name(f".{path.name}.lock")):
        before = path.read_text(encoding="utf-8") if path.exists() else ""
        if before and not before.endswith("\n"):
            before += "\n"
        write_text(path, before + lines)


def done(known: Sequence[Mapping[str, Any]], identity: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the newest records of an evaluation, none if it was not done."""
    newest: dict[tuple[str, str], dict[str, Any]] = {}
    for record in known:
        if all(record[key] == identity[key] for key in IDENTITY):
            newest[record["subset"], record["metric"]] = dict(record)
    return list(newest.values())
