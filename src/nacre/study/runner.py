"""Run the runs of a study: each a `nacre grow` of its own, some side by side, what is equal once.

A process of its own gives every run its own memory to measure. Runs that stand on the same
tokenizer and text link these from the first that made them, and a run whose first stages are those
of another links these: they are the same files, and count with the time that they took.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from nacre import config
from nacre.errors import ConfigError, FingerprintError, NacreError, Problem
from nacre.evaluate import run as evaluation
from nacre.evaluate import tasks
from nacre.evaluate.tasks import Options, Task
from nacre.folders import PLAN, RUN, STUDY
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.study.design import Evaluation, Run, Study
from nacre.train import files
from nacre.train import grow as growing
from nacre.train.interruption import Interrupted, stop_signals
from nacre.train.metrics import NewMetrics, append_metrics, read_metrics
from nacre.train.observer import Observer

LOG = "log.txt"
JOBS = "study.json"
POLL_SECONDS = 2.0


class StudyError(NacreError):
    """Runs of a study failed; the others were made."""


def run(study: Study, out: str | Path, *, jobs: int = 1, observer: Observer | None = None) -> None:
    """Make every run of a study that is not finished, `jobs` side by side, in the folder `out`.

    Given again, it goes on where it stopped. Side by side, the processor's threads are divided
    among the runs: compare wall-clock only of runs made with the same `jobs`.
    Raises `ConfigError` before the first run for what would stop any of them, `FingerprintError`
    for a run in `out` that another plan made, `StudyError` at the end for runs that failed, and
    `Interrupted` where a signal stopped it: the runs on their way save their states first.
    """
    out, observer = Path(out), observer or Observer()
    runs = study.runs(out)
    check(study, runs, out, jobs)
    for arm in study.arms:
        for warning in plans.warnings(study.plan_of(arm, study.seeds[0], study.budgets_of(arm)[0])):
            observer.warn(f"{arm}: {warning}")
    out.mkdir(parents=True, exist_ok=True)
    config.write_yaml(study, out / STUDY)
    waiting = [each for each in runs if not finished(each)]
    observer.phase(study.name, sum(each.tokens for each in runs))
    observer.advance(sum(each.tokens for each in runs if finished(each)))
    active: list[_Job] = []
    failed: list[str] = []
    with stop_signals() as stop:
        try:
            while (waiting or active) and not stop.requested:
                while len(active) < jobs and (ready := _next(waiting, active, runs)):
                    waiting.remove(ready)
                    prepare(ready, runs)
                    note_jobs(ready.folder, jobs)
                    active.append(_Job(ready, _start(ready, jobs)))
                    observer.note(f"{_title(ready)}: started")
                _wait(active)
                for job in list(active):
                    observer.advance(job.progress())
                    if job.process.poll() is not None and not stop.requested:
                        active.remove(job)
                        failed += _ended(job, observer)
        finally:
            for job in active:
                job.process.terminate()
            for job in active:
                job.process.wait()
    if stop.requested:
        raise Interrupted(
            f"{stop.requested}: every run has saved its state; the same command goes on"
        )
    if failed:
        raise StudyError("\n".join([f"{len(failed)} of {len(runs)} runs failed", *failed]))


def evaluate(study: Study, out: str | Path, *, observer: Observer | None = None) -> None:
    """Score every stage of every finished run as the study says; what was done is not done again.

    The records stand in each run's `evaluations.jsonl`. Raises as `nacre.evaluate_checkpoints`.
    """
    if study.evaluate is None:
        return
    asked = study.evaluate
    folders = [each.folder for each in finished_runs(study, out)]
    if folders:
        evaluation.evaluate(
            folders, asked.tasks,
            data=asked.data, data_dir=asked.data_dir, limit=asked.limit, observer=observer,
        )  # fmt: skip


def evaluation_tasks(asked: Evaluation) -> list[Task]:
    """Return the tasks that a study is to score; raise `ConfigError` for what cannot be."""
    options = Options(data=asked.data, data_dir=asked.data_dir, limit=asked.limit)
    found = tasks.prepare(asked.tasks, options)
    if asked.data is not None and all(task.name != "lm" for task in found):
        fix = "add lm to evaluate.tasks, or leave evaluate.data out"
        raise ConfigError(Problem("evaluate.data", "no task reads it", fix))
    return found


def check(study: Study, runs: Sequence[Run], out: Path, jobs: int) -> None:
    """Check all that can be checked before the first run."""
    if study.evaluate is not None:
        evaluation_tasks(study.evaluate)
    if jobs < 1:
        raise ConfigError(Problem("--jobs", f"{jobs} is not 1 or more", "leave it out"))
    if out.exists() and not out.is_dir():
        raise ConfigError(Problem("--out", f"{out} is a file", "name a folder"))
    if out.is_dir() and any(out.iterdir()) and not (out / STUDY).exists():
        message = f"{out} holds files that are not a study's"
        raise ConfigError(Problem("--out", message, "name a new or empty folder"))
    plans_seen: set[str] = set()
    for each in runs:
        check_plan(each)
        if each.plan.fingerprint() not in plans_seen and not finished(each):
            growing.check(each.plan, each.folder)
        plans_seen.add(each.plan.fingerprint())


def check_plan(run: Run) -> None:
    """Raise `FingerprintError` if what stands in a run's folder was grown by another plan."""
    here = run.folder / PLAN
    if not here.exists():
        return
    old = plans.load(here)
    if _stages(old, len(old.stages)) != _stages(run.plan, len(run.plan.stages)):
        raise FingerprintError(
            f"the plan of {run.folder}", old.fingerprint()[:12], run.plan.fingerprint()[:12],
            "name another --out for the changed study",
        )  # fmt: skip


