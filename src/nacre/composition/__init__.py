"""Compositions on disk: what may be composed, what is written, what is loaded.

A composition's folder is a Hugging Face folder of the model type `nacre-composed`. It names its
experts (by reference) or holds them with the code that runs them (a bundle). Whether experts fit
together is decided from `config.json`, `stage.json` and the tokenizer's files; no weight is read
before a composition is loaded. Importing this module registers the classes, so that
`AutoModelForCausalLM` loads compositions.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nacre.composition import expert as reading
from nacre.composition.card import sharing
from nacre.composition.expert import RECORD, Expert, is_composition
from nacre.composition.folder import write
from nacre.errors import CheckpointError, ConfigError, FingerprintError, Problem, nearest
from nacre.models.composed import ComposedConfig, ComposedForCausalLM
from nacre.models.mixing import RULES, Rule
from nacre.train import checkpoint

__all__ = [
    "add",
    "compose",
    "is_composition",
    "load",
    "load_any",
    "make",
    "remove",
    "summary",
    "verify",
]


class CheckedComposition(ComposedForCausalLM):
    """A composition that refuses an expert which is no longer the recorded one."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> ComposedForCausalLM:
        """Load a folder after `verify`; the arguments are those of the class below."""
        folder = Path(pretrained_model_name_or_path)
        verify(folder)
        return super().from_pretrained(folder, *args, **kwargs)


AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoModelForCausalLM.register(ComposedConfig, CheckedComposition, exist_ok=True)


def compose(
    experts: Sequence[str | Path],
    out: str | Path,
    mix: str = "posterior",
    *,
    names: Sequence[str] | None = None,
    bundle: bool = False,
    **options: Any,
) -> dict[str, Any]:
    """Write a composition of `experts` (stages, runs, Hugging Face folders); return its record.

    `mix` is a rule of `mixing.RULES` and `options` are its options. `names` default to the names of
    the runs' folders. With `bundle` the folder holds the weights (hard links where the file system
    has them) and the code. Raises ConfigError, CheckpointError or FingerprintError before any
    weight is read.
    """
    return make(experts, out, mix, options, names=names, bundle=bundle)


def make(
    experts: Sequence[str | Path],
    out: str | Path,
    mix: str,
    options: Mapping[str, Any],
    *,
    names: Sequence[str] | None = None,
    bundle: bool = False,
) -> dict[str, Any]:
    """Do what `compose` does, with the rule's options as a mapping of any keys."""
    target = Path(out)
    problems = _rule_problems(mix, options, max(2, len(experts)))
    if len(experts) < 2:
        fix = "name two or more stages, runs or Hugging Face folders"
        problems.append(Problem("experts", f"{len(experts)} is too few", fix))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        problems.append(Problem("--out", f"{target} is not empty", "name a new folder"))
    if problems:
        raise ConfigError(problems)
    found = reading.read_experts(experts, names)
    reading.check_agreement(found)
    return write(target, found, Rule.parse({"name": mix, **options}, len(found)), bundle)


def add(new: str | Path, folder: str | Path, name: str | None = None) -> dict[str, Any]:
    """Add an expert to the composition in `folder`, in place; return the new record.

    The rule stays, less its numbers for each expert (the record's `notes` say so). Raises as
    `compose` does; the folder is then as it was.
    """
    target, record, known = _open(folder)
    taken = [expert.name for expert in known]
    experts = [*known, *reading.read_experts([new], None if name is None else [name], taken)]
    reading.refuse_twins(experts)
    reading.check_agreement(experts)
    rule, notes = _carried(record["mix"], len(experts))
    return write(target, experts, rule, record["bundled"], notes)


def remove(name: str, folder: str | Path) -> dict[str, Any]:
    """Remove an expert from the composition in `folder`, in place; return the new record.

    As `add`; a bundle loses the expert's folder, the expert's own checkpoint stays; it may be gone.
    Raises ConfigError for an unknown name or where fewer than two experts would be left.
    """
    target, record, experts = _open(folder, leaving=name)
    names = [expert["name"] for expert in record["experts"]]
    if name not in names:
        hint = nearest(name, names) or f"there are: {', '.join(names)}"
        raise ConfigError(Problem("--remove", f"{target} has no expert {name!r}", hint))
    if len(experts) < 2:
        fix = "use the other expert alone, or --add another one first"
        raise ConfigError(Problem("--remove", f"{target} would be left with one expert", fix))
    rule, notes = _carried(record["mix"], len(experts))
    return write(target, experts, rule, record["bundled"], notes)


