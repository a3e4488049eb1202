"""What the files of a composition must say before its experts are looked at."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field

from nacre.composition.expert import RECORD, is_name
from nacre.errors import CheckpointError, one_line
from nacre.models.composed import ComposedConfig
from nacre.models.rules import Rule
from nacre.train import files, schema
from nacre.train.schema import Number, Pair, Shape
from nacre.untrusted import is_path

MOST_EXPERTS = 1024


class Reference(Shape):
    """An expert in `config.json`: its name, its place and what it must be."""

    name: str
    path: str
    fingerprint: str | None
    parts: list[str]


class Config(Shape):
    """`config.json`, as far as it is a composition's own."""

    model_type: str
    experts: list[Reference]
    mix: dict[str, Any]
    vocab_size: Number
    max_position_embeddings: Number


class Described(Shape):
    """An expert in the record."""

    name: str
    path: str
    fingerprint: str | None
    family: str
    depth: Number
    width: Number
    context: Number | None
    parameters: Number
    stage: Number | None
    parent: str | None
    substrate: str | None
    corpus: str | None


class SharedBlocks(Shape):
    """What some experts share."""

    experts: list[str]
    blocks: Annotated[list[Number], Field(min_length=2, max_length=2)]
    parameters_saved: Number


class Scores(Shape):
    """Held-out text before or after training."""

    bits_per_byte: float


class Validation(Shape):
    """Of what was trained."""

    before: Scores
    after: Scores


class TrainedPart(Shape):
    """What was trained in the composition, and the hash of its file."""

    what: str
    parameters: Number
    tokens: Number
    seconds: float
    lr: float
    sources: list[str]
    validation: Validation
    sha256: str


class Compared(Shape):
    """A row of the report: the composition beside each expert alone, on some texts."""

    kind: str
    name: str
    documents: Number
    composition: float
    experts: dict[str, float]
    best: str
    difference: float
    interval: Pair | None
    outcome: Literal["better", "as good", "worse"]
    verdict: str


class ReportSettings(Shape):
    """How the texts of the report were read, in tokens."""

    context: Number
    stride: Number


class Report(Shape):
    """Who lost what."""

    texts: str
    settings: ReportSettings
    rows: Annotated[list[Compared], Field(min_length=1)]


class Record(Shape):
    """`composition.json`."""

    mix: dict[str, Any]
    experts: list[Described]
    bundled: bool
    tokenizer: str
    vocabulary: Number
    context: Number
    parameters: Number
    parameters_saved: Number
    shared: list[SharedBlocks]
    notes: list[str]
    trained: TrainedPart | None = None
    report: Report | None = None


def read_config(folder: Path) -> dict[str, Any]:
    """Return a composition's `config.json`; raise CheckpointError for one that is damaged."""
    path = folder / "config.json"
    config = files.read_shaped(path, Config)
    if config["model_type"] != ComposedConfig.model_type:
        raise CheckpointError(f"{path}: damaged: it is no composition's")
    _check_experts(path, config)
    return config


def read_record(folder: Path) -> dict[str, Any]:
    """Return a composition's record; raise CheckpointError for one that is damaged.

    Its report must be of its experts, and a bundle's experts in its folder.
    """
    path = folder / RECORD
    record = files.read_json(path)
    try:
        schema.check(path, record, Record)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; compose again") from None
    _check_experts(path, record)
    names = {expert["name"] for expert in record["experts"]}
    if any(row["experts"].keys() != names for row in (record.get("report") or {}).get("rows", [])):
        message = "its report is of other experts"
        raise CheckpointError(f"{path}: damaged: {message}; compose again")
    if record["bundled"]:
        for expert in record["experts"]:
            if expert["path"] != f"experts/{expert['name']}":
                message = f"it is a bundle, but {expert['name']!r} is in {expert['path']!r}"
                raise CheckpointError(f"{path}: damaged: {message}; compose again")
    return record


def check_same(folder: Path, config: dict[str, Any], record: dict[str, Any]) -> None:
    """Raise CheckpointError unless config and record name the same experts, and the same rule."""
    keys = ("name", "path", "fingerprint")
    one, other = ([[e[key] for key in keys] for e in part["experts"]] for part in (config, record))
    if one != other or config["mix"] != record["mix"]:
        message = f"config.json and {RECORD} do not say the same"
        raise CheckpointError(f"{folder}: damaged: {message}; compose again")


def _check_experts(path: Path, data: dict[str, Any]) -> None:
    """Raise CheckpointError for names and places that are none, and a rule that does not fit."""
    experts = data["experts"]
    if len(experts) > MOST_EXPERTS:
        message = f"{len(experts):,} experts, at most {MOST_EXPERTS:,} are read"
        raise CheckpointError(f"{path}: damaged: {message}")
    for expert in experts:
        name = expert["name"]
        if not is_name(name):
            raise CheckpointError(f"{path}: damaged: {name!r} is no name of an expert")
        if not is_path(expert["path"]):
            raise CheckpointError(f"{path}: damaged: {expert['path']!r} is no place of an expert")
    try:
        Rule.parse(data["mix"], len(experts))
    except ValueError as error:
        raise CheckpointError(f"{path}: damaged: mix: {one_line(error)}") from None
