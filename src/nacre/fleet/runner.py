"""Run a fleet: hand its jobs to Ray as what they need gets done, and say what becomes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import nacre
from nacre import config
from nacre.errors import ConfigError, NacreError, Problem
from nacre.fleet import cluster
from nacre.fleet import jobs as describing
from nacre.fleet.jobs import Job
from nacre.fleet.records import DONE, JOB, LOG, attempts, is_done
from nacre.folders import STUDY
from nacre.listing import last_metric
from nacre.train import files, folder
from nacre.train.interruption import Interrupted, stop_signals
from nacre.train.observer import Observer

POLL_SECONDS = 1.0
UNITS = 1000  # of progress, a job

State = Literal["done", "failed", "left out", "stopped"]


class FleetError(NacreError):
    """Jobs of a fleet failed; those that did not need them were done."""


@dataclass(frozen=True)
class Outcome:
    """What became of a job: how often it was started now, and what it said if it is not done."""

    job: str
    state: State
    attempts: int
    seconds: float | None
    log: Path
    said: str = ""


def place_of(out: Path, job: Job) -> Path:
    """Return the folder of a job's records and log."""
    return out / "jobs" / job.name


def done_before(out: Path, job: Job) -> bool:
    """Tell whether a job is done, and what it made still there."""
    return is_done(place_of(out, job), job.identity) and job.whole()


def run(
    jobs: Sequence[Job],
    out: str | Path,
    *,
    address: str | None = None,
    observer: Observer | None = None,
) -> list[Outcome]:
    """Do every job that is not done, on a cluster of Ray; return what became of each, in order.

    `address` is that of a running cluster; None starts one of this machine. Logs and records stand
    in the folder `out`: given again, the fleet goes on where it stopped. SIGTERM and SIGINT stop
    the jobs that run, a growth with its state saved; a second SIGINT leaves at once. Raises
    `ConfigError`, before the first job, for what would stop any of them.
    """
    out, observer = Path(out).absolute(), observer or Observer()
    check(jobs, out)
    with folder.held(out), cluster.connected(address, out / "ray.log") as ray:
        check_resources(jobs, cluster.machines(ray), address, observer)
        return _Watch(ray, jobs, out, observer).to_the_end()


def raise_for(outcomes: Sequence[Outcome]) -> None:
    """Raise `Interrupted` if jobs were stopped, else `FleetError` if jobs failed."""
    failed = [each for each in outcomes if each.state == "failed"]
    left = [each for each in outcomes if each.state == "left out"]
    lines = [f"  - {each.job}: {each.said} ({each.log})" for each in failed]
    if any(each.state == "stopped" for each in outcomes):
        done = sum(each.state == "done" for each in outcomes)
        head = f"{done} of {len(outcomes)} jobs are done; the same command goes on"
        raise Interrupted("\n".join([head, *lines]))
    if failed:
        head = f"{len(failed)} of {len(outcomes)} jobs failed"
        head += f", {len(left)} that need them were left out" if left else ""
        raise FleetError("\n".join([head, *lines]))


def check(jobs: Sequence[Job], out: Path) -> None:
    """Check all that can be checked before a cluster is asked for."""
    if out.exists() and not out.is_dir():
        raise ConfigError(Problem("--out", f"{out} is a file", "name a folder"))
    records, found = out / "jobs", list[Problem]()
    for job in jobs:
        made = None if job.writes is None else job.writes.resolve()
        if made is not None and (made in (records, *records.parents) or records in made.parents):
            message = f"{job.writes} is where the fleet keeps its records"
            found.append(Problem(f"jobs.{job.name}.run: --out", message, "name another folder"))
        elif not done_before(out, job):
            begun = place_of(out, job) / JOB
            known = files.read_json(begun)["identity"] if begun.exists() else None
            try:
                describing.check(job, known)
            except ConfigError as error:
                found += [Problem(f"jobs.{job.name}.{p.field}", p.message, p.fix)
                          for p in error.problems]  # fmt: skip
            except NacreError as error:
                found.append(Problem(f"jobs.{job.name}", str(error)))
    if found:
        raise ConfigError(found)


def check_resources(
    jobs: Sequence[Job], machines: Sequence[Mapping[str, float]], address: str | None,
    observer: Observer,
) -> None:  # fmt: skip
    """Refuse what this machine does not have; warn of what a cluster does not have yet."""
    found: dict[str, Problem] = {}
    for job in jobs:
        asked = cluster.asked(job.takes)
        if any(all(has.get(name, 0) >= much for name, much in asked.items()) for has in machines):
            continue
        most = {name: max((has.get(name, 0) for has in machines), default=0) for name in asked}
        wanted, there = (", ".join(f"{v:g} {k}" for k, v in d.items()) for d in (asked, most))
        message = f"takes {wanted}, but no machine has that; the most of each: {there}"
        found[job.entry] = Problem(f"jobs.{job.entry}", message, "lower it, or name --address")
    if found and address is None:
        raise ConfigError(list(found.values()))
    for problem in found.values():
        observer.warn(f"{problem.field}: {problem.message}: it waits for one")
    if any(has.get("GPU") for has in machines):
        for entry in dict.fromkeys(j.entry for j in jobs if j.plan and not j.takes.gpus):
            observer.warn(f"jobs.{entry}: takes no gpus, so it grows on processors")


