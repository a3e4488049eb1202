"""Experts as far as they are known without their weights: read, named, compared.

What is read is `config.json`, `stage.json` and the tokenizer's files.
"""

from __future__ import annotations

import itertools
import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel

from nacre import folders, hub
from nacre import tokenizer as tokenizers
from nacre.errors import CheckpointError, ConfigError, FingerprintError, Problem, one_line
from nacre.growth import ledger
from nacre.models import stock
from nacre.tokenizer_files import DEFINITION
from nacre.train import checkpoint, files, foreign
from nacre.untrusted import is_path

RECORD = folders.COMPOSITION
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
WITHOUT_EFFECT = (
    "_name_or_path", "architectures", "transformers_version", "dtype", "torch_dtype", "use_cache",
    "vocab_size", "tie_word_embeddings", *SPECIAL,
)  # fmt: skip
"""Fields of a configuration that do not change what a block computes."""


@dataclass(frozen=True)
class Expert:
    """A checkpoint as far as it is known without its weights.

    `record` is its `stage.json`, empty for a folder that nacre did not grow; `tokenizer` the
    fingerprint of its tokenizer.
    """

    name: str
    path: Path
    config: PreTrainedConfig
    record: Mapping[str, Any]
    tokenizer: str

    @property
    def fingerprint(self) -> str | None:
        """The stage's fingerprint; None for a folder that nacre did not grow."""
        return self.record.get("fingerprint")

    @property
    def context(self) -> int | None:
        """The most positions it can read, if its config says so."""
        return stock.positions(self.config)

    @cached_property
    def layout(self) -> Layout:
        """Sizes and hashes of its parts; raises `CheckpointError` for a model without blocks."""
        return _layout(self)


@dataclass(frozen=True)
class Layout:
    """Parameters in all, in the embedding, in each block; `parts` as `ComposedConfig` has them."""

    parameters: int
    embedding: int
    blocks: tuple[int, ...]
    parts: tuple[str, ...]


def is_composition(folder: str | Path) -> bool:
    """Tell whether a folder holds what `compose` wrote."""
    return (Path(folder) / RECORD).is_file()


def read_experts(
    paths: Sequence[str | Path], names: Sequence[str] | None, taken: Sequence[str] = ()
) -> list[Expert]:
    """Read configuration, record and tokenizer of every expert; no weights."""
    folders = [checkpoint.newest_folder(path).resolve() for path in paths]
    names = _default_names(paths, folders, taken) if names is None else names
    _check_names(names, len(folders), taken)
    fingerprints: dict[bytes, str] = {}
    experts: list[Expert] = []
    for name, folder in zip(names, folders, strict=True):
        if is_composition(folder):
            fix = "name its experts instead, or use --add"
            raise ConfigError(Problem("experts", f"{folder} is a composition itself", fix))
        config = checkpoint.load_config(folder)
        staged = (folder / files.RECORD).is_file()
        record = files.read_record(folder) if staged else {}
        checkpoint.check_has_weights(folder)
        tokenizer = _tokenizer(folder, fingerprints)
        checkpoint.check_tokenizer(folder, tokenizer)
        experts.append(Expert(name, folder, config, record, tokenizer))
    refuse_twins(experts)
    return experts


def _default_names(
    paths: Sequence[str | Path], folders: Sequence[Path], taken: Sequence[str]
) -> list[str]:
    """Return the names of the runs' folders or of what is on the hub, numbered where two agree."""
    bases = [
        (named.parent.parent if named.parent.name == "stages" else named).name or "expert"
        for path, folder in zip(paths, folders, strict=True)
        for named in [Path(path) if str(path).startswith(hub.PREFIX) else folder]
    ]
    often = Counter([*bases, *taken])
    names: list[str] = []
    for base in bases:
        numbered = (f"{base}-{number}" for number in itertools.count(1))
        free = (name for name in numbered if name not in (*names, *taken, *bases))
        names.append(base if often[base] == 1 else next(free))
    return names


def is_name(name: str) -> bool:
    """Tell whether an expert can be called by a name: it is that of its folder in a bundle."""
    return is_path(name) and not name.startswith(".") and not set(name) & set("/\\:")


def _check_names(names: Sequence[str], experts: int, taken: Sequence[str]) -> None:
    problems: list[Problem] = []
    if len(names) != experts:
        message = f"{len(names)} names for {experts} experts"
        problems.append(Problem("--name", message, "give one for each, in order, or none"))
    for name, times in Counter([*names, *taken]).items():
        if times > 1:
            problems.append(Problem("--name", f"{name!r} is there twice", "names must differ"))
        if not is_name(name):
            message = f"{name!r} cannot be the name of a folder"
            problems.append(Problem("--name", message, "use letters, digits, - and _"))
    if problems:
        raise ConfigError(problems)


def _tokenizer(folder: Path, known: dict[bytes, str]) -> str:
    """Return the fingerprint of a folder's tokenizer; definitions that are equal are read once."""
    definition, settings = folder / DEFINITION, folder / "tokenizer_config.json"
    if not definition.is_file():  # it is made from other files: vocab.json, tokenizer.model
        return tokenizers.fingerprint(tokenizers.load(folder))
    content = definition.read_bytes() + b"\0"
    content += settings.read_bytes() if settings.is_file() else b""
    if content not in known:
        known[content] = tokenizers.fingerprint(tokenizers.load(folder))
    return known[content]


