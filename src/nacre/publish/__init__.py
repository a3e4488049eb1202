"""To the hub and back: stages, compositions, substrates, tokenizers.

What goes up is what the thing is made of, with a card that is made from its ledger; never a run's
state, cache, tokens or logs. `main` is the stage that was chosen, every stage has a branch of its
own if asked for; a shard that stages share is sent once.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacre import composition, hub
from nacre import tokenizer as tokenizers
from nacre.errors import ConfigError, Problem
from nacre.folders import PLAN, STAGE
from nacre.publish import cards
from nacre.substrate import Substrate
from nacre.substrate.table import ABOUT, ROWS
from nacre.train import checkpoint
from nacre.train.files import read_record, stages

ALL = "all"
CARD = "README.md"
SUFFIXES = (".safetensors", ".json", ".txt", ".model", ".jinja", ".py")
OF_A_RUN = ("state", "state.previous", "cache", "data", "logs", "trackers", "report")


@dataclass(frozen=True)
class Kind:
    """What a folder may be: by which files it is known, and what makes its card."""

    name: str
    files: tuple[str, ...]
    card: Callable[[Path, str, str | None], str]


KINDS = (
    Kind("composition", (composition.RECORD, "config.json"), cards.composed_card),
    Kind("stage", (STAGE, "config.json"), cards.stage_card),
    Kind("substrate", (ABOUT, ROWS), cards.substrate_card),
    Kind("tokenizer", ("tokenizer.json", "tokenizer_config.json"), cards.tokenizer_card),
)
"""In the order in which a folder is asked what it is."""


def push_to_hub(
    source: str | Path,
    name: str,
    *,
    private: bool = False,
    stage: int | str | None = None,
    licence: str | None = None,
) -> dict[str, Any]:
    """Send a stage, a bundled composition, a substrate or a tokenizer to the hub's `name`.

    A run means its newest stage, or number `stage`; with "all" the newest goes to `main` and each
    stage also to its branch `stage-01`, `stage-02` and so on. `licence` is an identifier of the
    hub ("apache-2.0"). Returns `name`, `kind` and `revisions`: the files of each. Raises
    ConfigError for what cannot be sent, CheckpointError and FingerprintError for what is damaged,
    and `HubError` of one line for what the hub or the way to it refuses.
    """
    name = name.removeprefix(hub.PREFIX)
    if name.count("/") != 1:
        raise ConfigError(Problem("--to", f"{name!r} is no name on the hub", "give USER/NAME"))
    chosen = _revisions(Path(source), stage)
    kind = _kind(chosen[None])
    prepared = {
        branch: _files(kind, path, name, branch, licence) for branch, path in chosen.items()
    }
    hub.check_login()
    for branch, files in prepared.items():
        message = f"{kind.name} {chosen[branch].name}"
        hub.send(name, files, message, private=private, branch=branch)
    revisions = {branch or "main": sorted(files) for branch, files in prepared.items()}
    return {"name": name, "kind": kind.name, "revisions": revisions}


def from_pretrained(name: str | Path, *, revision: str | None = None) -> Any:
    """Load what `push_to_hub` sent, or a folder: a model, a Substrate or a tokenizer.

    A stage is the model of transformers that it is, in fp32, a composition a `ComposedForCausalLM`;
    no code from the hub is run. `revision` is a branch (`stage-01`), tag or commit. Raises
    `HubError` of one line, ConfigError for what nacre did not send, and what loading raises.
    """
    place = Path(name)
    if not place.is_dir():
        place = hub.fetch_whole(str(name), revision)
    elif revision is not None:
        message = f"{name} is a folder, which has no revisions"
        raise ConfigError(Problem("revision", message, "leave it out"))
    return {
        "composition": composition.load,
        "stage": checkpoint.load_model,
        "substrate": Substrate.load,
        "tokenizer": tokenizers.load,
    }[_kind(place, str(name)).name](place)


def _revisions(source: Path, stage: int | str | None) -> dict[str | None, Path]:
    """Return the folders to send, by branch; None is main."""
    if not source.is_dir():
        message = f"there is no folder {source}"
        raise ConfigError(Problem("SOURCE", message, "name a run, a stage or a composition"))
    if not (source / PLAN).is_file():
        if stage is not None:
            message = f"{source} is no run"
            raise ConfigError(Problem("--stage", message, "leave it out"))
        return {None: source}
    if stage is None:
        return {None: Path(checkpoint.newest(source))}
    newest, done = Path(checkpoint.newest(source)), stages(source)
    if stage == ALL:
        return {**{f"stage-{path.name}": path for path in done}, None: newest}
    if str(stage) not in map(str, range(1, len(done) + 1)):
        fix = f"1 to {len(done)}, or {ALL}"
        raise ConfigError(Problem("--stage", f"{source} has no finished stage {stage}", fix))
    return {None: done[int(stage) - 1]}


def _kind(place: Path, name: str | None = None) -> Kind:
    for kind in KINDS:
        if all((place / file).is_file() for file in kind.files):
            return kind
    message = f"{name or place} holds no stage, composition, substrate or tokenizer of nacre"
    raise ConfigError(Problem("SOURCE", message, "name one, or a run"))


def _files(
    kind: Kind, place: Path, name: str, branch: str | None, licence: str | None
) -> Mapping[str, Path | bytes]:
    """Return what goes up, by name, with its card; raise if it is not whole."""
    if kind.name == "composition":
        if not composition.read_record(place)["bundled"]:
            message = f"the experts of {place} are not in it"
            raise ConfigError(Problem("SOURCE", message, "compose it with --bundle"))
        composition.verify(place)
    if kind.name == "stage":
        checkpoint.load_config(place)
        if read_record(place)["stage"] == 0:
            message = f"{place} is the checkpoint that was grown from, not grown by nacre"
            raise ConfigError(Problem("SOURCE", message, "name a stage"))
    load = f'"{name}"' if branch is None else f'"{name}", revision="{branch}"'
    files: dict[str, Path | bytes] = {
        path.relative_to(place).as_posix(): path
        for path in sorted(place.rglob("*"))
        if path.is_file() and _goes_up(path.relative_to(place))
    }
    return files | {CARD: kind.card(place, load, licence).encode()}


def _goes_up(path: Path) -> bool:
    hidden = any(part.startswith(".") for part in path.parts)
    return path.suffix in SUFFIXES and path.parts[0] not in OF_A_RUN and not hidden