class _Watch:
    """A fleet on its way: which jobs wait, which Ray has, what became of the others."""

    def __init__(self, ray: Any, jobs: Sequence[Job], out: Path, observer: Observer) -> None:
        self.ray, self.out, self.observer = ray, out, observer
        self.jobs = {job.name: job for job in jobs}
        self.outcomes: dict[str, Outcome] = {}
        self.before: dict[str, int] = {}  # attempts, when the job was handed over
        self.noted: dict[str, int] = {}  # attempts, of those before too
        self.counted: dict[str, int] = {}
        self.handed: dict[Any, Job] = {}

    def to_the_end(self) -> list[Outcome]:
        """Return the outcomes when every job has one."""
        self.observer.phase("Fleet", UNITS * len(self.jobs))
        for job in self.jobs.values():
            if done_before(self.out, job):
                self._settle(job, "done")
        with stop_signals() as stop:
            while len(self.outcomes) < len(self.jobs):
                if stop.requested:
                    self._stop(stop.requested)
                    break
                self._hand_over()
                ended: list[Any] = []
                if self.handed:
                    ended, _ = self.ray.wait(list(self.handed), timeout=POLL_SECONDS)
                for reference in ended:
                    self._ended(reference, self.handed.pop(reference))
                for job in self.handed.values():
                    self._look(job)
        return [self.outcomes[name] for name in self.jobs]

    def _hand_over(self) -> None:
        """Give Ray every job whose needs are done; leave out those whose needs failed."""
        handed = {job.name for job in self.handed.values()}
        for job in self.jobs.values():
            if job.name in self.outcomes or job.name in handed:
                continue
            missed = [n for n in job.needs if n in self.outcomes and not self._done(n)]
            if missed:
                self._settle(job, "left out", f"{missed[0]} is not done")
            elif all(name in self.outcomes for name in (*job.needs, *job.after)):
                self.handed[self._submit(job)] = job

    def _done(self, name: str) -> bool:
        return self.outcomes[name].state == "done"

    def _submit(self, job: Job) -> Any:
        """Write what the job's process reads, and hand the job to Ray."""
        place = place_of(self.out, job)
        place.mkdir(parents=True, exist_ok=True)
        (place / DONE).unlink(missing_ok=True)
        if job.run_of is not None:
            job.study_folder.mkdir(parents=True, exist_ok=True)
            config.write_yaml(job.run_of, job.study_folder / STUDY)
        record = {
            "name": job.name,
            "identity": job.identity,
            "command": job.call.command,
            "arguments": list(job.arguments),
            "writes": None if job.writes is None else str(job.writes),
            "study": None if job.run_of is None else str(job.study_folder),
            "nacre": nacre.__version__,
        }
        files.write_json(place / JOB, record)
        self.before[job.name] = self.noted[job.name] = len(attempts(place))
        return cluster.submit(self.ray, place, job)

    def _look(self, job: Job) -> None:
        """Note new attempts at a job, and how far it has come."""
        for attempt in attempts(place_of(self.out, job))[self.noted[job.name] :]:
            self.noted[job.name] += 1
            again = self.noted[job.name] - self.before[job.name]
            which = f" (attempt {again})" if again > 1 else ""
            self.observer.note(f"{job.name}: started on {attempt['machine']}{which}")
        self._advance(job, round(UNITS * _trained(job)))

    def _advance(self, job: Job, units: int) -> None:
        before = self.counted.get(job.name, 0)
        if units > before:
            self.observer.advance(units - before)
            self.counted[job.name] = units

    def _ended(self, reference: Any, job: Job) -> None:
        """Note what became of a job that Ray has brought to its end."""
        self._look(job)
        errors = self.ray.exceptions
        try:
            failed = self.ray.get(reference)
        except errors.TaskCancelledError:
            self._settle(job, "stopped", "the fleet was stopped")
            return
        except errors.RayError as error:
            failed = " ".join(str(getattr(error, "cause", error)).split())
        if failed is None and not cluster.appears(lambda: done_before(self.out, job)):
            failed = f"what it made is not seen here: {cluster.SHARE}"
        self._settle(job, "done" if failed is None else "failed", failed or "")

    def _stop(self, signal: str) -> None:
        """Stop the jobs that run, wait until each has saved its state, and begin no other."""
        self.observer.note(f"{signal}: the jobs that run save their state and end")
        for reference in self.handed:
            self.ray.cancel(reference)
        while self.handed:
            ended, _ = self.ray.wait(list(self.handed), timeout=POLL_SECONDS)
            for reference in ended:
                self._ended(reference, self.handed.pop(reference))
        for job in self.jobs.values():
            if job.name not in self.outcomes:
                self._settle(job, "stopped", "the fleet was stopped")

    def _settle(self, job: Job, state: State, said: str = "") -> None:
        """Give a job its outcome, and say it."""
        place, name = place_of(self.out, job), job.name
        ran = self.noted.get(name, 0) - self.before.get(name, 0)
        seconds = files.read_json(place / DONE)["seconds"] if state == "done" else None
        self.outcomes[name] = Outcome(name, state, ran, seconds, place / LOG, said)
        self._advance(job, UNITS)
        count = f"{len(self.outcomes)}/{len(self.jobs)}"
        if state == "failed":
            self.observer.warn(f"{name} failed: {said} ({place / LOG})")
        elif state == "done":
            how = f"done in {seconds:.0f} s" if name in self.noted else "was done before"
            self.observer.note(f"{name}: {how} ({count})")
        else:
            self.observer.note(f"{name}: {state}: {said}")


def _trained(job: Job) -> float:
    """Return what part of its tokens a growth has trained on; 0 for other jobs."""
    last = None if job.plan is None or job.writes is None else last_metric(job.writes)
    if job.plan is None or last is None:
        return 0.0
    try:
        below = sum(stage.tokens for stage in job.plan.stages[: last["stage"] - 1])
        return min(1.0, (below + last["tokens"]) / job.tokens)
    except (KeyError, TypeError):  # damaged: whoever reads the run says so
        return 0.0
