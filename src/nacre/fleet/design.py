"""A fleet as data: jobs, each a command of nacre with what it takes and what it waits for.

`each` makes one job of an entry for every combination of its values, and `{key}` stands for them in
`run` and `needs`. `{needs}`, alone as an argument, stands for what the needed jobs write.
"""

from __future__ import annotations

import itertools
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from graphlib import CycleError, TopologicalSorter
from pathlib import Path
from typing import Annotated, Any, cast

from pydantic import BeforeValidator, ByteSize, Field, NonNegativeFloat, NonNegativeInt, PositiveInt

from nacre.config import Section, override, read_yaml, validate
from nacre.errors import Problem, nearest
from nacre.growth import plan as plans

NEEDS = "needs"
_PLACE = re.compile(r"\{([A-Za-z_]\w*)\}")


def _words(value: object) -> object:
    """Split text as a shell would; turn the numbers of a list into text."""
    if isinstance(value, str):
        return tuple(shlex.split(value))
    if isinstance(value, list):
        return [_number_as_text(word) for word in cast("list[object]", value)]
    return value


def _value(value: object) -> object:
    if isinstance(value, bool):
        raise ValueError("no, yes, on and off are true or false in YAML: put it in quotes")
    return _number_as_text(value)


def _number_as_text(value: object) -> object:
    number = isinstance(value, int | float) and not isinstance(value, bool)
    return str(value) if number else value


Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
Key = Annotated[str, Field(pattern=r"^[A-Za-z_]\w*$")]
Words = Annotated[tuple[str, ...], BeforeValidator(_words)]
Value = Annotated[str, BeforeValidator(_value), Field(pattern=r"^[\w.+-]+$")]


class Entry(Section):
    """One job, or one for each combination of values, and what a machine must have for it."""

    run: Annotated[Words, Field(min_length=1)] = Field(description="a command of nacre")
    each: dict[Key, Annotated[tuple[Value, ...], Field(min_length=1)]] = Field(
        default={}, description="values by key: a job for every combination"
    )
    needs: Words = Field(default=(), description="entries or jobs that must be done before")
    cpus: PositiveInt = Field(default=1, description="cores, and threads of the job")
    gpus: NonNegativeFloat = Field(default=0, description="whole, or a part of one")
    memory: ByteSize | None = Field(default=None, description="e.g. 32GB; default: not counted")
    retries: NonNegativeInt = Field(default=3, description="after a machine or the job has died")


class Fleet(Section):
    """A name, and jobs by name."""

    name: Name = "fleet"
    jobs: Annotated[dict[Name, Entry], Field(min_length=1)]


@dataclass(frozen=True)
class Planned:
    """A job before its command has been read: `arguments` may still hold `{needs}`."""

    name: str
    entry: str
    arguments: tuple[str, ...]
    needs: tuple[str, ...]
    takes: Entry


def load(source: str | Path, settings: Sequence[str] = ()) -> Fleet:
    """Read a fleet from a YAML file or, by its name, from the recipes; apply `KEY=VALUE` settings.

    Raises `ConfigError` with every problem of the fields at once.
    """
    data = read_yaml(plans.find(source, "fleet", "fleet"))
    return parse(override(data, settings), where=str(source))


def parse(data: Mapping[str, Any], where: str = "fleet") -> Fleet:
    """Build a fleet from plain data. Raises `ConfigError` with every problem at once."""
    return validate(Fleet, data, check=problems, where=where)


def problems(fleet: Fleet) -> list[Problem]:
    """Return what single fields cannot show: places without a value, needs that lead nowhere."""
    found = [p for name, entry in fleet.jobs.items() for p in _entry_problems(name, entry)]
    if found:
        return found
    drawn = _draw(fleet)
    known = Counter([job.name for job in drawn])
    for name in [name for name, times in known.items() if times > 1]:
        entries = " and ".join(sorted({job.entry for job in drawn if job.name == name}))
        fix = "name the entries, or their values, differently"
        found.append(Problem(f"jobs.{entries}", f"more than one job is called {name!r}", fix))
    for job in drawn:
        for need in job.needs:
            if need not in known and need not in fleet.jobs:
                names = [*fleet.jobs, *known]
                fix = nearest(need, names) or f"jobs: {', '.join(dict.fromkeys(names))}"
                found.append(Problem(f"jobs.{job.name}.needs", f"there is no job {need!r}", fix))
    if not found:
        try:
            TopologicalSorter({job.name: job.needs for job in _resolved(fleet)}).prepare()
        except CycleError as error:
            circle = " -> ".join(reversed(error.args[1]))
            found.append(Problem("jobs", f"these need each other: {circle}", "take one need out"))
    return list(dict.fromkeys(found))


