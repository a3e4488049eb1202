"""Compositions on disk: what may be composed, what is written, what is loaded.

A composition's folder is a Hugging Face folder of the model type `nacre-composed`. It names its
experts (by reference) or holds them with the code that runs them (a bundle). Whether experts fit
together is decided from `config.json`, `stage.json` and the tokenizer's files; no weight is read
before a composition is loaded. Importing this module registers the classes, so that
`AutoModelForCausalLM` loads compositions.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nacre.composition import expert as reading
from nacre.composition import schema
from nacre.composition import tuning as training
from nacre.composition.card import sharing
from nacre.composition.expert import RECORD, Expert, is_composition
from nacre.composition.folder import configuration, write
from nacre.composition.tuning import Trained, Tuning
from nacre.errors import CheckpointError, ConfigError, FingerprintError, Problem, nearest
from nacre.growth import ledger
from nacre.models.composed import TRAINED_FILE, ComposedConfig, ComposedForCausalLM
from nacre.models.composed_folder import local_folder
from nacre.models.rules import RULES, TRAINED, Rule
from nacre.models.trained import check as check_size
from nacre.train import checkpoint, files, foreign
from nacre.train.device import default_device
from nacre.train.observer import Observer

__all__ = [
    "Tuning",
    "add",
    "compose",
    "is_composition",
    "load",
    "load_any",
    "load_on_device",
    "make",
    "remove",
    "summary",
    "tune",
    "verify",
]


class CheckedComposition(ComposedForCausalLM):
    """A composition that refuses an expert which is not the recorded one, or lacks weights."""

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, **kwargs: Any
    ) -> ComposedForCausalLM:
        """Load a folder after `verify`; the arguments are those of the class below.

        An expert is refused as `checkpoint.load_model` refuses it.
        """
        folder = local_folder(pretrained_model_name_or_path, kwargs)
        for expert in verify(folder)["experts"]:
            place = folder / expert["path"]
            foreign.check_weights(place, checkpoint.load_config(place), place)
        return super().from_pretrained(folder, *args, **kwargs)


AutoConfig.register(ComposedConfig.model_type, ComposedConfig, exist_ok=True)
AutoModelForCausalLM.register(ComposedConfig, CheckedComposition, exist_ok=True)


def compose(
    experts: Sequence[str | Path],
    out: str | Path,
    mix: str = Rule.name,
    *,
    names: Sequence[str] | None = None,
    bundle: bool = False,
    tuning: Tuning | None = None,
    tune_heads: bool = False,
    observer: Observer | None = None,
    **options: Any,
) -> dict[str, Any]:
    """Write a composition of `experts` (stages, runs, Hugging Face folders); return its record.

    `mix` is a rule of `rules.RULES` and `options` are its options. `names` default to the names of
    the runs' folders. With `bundle` the folder holds the weights (hard links where the file system
    has them) and the code. `tuning` says on what text a trained rule or, with `tune_heads`, the
    experts' heads train. Raises ConfigError, CheckpointError, FingerprintError or DataError before
    any weight is read, and DivergedError if that training diverges.
    """
    return make(
        experts, out, mix, options,
        names=names, bundle=bundle, tuning=tuning, tune_heads=tune_heads, observer=observer,
    )  # fmt: skip


def make(
    experts: Sequence[str | Path],
    out: str | Path,
    mix: str,
    options: Mapping[str, Any],
    *,
    names: Sequence[str] | None = None,
    bundle: bool = False,
    tuning: Tuning | None = None,
    tune_heads: bool = False,
    observer: Observer | None = None,
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
    rule = Rule.parse({"name": mix, **options}, len(experts))
    if problems := training.check(rule, tune_heads, tuning):
        raise ConfigError(problems)
    found = reading.read_experts(experts, names)
    reading.check_agreement(found)
    try:
        check_size(rule, len(found), reading.field(found[0], "vocab_size"))
    except ValueError as error:
        raise ConfigError(Problem("--set rank", str(error).removeprefix("rank: "))) from None
    train = _training(found, rule, tune_heads, tuning, observer)
    return write(target, found, rule, bundle, train=train)


def tune(
    folder: str | Path, tuning: Tuning | None, observer: Observer | None = None
) -> dict[str, Any]:
    """Train the experts' heads together under the rule of the composition in `folder`, in place.

    The paper's follow-up to averaging (arXiv 2507.07129): the experts' own checkpoints stay as they
    are, the composition holds the tuned heads. Heads that were tuned before begin anew. Returns the
    new record; raises as `compose` does.
    """
    target, record, experts = _open(folder)
    rule = Rule.parse(record["mix"], len(experts))
    if problems := training.check(rule, True, tuning):
        raise ConfigError(problems)
    train = _training(experts, rule, True, tuning, observer)
    return write(target, experts, rule, record["bundled"], train=train)


def _training(
    experts: Sequence[Expert],
    rule: Rule,
    heads: bool,
    tuning: Tuning | None,
    observer: Observer | None,
) -> Callable[[], Trained | None]:
    """Return what trains what a composition of these experts has to train, if anything."""
    if tuning is None:
        return lambda: None
    config = configuration(experts, [str(expert.path) for expert in experts], rule)

    def load_composition() -> ComposedForCausalLM:
        models = [checkpoint.load_model(expert.path) for expert in experts]
        try:
            return ComposedForCausalLM(config, models)
        except ValueError as error:  # a gate over experts whose hidden states cannot be reached
            fix = "use adapter, or another rule"
            raise ConfigError(Problem("--mix", str(error), fix)) from None

    what: Any = "heads" if heads else rule.name
    watch = observer or Observer()
    return lambda: training.tune(experts, load_composition, what, tuning, watch)


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
    rule, notes = _carried(record, len(experts))
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
    rule, notes = _carried(record, len(experts))
    return write(target, experts, rule, record["bundled"], notes)


def summary(record: Mapping[str, Any]) -> list[str]:
    """Return lines for people: the experts, what they share and what that saves, the notes."""
    names = ", ".join(expert["name"] for expert in record["experts"])
    options = ", ".join(f"{key} {value}" for key, value in record["mix"].items() if key != "name")
    rule = record["mix"]["name"] + (f" ({options})" if options else "")
    lines = [f"{names}: mixed by {rule}, {record['parameters']:,} parameters"]
    lines += [sharing(entry) for entry in record["shared"]]
    if trained := record.get("trained"):
        before, after = (
            trained["validation"][when]["bits_per_byte"] for when in ("before", "after")
        )
        lines.append(
            f"{trained['what']} trained on {trained['tokens']:,} tokens in "
            f"{trained['seconds']:.0f} s: {before:.4f} -> {after:.4f} bits per byte, held out"
        )
    return [*lines, *(f"note: {note}" for note in record["notes"])]


def verify(folder: Path, leaving: str | None = None) -> dict[str, Any]:
    """Return a composition's record if every expert but `leaving` is there and the recorded one.

    Reads no weights. Raises CheckpointError for a folder without a record, for an expert that is
    gone or is a composition itself, FingerprintError for another one.
    """
    record, config = read_record(folder), schema.read_config(folder)
    for expert in config["experts"]:
        if expert["name"] == leaving:
            continue
        place, recorded = folder / expert["path"], expert["fingerprint"]
        if not (place / "config.json").is_file():
            fix = "move it back, or compose again from where it is"
            raise CheckpointError(f"{folder}: expert {expert['name']!r} is not in {place}; {fix}")
        foreign.check_folder(place)
        if files.read_json(place / "config.json").get("model_type") == config["model_type"]:
            message = f"expert {expert['name']!r} is a composition itself"
            raise CheckpointError(f"{folder}: {message}; compose its experts")
        if recorded is not None:
            found = files.read_record(place)["fingerprint"]
            if found != recorded:
                fix = f"it was changed after composing: restore {place}, or compose again"
                what = f"expert {expert['name']!r} of {folder}"
                raise FingerprintError(what, recorded[:12], found[:12], fix)
    schema.check_same(folder, config, record)
    trained = record.get("trained")
    if trained is not None:
        if not (folder / TRAINED_FILE).is_file():
            fix = "restore it, or compose and train again"
            raise CheckpointError(f"{folder}: {TRAINED_FILE} is missing; {fix}")
        found = ledger.file_hash(folder / TRAINED_FILE)
        if found != trained["sha256"]:
            fix = "restore it, or compose and train again"
            raise FingerprintError(
                f"{TRAINED_FILE} of {folder}", trained["sha256"][:12], found[:12], fix
            )
    return record


def read_record(folder: str | Path) -> dict[str, Any]:
    """Return a composition's record; raise CheckpointError where there is none, or damaged."""
    _check_is_one(folder)
    return schema.read_record(Path(folder))