def refuse_twins(experts: Sequence[Expert]) -> None:
    """Raise ConfigError if an expert is there twice: one folder, or one fingerprint."""
    for one, other in itertools.combinations(experts, 2):
        same = one.fingerprint is not None and one.fingerprint == other.fingerprint
        if same or one.path == other.path:
            message = f"{one.path} and {other.path} are the same expert"
            raise ConfigError(Problem("experts", message, "name each expert once"))


def check_agreement(experts: Sequence[Expert]) -> None:
    """Refuse experts whose tokenizers, vocabulary sizes or special tokens differ."""
    first, *others = experts
    for other in others:
        if other.tokenizer != first.tokenizer:
            fix = (
                f"experts need one vocabulary in one order: grow both with --tokenizer {first.path}"
            )
            raise FingerprintError(
                f"the tokenizer of {other.path}", f"{first.tokenizer[:12]} ({first.path})",
                other.tokenizer[:12], fix,
            )  # fmt: skip
    problems: list[Problem] = []
    for other in others:
        for name in ("vocab_size", *SPECIAL):
            mine, theirs = field(first, name), field(other, name)
            if mine != theirs and (name == "vocab_size" or None not in (mine, theirs)):
                message = f"{mine} in {first.path}, {theirs} in {other.path}"
                fix = "experts need one vocabulary: mend the config.json that is wrong"
                problems.append(Problem(name, message, fix))
    for expert in experts:
        if expert.context is None:
            message = f"the config.json of {expert.path} does not say it"
            problems.append(Problem("max_position_embeddings", message, "add it there"))
    if problems:
        raise ConfigError(problems)


def field(expert: Expert, name: str) -> Any:
    """Return a field of the expert's configuration, None if it has no such field."""
    return getattr(expert.config.get_text_config(), name, None)


def shared_parts(experts: Sequence[Expert]) -> list[dict[str, Any]]:
    """Return which blocks are shared by whom, from the bottom up, and what that saves.

    Each entry has the `experts`' names, `blocks` [first, after the last] and `parameters_saved`,
    the embedding counted with the lowest blocks.
    """

    def walk(group: Sequence[Expert], start: int) -> Iterator[dict[str, Any]]:
        by_part: dict[tuple[str, str], list[Expert]] = {}
        for expert in group:
            parts = expert.layout.parts
            if start + 1 < len(parts):
                by_part.setdefault((parts[0], parts[start + 1]), []).append(expert)
        for same in by_part.values():
            if len(same) == 1:
                continue
            columns = zip(*(expert.layout.parts[start + 1 :] for expert in same), strict=False)
            alike = itertools.takewhile(lambda column: len(set(column)) == 1, columns)
            stop = start + sum(1 for _ in alike)
            first = same[0].layout
            once = sum(first.blocks[start:stop]) + (0 if start else first.embedding)
            yield {
                "experts": [expert.name for expert in same],
                "blocks": [start, stop],
                "parameters_saved": (len(same) - 1) * once,
            }
            yield from walk(same, stop)

    return list(walk(experts, 0))


def _layout(expert: Expert) -> Layout:
    try:
        model = foreign.empty(expert.config)
        parts = stock.find_parts(model)
    except Exception as error:  # transformers raises about anything for a strange configuration
        raise CheckpointError(f"{expert.path}: cannot be composed: {one_line(error)}") from None
    hashes = {**expert.record.get("frozen", {}), **expert.record.get("weights", {})}
    return Layout(
        parameters=sum(p.numel() for p in model.parameters()),
        embedding=parts.embedding.weight.numel(),
        blocks=tuple(sum(p.numel() for p in block.parameters()) for block in parts.blocks),
        parts=_part_hashes(model, parts, hashes),
    )


def _part_hashes(
    model: PreTrainedModel, parts: stock.Parts, hashes: Mapping[str, str]
) -> tuple[str, ...]:
    """Return one hash for the embedding and one a block: equal hashes are equal functions.

    A block's hash covers its tensors, by their names inside it, and the configuration it computes
    by. Empty if the ledger does not have every tensor, or the decoder has more of them than its
    embedding, blocks, norm and head (learned positions): such a model runs whole.
    """
    state = model.state_dict()
    known = (parts.embedding, parts.blocks, parts.norm, parts.head)
    inside = {id(p) for part in known if part is not None for p in part.parameters()}
    if any(id(p) not in inside for p in model.parameters()):
        return ()
    embedding = f"{parts.embedding_name}.weight"
    blocks: list[dict[str, str]] = [{} for _ in parts.blocks]
    for name in state:
        index = stock.block_index(parts, name)
        if (index is not None or name == embedding) and name not in hashes:
            return ()
        if index is not None:
            blocks[index][name.removeprefix(f"{parts.blocks_name}.{index}.")] = hashes[name]
    config = model.config.get_text_config()
    return (
        ledger.fingerprint({"embedding": hashes[embedding]}),
        *(
            ledger.fingerprint({**block, " config": _computes(config, index)})
            for index, block in enumerate(blocks)
        ),
    )


def _computes(config: PreTrainedConfig, index: int) -> str:
    """Return as JSON what of a configuration decides how block `index` computes."""
    depth = (config.attribute_map or {}).get("num_hidden_layers", "num_hidden_layers")
    fields = {
        key: value
        for key, value in config.to_dict().items()
        if key not in WITHOUT_EFFECT and key != depth
    }
    for key in stock.PER_BLOCK:
        if fields.get(key):
            fields[key] = fields[key][index]
    return json.dumps(fields, sort_keys=True, default=str)
