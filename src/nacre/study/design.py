"""A study as data: arms, seeds, budgets, and the claims that it is to decide.

An arm is a plan. The study's own `plan` holds what all arms share, each arm what is its own. A run
is one arm with one seed at one budget; a budget multiplies the tokens of every stage of the plan.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, PositiveFloat, PositiveInt

from nacre.config import Section, override, read_yaml, validate
from nacre.errors import ConfigError, Problem, nearest
from nacre.growth import plan as plans
from nacre.growth.plan import Plan, Seed

Name = Annotated[str, Field(pattern=r"^\w[\w.-]*$")]
ArmName = Annotated[str, Field(pattern=r"^\w[\w-]*$")]  # without a dot: a study's files have one
Budget = Annotated[float, Field(gt=0, le=10**9)]
Budgets = Annotated[tuple[Budget, ...], Field(min_length=1)]
Axis = Literal["tokens", "flops", "seconds"]
Measure = Literal["bits_per_byte", "loss", "peak_memory_bytes", "active_parameters"]


class Claim(Section):
    """That an arm's `measure` is at most `at_most` times that of another.

    A loss is compared at equal `at`: the other arm's curve over its budgets is read there. Peak
    memory and active parameters are those of the runs themselves.
    """

    arm: str
    against: str | None = Field(default=None, description="another arm; default: the baseline")
    measure: Measure = "bits_per_byte"
    at: Axis = "tokens"
    at_most: PositiveFloat = 1.0
    budget: Budget | None = Field(default=None, description="default: the arm's largest")


class Evaluation(Section):
    """What `nacre eval` is to score at every stage of every run, when all are done."""

    tasks: tuple[str, ...] = ()
    data: str | None = None
    data_dir: str | None = None
    limit: PositiveInt | None = None


class Study(Section):
    """Arms x seeds x budgets, and what is to be decided."""

    name: Name = "study"
    about: str = Field(default="", description="what is asked, in a sentence or two")
    seeds: Annotated[tuple[Seed, ...], Field(min_length=1)] = (0,)
    budgets: Budgets = (1.0,)
    baseline: str
    plan: dict[str, Any] = Field(default={}, description="what the plans of all arms share")
    arms: Annotated[dict[ArmName, dict[str, Any]], Field(min_length=2)]
    claims: tuple[Claim, ...] = ()
    evaluate: Evaluation | None = None

    def budgets_of(self, arm: str) -> tuple[float, ...]:
        """Return an arm's budgets, ascending."""
        own = self._arm(arm).budgets
        return tuple(sorted(self.budgets if own is None else own))

    def _arm(self, arm: str) -> _Arm:
        own = {key: value for key, value in self.arms[arm].items() if key in _Arm.model_fields}
        return validate(_Arm, own, where=f"arms.{arm}")

    def plan_of(self, arm: str, seed: int, budget: float = 1.0) -> Plan:
        """Return the plan of one run. Raises `ConfigError` for what is no plan."""
        own = {k: v for k, v in self.arms[arm].items() if k not in _Arm.model_fields}
        data = _merged(self.plan, own) | {"name": arm, "seed": seed}
        plan = plans.parse(data, where=f"arms.{arm}")
        return plan if budget == 1 else plans.parse(_scaled(plan, budget), where=f"arms.{arm}")

    def runs(self, out: Path) -> list[Run]:
        """Return every run in the order in which they are made: seed by seed, all arms in turn."""
        return [
            Run(arm, seed, budget, self.plan_of(arm, seed, budget),
                out / arm / f"x{budget:g}" / f"seed-{seed}")
            for seed in self.seeds
            for arm in self.arms
            for budget in self.budgets_of(arm)
        ]  # fmt: skip


@dataclass(frozen=True)
class Run:
    """One arm, one seed, one budget: a plan, and the folder that it grows in."""

    arm: str
    seed: int
    budget: float
    plan: Plan
    folder: Path

    @property
    def tokens(self) -> int:
        """The tokens of all stages."""
        return sum(stage.tokens for stage in self.plan.stages)