def _entry_problems(name: str, entry: Entry) -> list[Problem]:
    field, found = f"jobs.{name}", list[Problem]()
    keys, rests_on = [*entry.each, NEEDS], (f"{field}.run", f"{field}.each", f"{field}.{NEEDS}")
    if NEEDS in entry.each:
        message = "is what stands for the outputs of the needed jobs"
        found.append(Problem(f"{field}.each.{NEEDS}", message, "name the key differently"))
    for key, values in entry.each.items():
        twice = [value for value, times in Counter(values).items() if times > 1]
        if twice:
            message = f"{', '.join(twice)} stands there more than once"
            found.append(Problem(f"{field}.each.{key}", message, "name each once"))
        if not any(f"{{{key}}}" in word for word in (*entry.run, *entry.needs)):
            fix = f"write {{{key}}} where it belongs, or leave {key} out"
            found.append(Problem(f"{field}.each.{key}", "nothing uses it", fix, rests_on))
    for part, allowed in (("run", keys), (NEEDS, list(entry.each))):
        for word in getattr(entry, part):
            for place in _PLACE.findall(word):
                if place not in allowed:
                    fix = nearest(place, allowed) or f"there are: {', '.join(allowed) or 'none'}"
                    message = f"nothing is called {{{place}}} here"
                    found.append(Problem(f"{field}.{part}", message, fix, rests_on))
    if any(f"{{{NEEDS}}}" in word and word != f"{{{NEEDS}}}" for word in entry.run):
        message = f"{{{NEEDS}}} is a part of an argument"
        found.append(Problem(f"{field}.run", message, "it stands for several: write it alone"))
    if f"{{{NEEDS}}}" in entry.run and not entry.needs:
        message = f"{{{NEEDS}}}, but nothing is needed"
        found.append(Problem(f"{field}.run", message, "name the jobs with needs", rests_on))
    if entry.gpus > 1 and entry.gpus != int(entry.gpus):
        message = f"{entry.gpus:g} is neither whole nor a part of one"
        found.append(Problem(f"{field}.gpus", message, "e.g. 0.5, 1 or 2"))
    return found


def jobs(fleet: Fleet) -> list[Planned]:
    """Return a fleet's jobs, every one after those that it needs."""
    found = {job.name: job for job in _resolved(fleet)}
    order = TopologicalSorter({name: job.needs for name, job in found.items()})
    return [found[name] for name in order.static_order()]


def _resolved(fleet: Fleet) -> list[Planned]:
    """Return the jobs, with entries among their needs replaced by the entries' jobs."""
    drawn = _draw(fleet)
    of_entry = {name: [job.name for job in drawn if job.entry == name] for name in fleet.jobs}
    return [
        replace(job, needs=tuple(dict.fromkeys(n for e in job.needs for n in of_entry.get(e, [e]))))
        for job in drawn
    ]


def _draw(fleet: Fleet) -> list[Planned]:
    """Return one job for each combination of an entry's values."""
    found: list[Planned] = []
    for name, entry in fleet.jobs.items():
        for values in itertools.product(*entry.each.values()):
            given = dict(zip(entry.each, values, strict=True))
            run, needs = ([_fill(w, given) for w in words] for words in (entry.run, entry.needs))
            called = "-".join([name, *values])
            found.append(Planned(called, name, tuple(run), tuple(needs), entry))
    return found


def _fill(word: str, given: Mapping[str, str]) -> str:
    return _PLACE.sub(lambda match: given.get(match[1], match[0]), word)
