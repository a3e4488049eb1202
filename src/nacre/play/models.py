"""The models behind the page, loaded once: a run at every depth, and experts in any mixture."""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nacre import composition
from nacre import tokenizer as tokenizers
from nacre.composition.expert import Expert, check_agreement, read_experts, refuse_twins
from nacre.composition.folder import configuration
from nacre.data.shards import SPLITS, TokenStore
from nacre.errors import CheckpointError, ConfigError, NacreError, Problem
from nacre.folders import PLAN
from nacre.models.composed import ComposedForCausalLM
from nacre.models.rules import RULES, TRAINED, Rule
from nacre.train import checkpoint, files


@dataclass(frozen=True)
class Stage:
    """One depth that can be asked: how many blocks, and where its checkpoint is."""

    depth: int
    folder: Path


class Depths:
    """A run's model after every stage, or a single checkpoint; tensors they share are held once.

    The frozen trunk of all stages is one set of tensors: a stage's ledger says which of them it has
    in common with another. Every model is kept once it was asked for. Safe to use from any thread.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.stages = _stages(path)
        self._lock = threading.Lock()
        self._models: dict[int, PreTrainedModel] = {}
        self._tensors: dict[str, torch.Tensor] = {}

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, which is the same at every depth."""
        return tokenizers.load(self.stages[-1].folder)

    @property
    def depths(self) -> list[int]:
        """Blocks after each stage, in the order of stages."""
        return [stage.depth for stage in self.stages]

    def model(self, place: int) -> PreTrainedModel:
        """Return the model after stage `place` (0 is the first), in evaluation mode."""
        with self._lock:
            if place not in self._models:
                folder = self.stages[place].folder
                model = checkpoint.load_model(folder).eval().requires_grad_(False)
                if (folder / files.RECORD).is_file():
                    record = files.read_record(folder)
                    share_tensors(model, record["frozen"] | record["weights"], self._tensors)
                self._models[place] = model
            return self._models[place]

    def load_all(self) -> None:
        """Load every depth, the deepest first."""
        for place in reversed(range(len(self.stages))):
            self.model(place)


def _stages(path: Path) -> list[Stage]:
    if not (path / PLAN).is_file():
        return [Stage(checkpoint.load_config(path).get_text_config().num_hidden_layers, path)]
    folders = files.stages(path)
    if not folders:
        checkpoint.newest(path)  # says that no stage has finished, and what to do
    return [Stage(files.read_stage(f)["depth"], f) for f in folders]


def share_tensors(
    model: PreTrainedModel, hashes: Mapping[str, str], known: dict[str, torch.Tensor]
) -> None:
    """Let a model use the tensors of `known` (by hash) for its own of the same hash; add the rest.

    `hashes` gives the ledger's hash of a tensor's name.
    """
    for name, parameter in model.named_parameters():
        if name in hashes:
            parameter.data = known.setdefault(hashes[name], parameter.data)


def sample_text(run: Path, tokenizer: PreTrainedTokenizerBase, tokens: int) -> str:
    """Return the beginning of a held-out document of a run, or of a training one; "" without any.

    The text is one that is at least `tokens` long, where there is one.
    """
    for folder in sorted((run / "data").glob("[!.]*")) if (run / "data").is_dir() else []:
        try:
            store = TokenStore.open(folder)
        except NacreError:
            continue
        for split in reversed(SPLITS):
            starts, ids = store.documents(split), store.tokens(split)
            for begin, end in pairwise(starts[:200]):
                if end - begin > tokens:
                    text = str(tokenizer.decode(ids[begin : begin + tokens].tolist()))
                    return text.rstrip("\ufffd")
    return ""


