"""The process of one job: `python -m nacre.fleet FOLDER` does what FOLDER/job.json says.

It ends with the process that started it, holds the job's lock while it works, goes on with what an
earlier attempt has begun, and notes in FOLDER/done.json that the job is done.
"""

from __future__ import annotations

import os
import runpy
import signal
import sys
import threading
import time
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout

from nacre.config import read_yaml
from nacre.fleet.records import DONE, JOB, LOCK, is_done
from nacre.folders import PLAN, STUDY
from nacre.study import parse, runner
from nacre.train import files

WHOLE_OR_NOTHING = ("compose", "substrate build", "tokenizer build")
"""Commands whose folder appears when they are done, and that do not write to one that exists."""
LOCK_SECONDS = 600.0  # for an earlier attempt, cut off from the cluster, to save its state
END_SECONDS = 300.0  # for this one, when it is to end


def main(place: Path) -> int:
    """Do the job of a folder once; return the exit code of its command."""
    threading.Thread(target=_end_with_parent, daemon=True).start()
    job = files.read_json(place / JOB)
    try:
        with FileLock(place / LOCK, timeout=LOCK_SECONDS):
            if is_done(place, job["identity"]):
                return 0
            started = time.monotonic()
            arguments = _arguments(job)
            code = 0 if arguments is None else _command(arguments)
            if code == 0:
                record = {"identity": job["identity"], "seconds": time.monotonic() - started}
                files.write_json(place / DONE, record)
            return code
    except Timeout:
        print(f"an earlier attempt at {job['name']} still runs", file=sys.stderr)
        return 1


def _arguments(job: dict[str, Any]) -> list[str] | None:
    """Return the command to run, with what makes it go on; None if an attempt before finished it.

    A folder that appears whole or not at all, and that this job began, is such a finished one.
    """
    arguments: list[str] = job["arguments"]
    if job["writes"] is None:
        return arguments
    made = Path(job["writes"])
    if job["study"] is not None:
        _link_shared(Path(job["study"]), made)
    elif job["command"] == "grow" and (made / PLAN).exists():
        return [*arguments, "--resume"]
    elif job["command"] in WHOLE_OR_NOTHING and made.is_dir() and any(made.iterdir()):
        return None
    return arguments


def _link_shared(out: Path, made: Path) -> None:
    """Give one run of the study in `out` its plan, and what other runs have made that it shares."""
    runs = parse(read_yaml(out / STUDY)).runs(out)
    runner.prepare(next(run for run in runs if run.folder == made), runs)


def _command(arguments: list[str]) -> int:
    """Run `nacre` here with these arguments; return its exit code."""
    sys.argv = ["nacre", *arguments]
    try:
        runpy.run_module("nacre", run_name="__main__")
    except SystemExit as stop:
        return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    return 0


def _end_with_parent() -> None:
    """When the other end of standard input closes, ask this process to end; in time, make it."""
    while os.read(0, 1):
        pass
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(END_SECONDS)
    os._exit(1)
