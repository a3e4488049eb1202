"""What a composition's folder holds, and how it is written: all of it or nothing."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import save_file
from transformers import GenerationConfig

from nacre import models
from nacre import tokenizer as tokenizers
from nacre.composition.card import card
from nacre.composition.expert import RECORD, SPECIAL, Expert, field, shared_parts
from nacre.composition.tuning import Trained
from nacre.growth import ledger
from nacre.models.composed import TRAINED_FILE, ComposedConfig, ComposedForCausalLM
from nacre.models.rules import Rule
from nacre.train import files, foreign

ENTRY = "composition_code"
"""The bundle's module that imports all others: transformers copies what it finds imported there."""


def write(
    target: Path,
    experts: Sequence[Expert],
    rule: Rule,
    bundle: bool,
    notes: Sequence[str] = (),
    train: Callable[[], Trained | None] = lambda: None,
) -> dict[str, Any]:
    """Write a composition's folder, all or nothing; return its record.

    `train` is called once the place is known to be writable. What else stands in the folder stays.
    """
    target = target.resolve()
    places = [
        f"experts/{expert.name}" if bundle else _relative(expert.path, target) for expert in experts
    ]
    record = _record(experts, places, rule, bundle, [*_notes(experts), *notes])
    config = configuration(experts, places, rule)
    with files.new_folder(target) as partial:
        trained = train()
        if bundle:
            config.auto_map = _copy_code(partial)
            _copy_experts(partial, experts)
        config.save_pretrained(partial)
        if trained is not None:
            file = partial / TRAINED_FILE
            save_file(dict(trained.tensors), file, metadata={"format": "pt"})
            shutil.copymode(partial / "config.json", file)
            record["trained"] = trained.record | {"sha256": ledger.file_hash(file)}
        special = {name: getattr(config, name) for name in SPECIAL}
        GenerationConfig(**special).save_pretrained(partial)
        tokenizers.load(experts[0].path).save_pretrained(partial)
        (partial / "README.md").write_text(card(record), encoding="utf-8")
        files.write_json(partial / RECORD, record)
        _keep_others(target, partial, {TRAINED_FILE, "experts"} if bundle else {TRAINED_FILE})
    return record


def _keep_others(old: Path, new: Path, own: Collection[str]) -> None:
    """Bring over what stands in the old folder and is no part of a composition: linked, or copied.

    `own` are names of parts that the new folder may lack.
    """
    for path in sorted(old.iterdir()) if old.is_dir() else []:
        if path.name in own or (new / path.name).exists():
            continue
        if path.is_dir() and not path.is_symlink():
            shutil.copytree(path, new / path.name, symlinks=True, copy_function=files.link)
        else:
            files.link(path, new / path.name)


def configuration(experts: Sequence[Expert], places: Sequence[str], rule: Rule) -> ComposedConfig:
    """Return the configuration of a composition whose experts are in these places."""
    said = {name: [field(expert, name) for expert in experts] for name in SPECIAL}
    ids = {name: next((n for n in found if n is not None), None) for name, found in said.items()}
    return ComposedConfig(
        experts=[
            {
                "name": expert.name,
                "path": place,
                "fingerprint": expert.fingerprint,
                "parts": list(expert.layout.parts),
            }
            for expert, place in zip(experts, places, strict=True)
        ],
        mix=rule.as_json(),
        vocab_size=field(experts[0], "vocab_size"),
        max_position_embeddings=context(experts),
        architectures=[ComposedForCausalLM.__name__],
        **ids,
    )


def context(experts: Sequence[Expert]) -> int:
    """Return the most positions that all experts can read."""
    return min(expert.context or 0 for expert in experts)


def _relative(path: Path, folder: Path) -> str:
    """Return a path seen from a folder; absolute where there is no way (another drive)."""
    try:
        return Path(os.path.relpath(path, folder)).as_posix()
    except ValueError:
        return path.as_posix()