def summary(record: Mapping[str, Any]) -> list[str]:
    """Return lines for people: the experts, what they share and what that saves, the notes."""
    names = ", ".join(expert["name"] for expert in record["experts"])
    options = ", ".join(f"{key} {value}" for key, value in record["mix"].items() if key != "name")
    rule = record["mix"]["name"] + (f" ({options})" if options else "")
    lines = [f"{names}: mixed by {rule}, {record['parameters']:,} parameters"]
    lines += [sharing(entry) for entry in record["shared"]]
    return [*lines, *(f"note: {note}" for note in record["notes"])]


def verify(folder: Path, leaving: str | None = None) -> None:
    """Check that every expert but `leaving` is where the composition says and is the recorded one.

    Reads no weights. Raises CheckpointError for one that is gone, FingerprintError for another.
    """
    for expert in checkpoint.read_json(folder / "config.json").get("experts", []):
        if expert["name"] == leaving:
            continue
        place, recorded = folder / expert["path"], expert["fingerprint"]
        if not (place / "config.json").is_file():
            fix = "move it back, or compose again from where it is"
            raise CheckpointError(f"{folder}: expert {expert['name']!r} is not in {place}; {fix}")
        if recorded is not None:
            found = checkpoint.read_record(place)["fingerprint"]
            if found != recorded:
                fix = f"it was changed after composing: restore {place}, or compose again"
                what = f"expert {expert['name']!r} of {folder}"
                raise FingerprintError(what, recorded[:12], found[:12], fix)


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> ComposedForCausalLM:
    """Load a composition with its experts in `dtype`.

    Raises CheckpointError for a folder without one or an expert that cannot be loaded,
    FingerprintError for an expert that is not the recorded one.
    """
    if not is_composition(folder):
        fix = "make one with `nacre compose`"
        raise CheckpointError(f"{folder}: holds no composition ({RECORD} is missing); {fix}")
    try:
        return CheckedComposition.from_pretrained(folder, dtype=dtype)
    except (OSError, ValueError, SafetensorError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise CheckpointError(f"{folder}: cannot be loaded: {reason}") from None


def load_any(folder: str | Path) -> PreTrainedModel:
    """Load a composition, a stage or any Hugging Face causal LM in fp32; raise as each does."""
    return load(folder) if is_composition(folder) else checkpoint.load_model(folder)


def _rule_problems(mix: str, options: Mapping[str, Any], experts: int) -> list[Problem]:
    """Return what is wrong with a rule and its options, for so many experts."""
    if mix not in RULES:
        hint = nearest(mix, RULES) or f"there are: {', '.join(RULES)}"
        return [Problem("--mix", f"{mix!r} is no rule", hint)]
    problems: list[Problem] = []
    has = RULES[mix]
    for key in [key for key in options if key not in has]:
        fix = nearest(key, has) or f"it has: {', '.join(has) or 'no options'}"
        problems.append(Problem(f"--set {key}", f"is no option of {mix}", fix))
    known = {key: value for key, value in options.items() if key in has}
    try:
        Rule.parse({"name": mix, **known}, experts)
    except ValueError as error:
        for line in str(error).splitlines():
            key, _, message = line.partition(": ")
            problems.append(Problem(f"--set {key}", message))
    return problems


def _carried(mix: Mapping[str, Any], experts: int) -> tuple[Rule, list[str]]:
    """Return a composition's rule for another number of experts, and what had to change."""
    rule, notes = dict(mix), []
    for key in ("weights", "prior"):
        if rule.pop(key, None) is not None:
            notes.append(f"{key} had a number for each expert; now all count alike")
    if rule["name"] == "weighted":
        rule["weights"] = [1.0] * experts
    if rule.get("k", 1) > experts:
        notes.append(f"k was {rule['k']}; there are {experts} experts")
        rule["k"] = experts
    return Rule.parse(rule, experts), notes


def _open(
    folder: str | Path, leaving: str | None = None
) -> tuple[Path, dict[str, Any], list[Expert]]:
    """Return a composition's folder, its record and its experts but `leaving`, after `verify`."""
    target = Path(folder)
    if not is_composition(target):
        fix = "name the folder of a composition"
        raise CheckpointError(f"{target}: holds no composition ({RECORD} is missing); {fix}")
    record = checkpoint.read_json(target / RECORD)
    if lacking := sorted({"experts", "mix", "bundled"} - record.keys()):
        raise CheckpointError(f"{target / RECORD}: damaged: lacks {lacking[0]!r}")
    verify(target, leaving)
    described = [expert for expert in record["experts"] if expert["name"] != leaving]
    places = [target / expert["path"] for expert in described]
    return target, record, reading.read_experts(places, [expert["name"] for expert in described])