def finished(run: Run) -> bool:
    """Tell whether a run is whole: its plan, its record and all of its stages."""
    whole = all((run.folder / name).exists() for name in (PLAN, RUN))
    return whole and len(files.stages(run.folder)) == len(run.plan.stages)


def finished_runs(study: Study, out: str | Path) -> list[Run]:
    """Return the runs of a study that are whole."""
    return [run for run in study.runs(Path(out)) if finished(run)]


def prepare(run: Run, runs: Sequence[Run]) -> None:
    """Make a run's folder, with links to what other runs have made that is the same for it."""
    if (run.folder / PLAN).exists():
        return
    with files.new_folder(run.folder) as partial:
        _link_shared(run, runs, partial)
        config.write_yaml(run.plan, partial / PLAN)


def _link_shared(run: Run, runs: Sequence[Run], target: Path) -> None:
    """Link what other runs have made that is the same for this one."""
    if same := _made(run, runs):
        best = max(same, key=lambda each: shared_stages(each, run))
        count = shared_stages(best, run)
        names = ["tokenizer", "data", *(["substrate"] if count else [])]
        names += [f"stages/{number:02d}" for number in range(1, count + 1)]
        for name in names:
            if (best.folder / name).exists():
                shutil.copytree(best.folder / name, target / name, copy_function=files.link)
        for line in read_metrics(best.folder):
            if line["stage"] <= count:
                append_metrics(target, line)
        for jobs in jobs_of(best.folder) if count else []:
            note_jobs(target, jobs)


def _made(run: Run, runs: Sequence[Run]) -> list[Run]:
    """Return the runs that have made tokenizer and tokens which are those of `run`."""
    made = [each for each in runs if (each.folder / RUN).exists()]
    return [each for each in made if _parts(each.plan) == _parts(run.plan)]


def note_jobs(run: Path, jobs: int) -> None:
    """Record in a run's folder that runs were made `jobs` side by side with it."""
    known = jobs_of(run)
    if jobs not in known:
        files.write_json(run / JOBS, {"jobs": sorted([*known, jobs])})


def jobs_of(run: Path) -> list[int]:
    """Return how many runs were made side by side with a run, its shared stages included.

    Several numbers where it was made in several goes, none for a run of an older nacre.
    """
    return files.read_json(run / JOBS)["jobs"] if (run / JOBS).exists() else []