def _merged(shared: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return two nested mappings as one; where both have a value, `own` wins."""
    result = dict(shared)
    for key, value in own.items():
        old = result.get(key)
        if isinstance(old, Mapping) and isinstance(value, Mapping):
            value = _merged(old, value)
        result[key] = value
    return result


def _scaled(plan: Plan, budget: float) -> dict[str, Any]:
    """Return a plan's data with every stage's tokens times `budget`, one batch at least."""
    data = plan.model_dump(mode="json", by_alias=True)
    for stage in data["stages"]:
        stage["tokens"] = max(plan.training.batch_tokens, round(stage["tokens"] * budget))
    return data


def load(source: str | Path, settings: Sequence[str] = ()) -> Study:
    """Read a study from a YAML file or, by its name, from the recipes; apply `KEY=VALUE` settings.

    Raises `ConfigError` with every problem of the study and of its plans at once.
    """
    data = read_yaml(plans.find(source, "study", "studies"))
    if isinstance(data.get("plan"), str):
        data["plan"] = plans.load(data["plan"]).model_dump(mode="json", by_alias=True)
    return parse(override(data, settings), where=str(source))


def parse(data: Mapping[str, Any], where: str = "study") -> Study:
    """Build a study from plain data. Raises `ConfigError` with every problem at once."""
    study = validate(Study, data, where=where)
    found = problems(study)
    if found:
        raise ConfigError(found, where)
    return study


def problems(study: Study) -> list[Problem]:
    """Return what keeps a study from being run, or its arms from being compared."""
    found: list[Problem] = []
    twice = [seed for seed, count in Counter(study.seeds).items() if count > 1]
    if twice:
        message = f"{', '.join(map(str, twice))} stands there more than once"
        found.append(Problem("seeds", message, "equal seeds give equal runs: name each once"))
    found += _overwritten(study)
    found += [
        Problem(field, f"there is no arm {name!r}", nearest(name, study.arms) or _listed(study))
        for field, name in _named_arms(study)
        if name not in study.arms
    ]
    for arm in study.arms:
        try:
            found += _equal_budgets(study, arm)
            study.plan_of(arm, study.seeds[0])
        except ConfigError as error:
            found += [Problem(f"arms.{arm}.{p.field}", p.message, p.fix) for p in error.problems]
    if not found:
        found += _incomparable(study)
        found += _impossible_budgets(study)
    return found


def _overwritten(study: Study) -> list[Problem]:
    """Return seeds that would be overwritten by the study's."""
    parts = {"plan": study.plan} | {f"arms.{name}": arm for name, arm in study.arms.items()}
    return [
        Problem(f"{where}.seed", "a study has seeds of its own", "leave it out")
        for where, part in parts.items()
        if part.get("seed")
    ]


class _Arm(Section):
    """What an arm says besides its plan."""

    about: str = Field(default="", description="what is tried, in a few words")
    budgets: Budgets | None = Field(default=None, description="default: the study's")


def _equal_budgets(study: Study, arm: str) -> list[Problem]:
    written = [f"{budget:g}" for budget in study.budgets_of(arm)]
    twice = [text for text, times in Counter(written).items() if times > 1]
    if not twice:
        return []
    message = f"{', '.join(twice)} stands there more than once"
    return [Problem(f"arms.{arm}.budgets", message, "name each once, to six digits")]


def _named_arms(study: Study) -> list[tuple[str, str]]:
    named = [("baseline", study.baseline)]
    for index, claim in enumerate(study.claims):
        named.append((f"claims[{index}].arm", claim.arm))
        if claim.against is not None:
            named.append((f"claims[{index}].against", claim.against))
    return named


def _listed(study: Study) -> str:
    return f"arms: {', '.join(study.arms)}"


def _incomparable(study: Study) -> list[Problem]:
    """Return in what arms differ that makes their held-out losses numbers of different texts."""
    reference = study.plan_of(study.baseline, study.seeds[0])
    found: list[Problem] = []
    for arm in study.arms:
        plan = study.plan_of(arm, study.seeds[0])
        for field, of in _HELD_OUT.items():
            if of(plan) != of(reference):
                message = f"{of(plan)}, but the baseline has {of(reference)}"
                fix = "arms are compared on one held-out text: make them equal"
                found.append(Problem(f"arms.{arm}.{field}", message, fix))
        found += _read_early(arm, plan)
        if _tokenizer(plan) != _tokenizer(reference):
            losses = [c for c in study.claims if c.measure == "loss" and arm in (c.arm, c.against)]
            message = "another tokenizer than the baseline's"
            if losses:
                fix = "claims about it need measure: bits_per_byte"
                found.append(Problem(f"arms.{arm}.tokenizer", f"{message}: loss is of tokens", fix))
            if study.evaluate is None or study.evaluate.data is None:
                fix = "name a folder of texts with evaluate.data: bits per byte are compared there"
                message += ", whose validation_tokens are another text"
                found.append(Problem(f"arms.{arm}.tokenizer", message, fix))
    return found


_HELD_OUT = {
    "data.sources": lambda plan: list(plan.sources_of(plan.stages[-1])),
    "data.holdout": lambda plan: plan.data.holdout,
    "data.errors": lambda plan: plan.data.errors,
    "model.context": lambda plan: plan.model.context,
    "training.validation_tokens": lambda plan: plan.training.validation_tokens,
}
"""What decides the text that the last stage's held-out loss is of."""


def _tokenizer(plan: Plan) -> tuple[Any, ...]:
    """Return what decides a plan's tokenizer: a path, or size, alphabet and text to learn from."""
    given = plan.tokenizer.path or plan.start_from
    return (given,) if given else (plan.tokenizer, sorted(_all_sources(plan)))


def _all_sources(plan: Plan) -> set[str]:
    return {source for stage in plan.stages for source in plan.sources_of(stage)}


def _read_early(arm: str, plan: Plan) -> list[Problem]:
    """Return stages that could train on text which the last one holds out.

    What is held out depends on all sources of a stage together: of the same text in another mix it
    is another part.
    """
    last = set(plan.sources_of(plan.stages[-1]))
    found: list[Problem] = []
    for index, stage in enumerate(plan.stages):
        here = set(plan.sources_of(stage))
        if here != last and here & last:
            message = f"{', '.join(sorted(here & last))} is read in another mix than at the end"
            fix = "what is held out at the end could be trained on: read all of the mix or none"
            found.append(Problem(f"arms.{arm}.stages[{index}].sources", message, fix))
    return found


def _impossible_budgets(study: Study) -> list[Problem]:
    found: list[Problem] = []
    for index, claim in enumerate(study.claims):
        known = study.budgets_of(claim.arm)
        if claim.budget is not None and claim.budget not in known:
            listed = ", ".join(f"{budget:g}" for budget in known)
            message = f"{claim.budget:g}, but {claim.arm} has {listed}"
            found.append(Problem(f"claims[{index}].budget", message, "name one of those"))
    return found