def _notes(experts: Sequence[Expert]) -> list[str]:
    notes: list[str] = []
    contexts = [expert.context or 0 for expert in experts]
    if len(set(contexts)) > 1:
        notes.append(f"contexts differ ({_each(experts, contexts)}); the smallest one holds")
    substrates = [(expert.record.get("substrate") or "its own")[:12] for expert in experts]
    if len(set(substrates)) > 1:
        notes.append(
            f"substrates differ ({_each(experts, substrates)}); outputs can be mixed all the same, "
            "but such experts share no blocks"
        )
    return notes


def _each(experts: Sequence[Expert], values: Sequence[Any]) -> str:
    return ", ".join(f"{e.name} {value}" for e, value in zip(experts, values, strict=True))


def _record(
    experts: Sequence[Expert],
    places: Sequence[str],
    rule: Rule,
    bundle: bool,
    notes: Sequence[str],
) -> dict[str, Any]:
    shared = shared_parts(experts)
    saved = sum(entry["parameters_saved"] for entry in shared)
    each = [
        {
            "name": expert.name,
            "path": place,
            "fingerprint": expert.fingerprint,
            "family": expert.config.model_type,
            "depth": len(expert.layout.blocks),
            "width": field(expert, "hidden_size"),
            "context": expert.context,
            "parameters": expert.layout.parameters,
        }
        | {key: expert.record.get(key) for key in ("stage", "parent", "substrate", "corpus")}
        for expert, place in zip(experts, places, strict=True)
    ]
    return {
        "mix": rule.as_json(),
        "bundled": bundle,
        "experts": each,
        "tokenizer": experts[0].tokenizer,
        "vocabulary": field(experts[0], "vocab_size"),
        "context": context(experts),
        "parameters": sum(expert.layout.parameters for expert in experts) - saved,
        "parameters_saved": saved,
        "shared": shared,
        "notes": list(notes),
    }


def _copy_code(folder: Path) -> dict[str, str]:
    """Copy the modules that run a composition into a folder; return its `auto_map`."""
    source = Path(models.__file__).parent
    modules = sorted(path.stem for path in source.glob("*.py") if path.stem != "__init__")
    for module in modules:
        shutil.copyfile(source / f"{module}.py", folder / f"{module}.py")
    head = '"""What transformers loads a composition by; it copies the modules named here."""\n\n'
    known = {"composed": "ComposedConfig, ComposedForCausalLM"}
    lines = [f"from .{module} import {known.get(module, '__doc__')}  # noqa" for module in modules]
    (folder / f"{ENTRY}.py").write_text(head + "\n".join(lines) + "\n", encoding="utf-8")
    return {
        "AutoConfig": f"{ENTRY}.ComposedConfig",
        "AutoModelForCausalLM": f"{ENTRY}.ComposedForCausalLM",
    }


def _copy_experts(folder: Path, experts: Sequence[Expert]) -> None:
    """Link every expert's weights into `experts/NAME` and copy its small files.

    Shards that hold the same tensors, or are the same file, are one file there.
    """
    first: dict[Any, Path] = {}
    for expert in experts:
        target = folder / "experts" / expert.name
        target.mkdir(parents=True)
        for source in sorted(path for path in expert.path.iterdir() if path.is_file()):
            if source.suffix == ".safetensors":
                one = first.setdefault(_identity(expert, source), source)
                files.link(one.resolve(), target / source.name)
                if one is source:
                    first[_identity(expert, source)] = target / source.name
            elif source.suffix in (".json", ".txt", ".model", ".jinja", ".md"):
                shutil.copyfile(source, target / source.name)


def _identity(expert: Expert, shard: Path) -> Any:
    """Return what two shards share only if they are the same: tensors by hash, else the file."""
    owners = foreign.weight_map(expert.path) if expert.record else None
    if owners is not None:
        hashes = expert.record["frozen"] | expert.record["weights"]
        names = [name for name, owner in owners.items() if owner == shard.name]
        if names and hashes.keys() >= set(names):
            return ledger.fingerprint(hashes, names)
    found = shard.stat()
    return found.st_dev, found.st_ino
