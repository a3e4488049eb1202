"""What stands in a job's folder: the job, its log, the attempts at it, and that it is done."""

from __future__ import annotations

import json
import socket
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

JOB, DONE, LOG, ATTEMPTS, LOCK = "job.json", "done.json", "log.txt", "attempts.jsonl", "lock"


def add_attempt(place: Path) -> None:
    """Note that an attempt at a job begins, on this machine and now."""
    started = datetime.now(UTC).isoformat(timespec="seconds")
    with (place / ATTEMPTS).open("a", encoding="utf-8") as file:
        file.write(json.dumps({"machine": socket.gethostname(), "started": started}) + "\n")


def attempts(place: Path) -> list[dict[str, Any]]:
    """Return the attempts at a job that have begun, on whatever machine, in order."""
    file = place / ATTEMPTS
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def last_line(place: Path) -> str:
    """Return the last line of a job's log that says something."""
    file = place / LOG
    text = file.read_text(encoding="utf-8", errors="replace") if file.exists() else ""
    said = [line.strip() for line in text.splitlines() if line.strip()]
    return said[-1] if said else "it said nothing"


def is_done(place: Path, identity: str) -> bool:
    """Tell whether a job's folder says that this very job is done."""
    file = place / DONE
    return file.exists() and json.loads(file.read_bytes())["identity"] == identity
