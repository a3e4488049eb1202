"""Ray: a connection to a cluster, and the task that looks after one job on some machine of it.

Ray finds a machine that has what a job takes, starts the task there, and starts it again elsewhere
when the machine or the job has died. The job itself is a process of its own.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import nacre
from nacre.errors import ConfigError, Problem, clone_install
from nacre.fleet.records import JOB, LOG, add_attempt, last_line

if TYPE_CHECKING:
    from nacre.fleet.design import Entry
    from nacre.fleet.jobs import Job

POLL_SECONDS = 0.5
CONNECT_SECONDS = 10.0
SHARE_SECONDS = 90.0  # machines that share files may see what is new only after a while (NFS: 60 s)
SHARE = "the machines of a fleet must share their files"
USERS_MISTAKE = 2  # the exit code after which the same command would end in the same way


class Died(Exception):
    """A job ended in a way that is worth another attempt."""


@contextlib.contextmanager
def connected(address: str | None, said: Path) -> Iterator[Any]:
    """Give the module `ray`, connected to a cluster, or to one of this machine alone on loopback.

    What Ray has to say goes to the file `said`. Raises `ConfigError` without Ray or a cluster.
    """
    if address is not None:
        _check_address(address)
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    if address is None:  # by this Ray takes 127.0.0.1 for its own address, on Linux too
        os.environ.setdefault("RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER", "0")
    try:
        ray: Any = importlib.import_module("ray")
    except ImportError:
        problem = Problem("fleet", "needs the package ray", clone_install("fleet"))
        raise ConfigError(problem) from None
    local = {"address": "local", "include_dashboard": False, "object_store_memory": 100 * 2**20}
    with said.open("a", encoding="utf-8") as file, contextlib.redirect_stdout(file):
        try:
            ray.init(
                **(local if address is None else {"address": address}),
                log_to_driver=False, logging_level=logging.ERROR,
            )  # fmt: skip
        except (ConnectionError, ValueError, RuntimeError) as error:
            message = f"Ray says: {' '.join(str(error).split())[:200]}"
            raise ConfigError(Problem("--address", message, "ray status knows more")) from None
        try:
            yield ray
        finally:
            ray.shutdown()


def _check_address(address: str) -> None:
    """Refuse an address at which nothing listens: Ray itself would try for minutes."""
    if address == "auto":
        return
    host, _, port = address.rpartition(":")
    if not host or "/" in host or not port.isdecimal():
        fix = "auto finds the cluster of this machine; without --address a new one is started"
        raise ConfigError(Problem("--address", f"{address!r} is not HOST:PORT", fix))
    try:
        socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
    except (OSError, OverflowError) as error:
        fix = "`ray start --head` starts a cluster and says its address"
        raise ConfigError(Problem("--address", f"no cluster at {address}: {error}", fix)) from None


def machines(ray: Any) -> list[dict[str, float]]:
    """Return what each machine of the cluster has in all: CPU, GPU, memory in bytes."""
    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def asked(takes: Entry) -> dict[str, float]:
    """Return what a job takes of a machine, by Ray's names."""
    found = {"CPU": float(takes.cpus), "GPU": takes.gpus, "memory": float(takes.memory or 0)}
    return {name: amount for name, amount in found.items() if amount}


def submit(ray: Any, place: Path, job: Job) -> Any:
    """Hand a job to Ray; return the reference of what `attempt` will return."""
    takes = job.takes
    task = ray.remote(attempt).options(
        name=job.name, num_cpus=takes.cpus, num_gpus=takes.gpus, memory=takes.memory,
        max_retries=takes.retries, retry_exceptions=[Died],
    )  # fmt: skip
    return task.remote(str(place), job.identity, str(Path.cwd()), _environment(takes))


def _environment(takes: Entry) -> dict[str, str]:
    """Return the variables of a job: as many threads as cores; no GPU unless it asked for one."""
    threads = {"OMP_NUM_THREADS": str(takes.cpus), "OMP_WAIT_POLICY": "PASSIVE"}
    return threads if takes.gpus else threads | {"CUDA_VISIBLE_DEVICES": ""}


def appears(seen: Callable[[], bool]) -> bool:
    """Wait until something that was written elsewhere is seen here, at most `SHARE_SECONDS`."""
    end = time.monotonic() + SHARE_SECONDS
    while not seen():
        if time.monotonic() > end:
            return False
        time.sleep(POLL_SECONDS)
    return True


def attempt(place: str, identity: str, where: str, variables: Mapping[str, str]) -> str | None:
    """Run a job's process on this machine to its end; return why it failed, None if it is done.

    Raises `Died` where another attempt may succeed. Ray's cancellation arrives as
    KeyboardInterrupt: the process then saves its state, and this waits for it.
    """
    folder = Path(place)
    here = socket.gethostname()
    if not Path(where).is_dir() or not appears(lambda: _is(folder, identity)):
        missing = folder if Path(where).is_dir() else where
        return f"{here} does not see {missing} as it is: {SHARE}"
    version = json.loads((folder / JOB).read_bytes())["nacre"]
    if version != nacre.__version__:
        return f"{here} has nacre {nacre.__version__}, the fleet was started by {version}"
    add_attempt(folder)
    with (folder / LOG).open("ab") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "nacre.fleet", place],
            cwd=where, env=os.environ | dict(variables),
            stdin=subprocess.PIPE, stdout=log, stderr=log,
        )  # fmt: skip
    try:
        while process.poll() is None:
            time.sleep(POLL_SECONDS)
    finally:
        process.terminate()  # unless it has ended
        process.wait()
        assert process.stdin is not None
        process.stdin.close()
    if process.returncode == 0:
        return None
    said = last_line(folder)
    if process.returncode == USERS_MISTAKE:
        return said
    raise Died(f"{_ending(process.returncode)}: {said}")


def _is(place: Path, identity: str) -> bool:
    """Tell whether a folder is that of the job with this identity."""
    file = place / JOB
    return file.is_file() and json.loads(file.read_bytes())["identity"] == identity


def _ending(code: int) -> str:
    """Say how a process ended."""
    return f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"
