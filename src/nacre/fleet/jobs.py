"""Jobs: what each command reads and writes, and what must be true of all before one starts.

A job is identified by what decides its output: of a growth its plan and folder, of other commands
their arguments, and in each case the jobs that it needs. What was done under the same identity is
not done again.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nacre import study as studies
from nacre.errors import ConfigError, NacreError, Problem
from nacre.fleet import design
from nacre.fleet.design import NEEDS, Entry, Fleet, Planned
from nacre.fleet.process import WHOLE_OR_NOTHING
from nacre.folders import PLAN
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.study import Study, runner
from nacre.train import files, folder
from nacre.train import grow as growing

OUT = "out"


@dataclass(frozen=True)
class Call:
    """What a command line says: the command's words, its options, the settings of its plan."""

    command: str
    options: Mapping[str, Any]
    settings: tuple[str, ...] = ()


Reader = Callable[[Sequence[str]], Call]
"""Reads the arguments of a command; raises `ConfigError` for what the command would refuse."""


@dataclass(frozen=True)
class Job:
    """A command to run once, on a machine that has what it takes."""

    name: str
    entry: str
    arguments: tuple[str, ...]
    call: Call
    takes: Entry
    needs: tuple[str, ...] = ()
    after: tuple[str, ...] = ()  # these need not succeed
    plan: Plan | None = None
    run_of: Study | None = None
    identity: str = ""
    reads: frozenset[Path] = field(default=frozenset())

    @property
    def writes(self) -> Path | None:
        """The folder that the job makes."""
        named = self.call.options.get(OUT)
        return None if named is None or self.call.command == "eval" else Path(named)

    @property
    def study_folder(self) -> Path:
        """The folder of the study of which this is a run."""
        assert self.writes is not None
        return self.writes.parents[2]

    @property
    def tokens(self) -> int:
        """The tokens of a growth, of all stages."""
        return sum(stage.tokens for stage in self.plan.stages) if self.plan is not None else 0

    def whole(self) -> bool:
        """Tell whether what the job writes is all there."""
        if self.plan is not None:
            assert self.writes is not None
            made = files.stages(self.writes) if self.writes.is_dir() else []
            return len(made) >= len(self.plan.stages)
        return self.writes is None or (self.writes.is_dir() and any(self.writes.iterdir()))


def read(fleet: Fleet, reader: Reader) -> list[Job]:
    """Return every job of a fleet, each after those that it needs; a study gives one for each run.

    Raises `ConfigError` with all that is wrong with commands, plans and studies, for two jobs that
    write one folder, and for one that reads what another makes and does not wait for it.
    """
    found: dict[str, Job] = {}
    wrong: list[tuple[Planned, Problem]] = []
    for planned in design.jobs(fleet):
        if any(need not in found for need in planned.needs):
            continue  # that one is wrong itself
        try:
            for job in _jobs(planned, found, reader):
                found[job.name] = job
        except ConfigError as error:
            wrong += [(planned, problem) for problem in error.problems]
        except NacreError as error:
            wrong.append((planned, Problem("run", str(error))))
    problems = _said_once(wrong)
    if not problems:
        problems = [*_written_twice(found.values()), *dict.fromkeys(_read_too_early(found))]
    if problems:
        raise ConfigError(problems)
    return list(found.values())


def _jobs(planned: Planned, known: Mapping[str, Job], reader: Reader) -> Iterator[Job]:
    arguments = tuple(_with_outputs(planned, known))
    call = reader(arguments)
    if problems := list(_command_problems(call)):
        raise ConfigError(problems)
    if call.command == "study":
        yield from _runs(planned, arguments, call, known)
        return
    plan = None
    if call.command == "grow":
        plan = plans.load(call.options["plan"] or "small", call.settings)
    yield _job(planned, arguments, call, known, needs=planned.needs, plan=plan)


def _job(
    planned: Planned, arguments: tuple[str, ...], call: Call, known: Mapping[str, Job],
    study: Study | None = None, **own: Any,
) -> Job:  # fmt: skip
    """Return a job with its identity and what it reads; `study` is that of which it is the page."""
    plan: Plan | None = own.get("plan")
    decides: Any = [*arguments, None if study is None else study.model_dump(mode="json")]
    named = [value for key, value in call.options.items() if key != OUT]
    if plan is not None:
        decides = [plan.fingerprint(), str(call.options[OUT])]
        named += [plan.start_from, plan.tokenizer.path, plan.substrate.path, plan.substrate.font]
        named += [plan.data.sources, *[stage.sources for stage in plan.stages]]
    identity = json.dumps([decides, [known[need].identity for need in own["needs"]]])
    job = {"name": planned.name, "entry": planned.entry, "takes": planned.takes, **own}
    return Job(
        arguments=arguments, call=call, identity=hashlib.sha256(identity.encode()).hexdigest(),
        reads=frozenset(Path(text).resolve() for text in _texts(named)), **job,
    )  # fmt: skip