def _parts(plan: Plan) -> dict[str, Any]:
    """Return what decides a plan's tokenizer and token stores."""
    data = plan.model_dump(mode="json", by_alias=True, include={"tokenizer", "data", "start_from"})
    return data | {"sources": sorted({str(s.sources) for s in plan.stages if s.sources})}


def shared_stages(made: Run, wanted: Run) -> int:
    """Return how many of the first stages of `wanted` the run `made` has finished."""
    count = len(files.stages(made.folder)) if made.folder.exists() else 0
    return min(count, common_stages(made.plan, wanted.plan))


def common_stages(one: Plan, other: Plan) -> int:
    """Return how many of their first stages two plans have in common, cost and all."""
    most = min(len(one.stages), len(other.stages))
    return next((n for n in range(most, 0, -1) if _stages(one, n) == _stages(other, n)), 0)


def _stages(plan: Plan, count: int) -> dict[str, Any]:
    """Return what decides the first stages of a plan, how their trunks run included."""
    data = plan.model_dump(mode="json", by_alias=True, exclude={"name"})
    return data | {"stages": data["stages"][:count]}


def _next(waiting: Sequence[Run], active: Sequence[_Job], runs: Sequence[Run]) -> Run | None:
    """Return the first run that can link all that it shares: what a running one makes, it awaits.

    That is a stage, or tokenizer and tokens which no run has made yet.
    """
    for run in waiting:
        awaits_stage = any(
            common_stages(job.run.plan, run.plan) > shared_stages(job.run, run) for job in active
        )
        made_now = any(_parts(job.run.plan) == _parts(run.plan) for job in active)
        awaits_tokens = made_now and not _made(run, runs)
        if not (awaits_stage or awaits_tokens):
            return run
    return None


@dataclass
class _Job:
    """A run that is being made, and what of it was counted as progress."""

    run: Run
    process: subprocess.Popen[bytes]
    counted: int = 0
    done: dict[int, int] = field(default_factory=dict)  # tokens of each stage

    def __post_init__(self) -> None:
        self.metrics = NewMetrics(self.run.folder)

    def progress(self) -> int:
        """Return the tokens trained since the last call."""
        for line in self.metrics.read():
            self.done[line["stage"]] = line["tokens"]
        total = min(sum(self.done.values()), self.run.tokens)
        new, self.counted = max(0, total - self.counted), max(total, self.counted)
        return new


def _start(run: Run, jobs: int) -> subprocess.Popen[bytes]:
    threads = max(1, torch.get_num_threads() // jobs)
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "OMP_WAIT_POLICY": "PASSIVE"}
    command = [sys.executable, "-m", "nacre", "grow", "--resume", "--quiet", "--track", "none"]
    with (run.folder / LOG).open("wb") as log:
        return subprocess.Popen(
            [*command, "--out", str(run.folder)], env=environment, stdout=log, stderr=log
        )


def _wait(active: Sequence[_Job]) -> None:
    """Wait a little, or until a run ends."""
    if active:
        with contextlib.suppress(subprocess.TimeoutExpired):
            active[0].process.wait(timeout=POLL_SECONDS)


def _ended(job: _Job, observer: Observer) -> list[str]:
    """Say how a run ended; return a line if it failed."""
    if job.process.returncode == 0 and finished(job.run):
        last = files.read_json(files.stages(job.run.folder)[-1] / files.RECORD)
        bits = last["validation"]["bits_per_byte"]
        observer.note(f"{_title(job.run)}: {bits:.4f} bits per byte")
        return []
    lines = (job.run.folder / LOG).read_text(encoding="utf-8", errors="replace").splitlines()
    said = next((line for line in reversed(lines) if line.strip()), "it said nothing")
    observer.warn(f"{_title(job.run)} failed: {said}")
    return [f"  - {_title(job.run)}: {said} ({job.run.folder / LOG})"]


def _title(run: Run) -> str:
    return f"{run.arm}, x{run.budget:g}, seed {run.seed}"
