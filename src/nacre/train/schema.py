"""What the JSON files of runs and checkpoints must hold before anything reads them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from nacre.errors import CheckpointError

Number = Annotated[int, Field(ge=0, lt=2**63)]
Blocks = Annotated[int, Field(ge=0, lt=2**16)]
Pair = Annotated[list[float], Field(min_length=2, max_length=2)]


class Shape(BaseModel):
    """Fields and their kinds; nothing is converted, other fields may be there."""

    model_config = ConfigDict(extra="allow", strict=True, protected_namespaces=())


class HeldOut(Shape):
    """Of a stage's `validation`."""

    loss: float
    perplexity: float
    bits_per_byte: float


class Record(Shape):
    """`stage.json` of a stage, and of a checkpoint that a run was grown from."""

    stage: Number
    frozen: dict[str, str]
    weights: dict[str, str]
    growth: list[Annotated[list[Blocks], Field(min_length=2, max_length=2)]]
    fingerprint: str
    parent: str | None = None
    substrate: str | None = None
    tokenizer: str = ""
    corpus: str = ""
    cursor: dict[str, int | str] | None = None
    validation: HeldOut | None = None
    trunk: dict[str, Any] | None = None
    history: list[Pair] = []


class Certificate(Shape):
    """What merging the adapters changed."""

    adapters: Number
    largest_logit_difference: float
    loss_difference: float


class Merged(Shape):
    """Low-rank adapters that a stage trained and merged."""

    rank: Number
    merge: Certificate


class StageRecord(Record):
    """`stage.json` of a stage that a run trained, as reports read it."""

    depth: Blocks
    new_blocks: Blocks
    active_parameters: Number
    total_parameters: Number
    tokens: Annotated[int, Field(gt=0, lt=2**63)]
    seconds: float
    tokens_per_second: float
    peak_memory_bytes: Number
    trunk_mode: str
    trainable: list[str]
    lora: Merged | None
    train: str = "crown"
    under: Blocks = 0
    parent: str | None  # pyright: ignore[reportGeneralTypeIssues]
    validation: HeldOut  # pyright: ignore[reportGeneralTypeIssues]


class CostedRecord(StageRecord):
    """The same, as studies compare it."""

    flops: float
    tokenizer: str  # pyright: ignore[reportGeneralTypeIssues]
    corpus: str  # pyright: ignore[reportGeneralTypeIssues]


class Step(Shape):
    """What every line of `metrics.jsonl` says: where it stands."""

    stage: Annotated[int, Field(gt=0, lt=2**31)]
    step: Number


class MetricLine(Step):
    """A line of `metrics.jsonl`, a step or an evaluation, as reports and studies read it."""

    tokens: Number
    loss: float = 0.0
    tokens_per_second: Annotated[float, Field(gt=0)] = 1.0
    validation: HeldOut | None = None


class Base(Shape):
    """A checkpoint of nacre's that a run grows: as its plan names it, and which that was."""

    named: str
    path: str
    fingerprint: str


class Fingerprints(Shape):
    """Of the parts that a run stands on."""

    tokenizer: str | None = None
    substrate: str | None = None
    base: Base | None = None
    corpora: dict[str, str] = {}


class Made(Shape):
    """On what a run was made, or a part of it."""

    machine: dict[str, Any] = {}
    versions: dict[str, str] = {}


class Run(Made):
    """`run.json`."""

    fingerprints: Fingerprints = Fingerprints()
    earlier: list[Made] = []


class Progress(Shape):
    """`progress.json` of a saved state."""

    stage: Number
    step: Number
    tokens: Number
    seconds: float
    best: float | None
    stale: Number
    cursor: dict[str, int | str] | None
    peak_memory_bytes: Number
    history: list[Pair]
    end: Number | None
    skipped: Number
    processes: Number
    sha256: dict[str, str]


def fits(data: Any, kind: type[BaseModel]) -> bool:
    """Say whether data is of a kind."""
    try:
        kind.model_validate(data)
    except ValidationError:
        return False
    return True


def check(path: Path, data: Mapping[str, Any], kind: type[BaseModel]) -> None:
    """Raise CheckpointError, with the first field that is wrong, unless data is of a kind."""
    try:
        kind.model_validate(data)
    except ValidationError as error:
        raise CheckpointError(f"{path}: damaged: {_first(error.errors())}") from None


def _first(problems: Sequence[Any]) -> str:
    problem = problems[0]
    field = ".".join(map(str, problem["loc"]))[:100]
    if problem["type"] == "missing":
        return f"lacks {field!r}"
    return f"{field!r}: {problem['msg'][0].lower()}{problem['msg'][1:]}"