def _runs(
    planned: Planned, arguments: tuple[str, ...], call: Call, known: Mapping[str, Job]
) -> Iterator[Job]:
    """Return a job for each run of a study, and one that evaluates them and writes its page.

    What two runs have in common is made by the first of them: the other comes after it.
    """
    study = studies.load(call.options["study"], call.settings)
    out = Path(call.options[OUT])
    runs = study.runs(out)
    if planned.needs:  # what they make is not there yet
        for run in runs:
            runner.check_plan(run)
    else:
        runner.check(study, runs, out, jobs=1)
    made: list[tuple[str, Plan]] = []
    for run in runs:
        name = f"{planned.name}/{run.folder.relative_to(out).as_posix()}"
        shared = [earlier for earlier, plan in made if runner.common_stages(plan, run.plan)]
        yield _job(
            planned, ("grow", "--resume", "--track", "none", "--out", str(run.folder)),
            Call("grow", {OUT: run.folder}), known,
            name=name, needs=planned.needs, after=tuple(shared[:1]), plan=run.plan, run_of=study,
        )  # fmt: skip
        made.append((name, run.plan))
    needs = (*planned.needs, *[name for name, _ in made])
    yield _job(planned, arguments, call, known, study, needs=needs)


def _with_outputs(planned: Planned, known: Mapping[str, Job]) -> Iterator[str]:
    """Return a job's arguments, with what its needs write in the place of `{needs}`."""
    for word in planned.arguments:
        if word != f"{{{NEEDS}}}":
            yield word
            continue
        for need in planned.needs:
            written = known[need].writes
            if written is None:
                message = f"{need} writes no folder that {{{NEEDS}}} could stand for"
                raise ConfigError(Problem("run", message, "name what is meant"))
            yield str(written)


def _command_problems(call: Call) -> Iterator[Problem]:
    """Return what a command must not be told, or must be, to be done once and again if it died."""
    options = call.options
    if call.command not in ("grow", "study", "eval", *WHOLE_OR_NOTHING):
        allowed = ", ".join(sorted(("grow", "study", "eval", *WHOLE_OR_NOTHING)))
        yield Problem("run", f"{call.command} cannot be a job", f"allowed: {allowed}")
        return
    refused = {
        "resume": "what was begun goes on by itself",
        "overwrite": "what was begun would be lost when the job is tried again",
        "add": "tried again, it would be added twice: compose anew",
        "remove": "tried again, there is nothing to remove: compose anew",
        "again": "what was scored would be scored again whenever the job is tried again",
    }
    for name, fix in refused.items():
        if options.get(name):
            yield Problem(f"run: --{name}", "does not go with a fleet", fix)
    if call.command == "study":
        if options["jobs"] != 1:
            yield Problem("run: --jobs", "does not go with a fleet", "each run is a job of its own")
        if not options["run"]:
            yield Problem("run: --no-run", "does not go with a fleet", "run nacre study for that")
    if call.command != "eval" and options[OUT] is None:
        yield Problem("run: --out", "is required", "name the folder that the job makes")


def _said_once(wrong: Sequence[tuple[Planned, Problem]]) -> list[Problem]:
    """Name each problem's job, or the entry where more than one of its jobs has it."""
    said: dict[tuple[str, Problem], list[str]] = {}
    for planned, problem in wrong:
        said.setdefault((planned.entry, problem), []).append(planned.name)
    return [
        Problem(f"jobs.{entry if len(names) > 1 else names[0]}.{p.field}", p.message, p.fix)
        for (entry, p), names in said.items()
    ]


def _written_twice(jobs: Iterable[Job]) -> Iterator[Problem]:
    """Find jobs that would write one folder, or one inside the other's.

    A study's runs stand in its folder: they and its page are one job here.
    """
    makers: dict[Path, Job] = {}
    for job in jobs:
        if job.writes is None or job.run_of is not None:
            continue
        path = job.writes.resolve()
        if path in makers:
            message = f"{job.writes} is also written by {makers[path].name}"
            yield Problem(f"jobs.{job.name}.run: --out", message, "name a folder of its own")
        makers.setdefault(path, job)
    for path, job in makers.items():
        above = next((makers[parent] for parent in path.parents if parent in makers), None)
        if above is not None:
            message = f"{job.writes} lies in {above.writes}, which {above.name} writes"
            yield Problem(f"jobs.{job.name}.run: --out", message, "name a folder of its own")


def _read_too_early(jobs: Mapping[str, Job]) -> Iterator[Problem]:
    """Find jobs that read what another makes, and do not wait for it."""
    makers = {j.writes.resolve(): j for j in jobs.values() if j.writes and j.run_of is None}
    waits: dict[str, set[str]] = {}
    for job in jobs.values():
        waits[job.name] = set(job.needs).union(*[waits[need] for need in job.needs])
        named = job.name.partition("/")[0]
        for path in sorted(job.reads):
            maker = next((makers[p] for p in (path, *path.parents) if p in makers), None)
            if maker is not None and maker is not job and maker.name not in waits[job.name]:
                message = f"reads {maker.writes}, which {maker.name} makes, and does not wait"
                yield Problem(f"jobs.{named}", message, f"needs: [{maker.name}]")


def _texts(value: Any) -> Iterator[str]:
    """Return every text and path among nested values."""
    if isinstance(value, str | Path):
        yield str(value)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _texts(item)


def check(job: Job, begun: str | None) -> None:
    """Raise `ConfigError` if the job would find its folder taken; `begun` is what it was before."""
    if job.plan is not None and job.run_of is None:
        assert job.writes is not None
        folder.claim(job.writes, job.plan, resume=(job.writes / PLAN).exists(), overwrite=False)
        if not job.needs:
            growing.check(job.plan, job.writes)
    taken = job.call.command in WHOLE_OR_NOTHING and begun != job.identity
    if taken and job.writes is not None and job.writes.exists() and job.whole():
        message = f"{job.writes} is not empty, and this job did not make it"
        raise ConfigError(Problem("run: --out", message, "name a new folder, or remove it"))
