"""A run's `metrics.jsonl`: one JSON object a line, every step and every evaluation."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nacre.atomic import write_text
from nacre.errors import CheckpointError
from nacre.folders import METRICS
from nacre.train import schema
from nacre.untrusted import parse_json, read_lines


def append_metrics(out: Path, line: Mapping[str, Any]) -> None:
    """Append one JSON object to `metrics.jsonl`."""
    with (out / METRICS).open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")


def read_metrics(out: Path, kind: type[schema.Step] = schema.Step) -> list[dict[str, Any]]:
    """Return the lines of `metrics.jsonl` up to the first that is damaged (cut off by a crash).

    Damaged is also a line that is not of the `kind` asked for.
    """
    path = out / METRICS
    if not path.exists():
        return []
    lines: list[dict[str, Any]] = []
    try:
        for written in read_lines(path):
            line = parse_json(written)
            if not schema.fits(line, kind):
                break
            lines.append(line)
    except ValueError:
        pass
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read: {error}") from None
    return lines


class NewMetrics:
    """The lines that a running growth writes to `metrics.jsonl`, each given once.

    It reads on from where it stopped, and from the beginning where a resumed run wrote a new file.
    """

    def __init__(self, out: Path) -> None:
        self.path, self._file, self._read = out / METRICS, -1, 0

    def read(self) -> list[dict[str, Any]]:
        """Return the whole lines since the last call."""
        if not self.path.exists():
            return []
        with self.path.open("rb") as file:
            state = os.fstat(file.fileno())
            if state.st_ino != self._file or state.st_size < self._read:
                self._file, self._read = state.st_ino, 0
            file.seek(self._read)
            written = file.read()
        whole = written[: written.rfind(b"\n") + 1]
        self._read += len(whole)
        return [json.loads(line) for line in whole.splitlines()]


def sync_metrics(out: Path) -> None:
    """Make sure that `metrics.jsonl` has reached the disk: what is saved next counts on it."""
    with (out / METRICS).open("rb") as file:
        os.fsync(file.fileno())


def rewind_metrics(out: Path, stage: int, step: int) -> None:
    """Drop the lines that came after a saved state, so that a resumed run writes each once.

    At step 0 nothing of the stage was saved: it begins anew, its first evaluation included.
    """
    kept = [m for m in read_metrics(out) if (m["stage"], m["step"]) <= (stage, step or -1)]
    write_text(out / METRICS, "".join(json.dumps(line) + "\n" for line in kept))