def _check_is_one(folder: str | Path) -> None:
    if not is_composition(folder):
        fix = "name the folder of a composition, or make one with `nacre compose`"
        raise CheckpointError(f"{folder}: holds no composition ({RECORD} is missing); {fix}")


def load(folder: str | Path, dtype: torch.dtype = torch.float32) -> ComposedForCausalLM:
    """Load a composition with its experts in `dtype`.

    Raises CheckpointError for a folder without one or an expert that cannot be loaded,
    FingerprintError for an expert that is not the recorded one.
    """
    _check_is_one(folder)
    foreign.check_folder(Path(folder))
    return foreign.guarded(folder, lambda: CheckedComposition.from_pretrained(folder, dtype=dtype))


def load_any(folder: str | Path) -> PreTrainedModel:
    """Load a composition, a stage or any Hugging Face causal LM in fp32; raise as each does."""
    return load(folder) if is_composition(folder) else checkpoint.load_model(folder)


def load_on_device(folder: str | Path) -> PreTrainedModel:
    """Load as `load_any`, ready to be read with, on `device.default_device`."""
    model: Any = load_any(folder).eval()
    return model.to(default_device())


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


def _carried(record: Mapping[str, Any], experts: int) -> tuple[Rule, list[str]]:
    """Return a composition's rule for another number of experts, and what had to change."""
    rule, notes = dict(record["mix"]), []
    if (record.get("trained") or {}).get("what") == "heads":
        notes.append("the heads that were tuned together are the experts' own again")
    if rule["name"] in TRAINED:
        notes.append(f"{rule['name']} was trained for other experts; now {Rule().name} mixes them")
        rule = Rule().as_json()
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
    record = verify(target, leaving)
    described = [expert for expert in record["experts"] if expert["name"] != leaving]
    places = [target / expert["path"] for expert in described]
    return target, record, reading.read_experts(places, [expert["name"] for expert in described])