class Mixtures:
    """Experts, each loaded once, and the compositions of some of them under some rule.

    `folder` is a composition on disk, or None where `others` are to be composed; `others` are runs
    and checkpoints that may join. One that does not fit the folder's experts, or is a copy of one
    of them, is in `left_out`, with the reason. Nothing is written. Safe to use from any thread.
    """

    def __init__(self, folder: Path | None, others: Sequence[Path] = ()) -> None:
        self.folder = folder
        self.record: Mapping[str, Any] = composition.read_record(folder) if folder else {}
        self.own = [expert["name"] for expert in self.record.get("experts", [])]
        places = [folder / e["path"] for e in self.record.get("experts", [])] if folder else []
        if folder:
            composition.verify(folder)
        known = read_experts(places, self.own) if folder else []
        inside = {expert.path for expert in known}
        new = [path for path in others if Path(checkpoint.newest(path)).resolve() not in inside]
        self.left_out: dict[str, str] = {}
        joining = [e for e in read_experts(new, None, self.own) if self._joins(e, known)]
        self.experts = {expert.name: expert for expert in [*known, *joining]}
        if len(self.experts) < 2:
            fix = "name a composition, or two or more runs or checkpoints"
            raise ConfigError(Problem("PATH", "one expert alone is no composition", fix))
        check_agreement(list(self.experts.values()))
        self._lock = threading.Lock()
        self._loaded: dict[str, PreTrainedModel] = {}
        self._tensors: dict[str, dict[str, torch.Tensor]] = {}  # by expert and name
        self._mixed: dict[tuple[tuple[str, ...], str], ComposedForCausalLM] = {}

    def _joins(self, expert: Expert, known: Sequence[Expert]) -> bool:
        """Tell whether another expert fits a composition's own, and keep why one does not."""
        try:
            refuse_twins([*known, expert])
            check_agreement([*known[:1], expert])
        except NacreError as error:
            self.left_out[expert.name] = str(error)
        return expert.name not in self.left_out

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer of all experts."""
        return tokenizers.load(next(iter(self.experts.values())).path)

    @property
    def rule(self) -> Rule:
        """The composition's own rule; the default one where there is none on disk."""
        return Rule.parse(self.record["mix"], len(self.own)) if self.own else Rule()

    @property
    def rules(self) -> list[str]:
        """Rules that can be chosen: those without training, and the composition's own."""
        return [name for name in RULES if name not in TRAINED or name == self.rule.name]

    def model(self, names: Sequence[str], rule: Rule) -> ComposedForCausalLM:
        """Return a composition of these experts under a rule, built when it is first asked for.

        The folder's own experts and rule give the composition as it is on disk, tuned heads
        included. Raises ConfigError for no expert, or a trained rule over others than its own.
        """
        if not names:
            raise ConfigError(Problem("Experts", "none is chosen", "choose one at least"))
        if problems := rule.check(len(names)):
            raise ConfigError([Problem("Rule", problem) for problem in problems])
        own = list(names) == self.own and rule == self.rule
        if rule.name in TRAINED and not own:
            message = f"{rule.name} was trained for {', '.join(self.own)} and only mixes these"
            raise ConfigError(Problem("Rule", message, "choose another rule, or all of them"))
        key = (tuple(names), str(rule.as_json()))
        with self._lock:
            if key not in self._mixed:
                self._mixed = dict(list(self._mixed.items())[-7:])  # each holds a layout, no weight
                self._mixed[key] = self._own() if own and self.folder else self._mix(names, rule)
            return self._mixed[key]

    def _own(self) -> ComposedForCausalLM:
        assert self.folder is not None
        model = composition.load(self.folder).requires_grad_(False)
        for name, expert in zip(self.own, model.experts, strict=True):
            self._hold_once(name, expert)
        return model

    def _hold_once(self, name: str, model: torch.nn.Module) -> None:
        """Let a model use what is in memory of the same expert; tuned heads are not the same."""
        known = self._tensors.setdefault(name, {})
        for place, parameter in model.named_parameters():
            same = known.setdefault(place, parameter.data)
            if torch.equal(same, parameter):
                parameter.data = same

    def _mix(self, names: Sequence[str], rule: Rule) -> ComposedForCausalLM:
        chosen = [self.experts[name] for name in names]
        for expert in chosen:
            if expert.name not in self._loaded:
                model = checkpoint.load_model(expert.path).requires_grad_(False)
                self._hold_once(expert.name, model)
                self._loaded[expert.name] = model
        config = configuration(chosen, [str(expert.path) for expert in chosen], rule)
        try:
            return ComposedForCausalLM(config, [self._loaded[name] for name in names])
        except ValueError as error:
            raise CheckpointError(f"{', '.join(names)}: cannot be mixed: {error}") from None
