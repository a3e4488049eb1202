"""Several experts under one mixing rule: itself a causal language model.

Experts are stock decoders over one vocabulary. Blocks that several of them share (the same weights,
recognised by their hashes) are one module and run once a step; above them each expert goes its own
way to its own head. The heads' logits are mixed a few positions at a time, so that scoring a long
text never holds the logits of all experts.

The files of this folder are all that a composition needs: it loads through `AutoModelForCausalLM`
with `trust_remote_code` where nacre is not installed.

Shapes: E experts, B batch, T positions, D width, V vocabulary.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import stock
from .composed_cache import ComposedCache
from .composed_config import ComposedConfig
from .composed_folder import local_folder
from .composed_layout import Layout, Segment, view
from .mixing import log_likelihood, top_k
from .rules import Rule, combine, mix
from .trained import Adapter, Gate, build

TILE_BYTES = (2**20, 64 * 2**20)  # of all experts' fp32 logits at once, at least and at most
TILE_SHARE = 12  # between these, this part of the mixed logits
TRAINED_FILE = "trained.safetensors"
"""In a composition's folder: `mixer.*` of a trained rule, `heads.NAME.*` of tuned heads."""


@dataclass
class ComposedOutput(CausalLMOutputWithPast):
    """The mixed output; `log_weights` (fp32 `[E, B, T]`) say who carried each position.

    `logits` (fp32 `[B, T, V]`) are log-probabilities where the rule mixes probabilities. An adapter
    has no weights.
    """

    log_weights: torch.Tensor | None = None


class ComposedForCausalLM(PreTrainedModel, GenerationMixin):
    """Experts whose outputs are mixed at every position; generates and scores as any model.

    One pass over a text, token by token, or any split in between give the same output, and so do
    texts padded in a batch. The exception is `top-k`, which may skip experts: a chunk of several
    tokens is read by all of them, but of single tokens after it an expert reads none while it is
    not among the k best of any text of the batch. Its likelihood sum then stays as it was. Once it
    is among the best again, because the sums of others fell below, it first reads what it missed,
    and its sum is exactly that of one pass. So generation may switch later than one pass would.
    It catches up in one piece, so its numbers then agree up to rounding.
    An expert with a weight or a prior of 0 is never run.
    """

    config_class = ComposedConfig
    _supports_sdpa = True
    _is_stateful = True  # likelihood sums cannot be taken back: no assisted generation
    main_input_name = "input_ids"

    def __init__(self, config: ComposedConfig, experts: Sequence[PreTrainedModel] = ()) -> None:
        super().__init__(config)
        self.all_tied_weights_keys = {}
        self.experts = nn.ModuleList(experts)
        self.rule = Rule("mean-logits")
        self.mixer: Gate | Adapter | None = None
        self.heads_tuned = False
        self.arrangement = 0
        self.arrange()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> ComposedForCausalLM:
        """Load a composition's folder, here or on the hub: its config, then every expert.

        `dtype`, `device_map` and `attn_implementation` go to the experts. Raises ValueError for a
        folder whose experts are not where its config says, or lack tensors.
        """
        folder = local_folder(pretrained_model_name_or_path, kwargs)
        if config is None:
            config = ComposedConfig.from_pretrained(folder)
        known = ("dtype", "torch_dtype", "device_map", "attn_implementation")
        passed = {key: value for key, value in kwargs.items() if key in known}
        places = [folder / expert["path"] for expert in config.experts]
        for expert, place in zip(config.experts, places, strict=True):
            if not (place / "config.json").is_file():
                raise ValueError(f"{folder}: expert {expert['name']!r} is not in {place}")
        model = cls(config, [_load_expert(place, **passed) for place in places])
        if (folder / TRAINED_FILE).is_file():
            model.load_trained(load_file(folder / TRAINED_FILE))
        elif model.mixer is not None:
            raise ValueError(f"{folder}: {TRAINED_FILE} is missing ({model.rule.name} is trained)")
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

    def load_trained(self, tensors: Mapping[str, torch.Tensor]) -> None:
        """Take a trained rule's weights and the experts' tuned heads, as `TRAINED_FILE` has them.

        Raises ValueError for tensors that are not those of this composition.
        """
        mixer = {name: t for name, t in tensors.items() if name.startswith("mixer.")}
        heads = {name: t for name, t in tensors.items() if name not in mixer}
        if heads:
            self.untie()
        own = self.trained_tensors(heads=bool(heads))
        shapes = {name: tuple(tensor.shape) for name, tensor in tensors.items()}
        if shapes != {name: tuple(tensor.shape) for name, tensor in own.items()}:
            raise ValueError(f"{TRAINED_FILE} is not of these experts and this rule")
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(tensors[name])
        self.heads_tuned = bool(heads)

    def trained_tensors(self, heads: bool) -> dict[str, torch.Tensor]:
        """Return what may be trained: the rule's own weights and, if asked, the heads that play."""
        found = {} if self.mixer is None else self.mixer.state_dict(prefix="mixer.", keep_vars=True)
        for expert in self.playing if heads else []:
            prefix = f"heads.{self.expert_names[expert]}."
            found |= self.parts[expert].head.state_dict(prefix=prefix, keep_vars=True)
        return found

    def untie(self) -> None:
        """Give every head a weight of its own, where it is also the embedding."""
        for model in self.experts:
            stock.untie(model)  # pyright: ignore[reportArgumentType]

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """Refuse: a composition's folder also records its experts' hashes, which are not here."""
        raise NotImplementedError(
            "a composition is written by nacre.compose (`nacre compose`), with its experts "
            "inside by bundle=True (`--bundle`); an expert by its own save_pretrained"
        )

    def arrange(self) -> None:
        """Make blocks that experts share one module, and lay out what runs once for whom.

        Caches of texts that were begun before no longer fit. Raises ValueError when the experts do
        not fit the config: their number, names, a vocabulary, hashes, the rule.
        """
        described, vocabulary = self.config.experts, self.config.vocab_size
        if len(self.experts) != len(described):
            raise ValueError(f"{len(self.experts)} experts, but the config names {len(described)}")
        if len(set(self.expert_names)) < len(described):
            raise ValueError(f"two experts of one name: {', '.join(self.expert_names)}")
        rule = Rule.parse(self.config.mix, len(described)) if described else Rule()
        all_parts = [stock.find_parts(model) for model in self.experts]  # pyright: ignore
        for expert, parts in zip(described, all_parts, strict=True):
            name, rows, blocks = expert["name"], parts.head.weight.shape[0], len(parts.blocks)
            if rows != vocabulary:
                raise ValueError(f"{name}: {rows} tokens, the composition {vocabulary}")
            if (hashes := expert.get("parts")) and len(hashes) != 1 + blocks:
                raise ValueError(f"{name}: {len(hashes)} parts for an embedding, {blocks} blocks")
        self.parts = all_parts
        self.eval()
        self.exact = [stock.splits_exactly(model, 0) for model in self.experts]  # pyright: ignore
        if rule.name == "gate" and not all(self.exact):
            whole = described[self.exact.index(False)]["name"]
            raise ValueError(f"gate: reads hidden states, and those of {whole} cannot be reached")
        if rule != self.rule:
            widths = [parts.head.weight.shape[1] for parts in all_parts]
            self.mixer = build(rule, widths, vocabulary)
            if self.mixer is not None:
                self.mixer.to(all_parts[0].head.weight.device)
        self.rule = rule
        shares = rule.shares(len(described))
        self.playing = [expert for expert in range(len(described)) if shares[expert]]
        hashes = [
            (expert.get("parts") or []) if exact else []
            for expert, exact in zip(described, self.exact, strict=True)
        ]
        self.layout = Layout(all_parts, hashes, self.playing)
        self.views = [self._view(segment) for segment in self.layout.segments]
        self.arrangement += 1

    def _view(self, segment: Segment) -> nn.Module:
        model = self.experts[segment.owner]
        return view(model, segment) if self.exact[segment.owner] else model

    def add_expert(self, model: PreTrainedModel, name: str, **described: Any) -> None:
        """Add an expert; the others' outputs do not change.

        `described` is what the config says of it besides its name. Raises ValueError for a name
        that is there, another vocabulary, or a rule that has numbers for each expert or is trained;
        the composition is then as it was.
        """
        self._refuse_if_trained()
        if name in self.expert_names:
            raise ValueError(f"there is an expert {name!r} already")
        before = self.config.experts
        self.config.experts = [*before, {"name": name, **described}]
        self.experts.append(model)
        try:
            self.arrange()
        except ValueError:
            self.config.experts = before
            del self.experts[-1]
            raise

    def remove_expert(self, name: str) -> None:
        """Remove an expert: the composition is what it would be without it.

        Where the rule has numbers for each expert, its number goes and the others keep theirs; a k
        above the number of experts left becomes that number. Raises ValueError for an unknown name,
        for the only expert, for a trained rule, or if no expert with a weight would be left.
        """
        self._refuse_if_trained()
        if name not in self.expert_names or len(self.experts) == 1:
            known = ", ".join(self.expert_names)
            raise ValueError(f"no expert {name!r} that could be removed (there are: {known})")
        index, left = self.expert_names.index(name), len(self.experts) - 1
        mixing_rule = dict(self.config.mix)
        for key in ("weights", "prior"):
            if mixing_rule.get(key) is not None:
                mixing_rule[key] = [n for i, n in enumerate(mixing_rule[key]) if i != index]
        if self.rule.name == "top-k":
            mixing_rule["k"] = min(self.rule.k, left)
        Rule.parse(mixing_rule, left)
        self.config.mix = mixing_rule
        self.config.experts = [e for e in self.config.experts if e["name"] != name]
        del self.experts[index]
        self.arrange()

    def _refuse_if_trained(self) -> None:
        if self.mixer is not None or self.heads_tuned:
            what = f"the {self.rule.name} was" if self.mixer is not None else "the heads were"
            raise ValueError(f"{what} trained for exactly these experts")

    @property
    def expert_names(self) -> list[str]:
        """The experts' names, in order."""
        return [expert["name"] for expert in self.config.experts]

    def get_input_embeddings(self) -> nn.Module:
        """Return the first expert's embedding: all stand on the same substrate."""
        return self.parts[0].embedding

    @classmethod
    def _supports_default_dynamic_cache(cls) -> bool:
        return False  # the first forward pass makes a ComposedCache

    @torch.no_grad()
    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: ComposedCache | None = None,
        labels: torch.Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> ComposedOutput:
        """Read tokens and return the mixed output for the last `logits_to_keep` of them (0: all).

        `input_ids` int64 `[B, T]`, `attention_mask` `[B, past + T]` (0: padding, on either side),
        `labels` int64 `[B, T]` (-100: none) give the mean loss in nats. Nothing here trains. Raises
        ValueError for input that is not ids, a mask of another shape, labels where not all logits
        are kept, and a cache of other experts.
        """
        if input_ids is None or not input_ids.numel():
            raise ValueError("input_ids: none (a composition reads at least one token, no vectors)")
        if labels is not None and logits_to_keep:
            raise ValueError("labels: need the logits of all positions (leave out logits_to_keep)")
        input_ids = input_ids.long()
        cache = self._begin() if past_key_values is None else past_key_values
        if not isinstance(cache, ComposedCache) or cache.arrangement != self.arrangement:
            raise ValueError("past_key_values: not of these experts (begin the text without)")
        new, past = input_ids.shape[1], cache.get_seq_length()
        self._append(cache, input_ids, attention_mask, position_ids)
        skips = self.rule.name == "top-k" and new == 1 and past
        output_BTV, log_weights_EBT = (
            self._step(cache) if skips else self._score(cache, new, logits_to_keep)
        )
        return ComposedOutput(
            loss=None if labels is None else _loss(output_BTV, labels),
            logits=output_BTV,
            past_key_values=None if use_cache is False else cache,
            log_weights=log_weights_EBT,
        )

    @torch.no_grad()
    def hidden(self, input_ids: torch.Tensor) -> list[torch.Tensor]:
        """Return for whole texts what goes into the head of every expert with a weight, `h_BTD`.

        `input_ids` int64 `[B, T]`. For an expert that does not split, its logits `[B, T, V]`.
        """
        cache = self._begin()
        self._append(cache, input_ids, None, None)
        reached = self._run(cache, self.playing)
        return [reached[expert] for expert in self.playing]

    def _begin(self) -> ComposedCache:
        starts = [segment.start for segment in self.layout.segments]
        return ComposedCache(starts, len(self.experts), self.arrangement)

    def _append(
        self,
        cache: ComposedCache,
        input_ids: torch.Tensor,
        attention_mask: torch.Tensor | None,
        position_ids: torch.Tensor | None,
    ) -> None:
        """Let tokens wait for the segments that read ids."""
        (batch, new), past = input_ids.shape, cache.get_seq_length()
        if attention_mask is None:
            seen = torch.ones(batch, new, dtype=torch.bool, device=input_ids.device)
        elif attention_mask.shape == (batch, past + new):
            seen = attention_mask[:, past:].bool()
        else:
            found = list(attention_mask.shape)
            raise ValueError(f"attention_mask: expected {[batch, past + new]}, got {found}")
        if position_ids is None:
            whole = torch.cat([cache.mask_BT, seen], 1) if past else seen
            position_ids = (whole.cumsum(1) - 1).clamp(min=0)[:, past:]
        cache.append(input_ids, seen, position_ids.expand(batch, new))
        for segment in self.layout.roots:
            cache.waiting[segment.place].append(input_ids)

    def _run(self, cache: ComposedCache, wanted: Collection[int]) -> dict[int, torch.Tensor]:
        """Run what waits for the `wanted` experts; return what goes into their heads, `h_BTD`.

        T are the positions that the expert had not read. For an expert that does not split, its
        logits `[B, T, V]`.
        """
        reached: dict[int, torch.Tensor] = {}
        mask_BT = None if cache.mask_BT.all() else cache.mask_BT.long()

        def run(segment: Segment) -> None:
            if not any(expert in wanted for expert in segment.experts):
                return
            inputs = cache.take(segment.place)
            if inputs is not None:
                known = "inputs_embeds" if segment.start else "input_ids"
                output = self.views[segment.place](
                    **{known: inputs},
                    attention_mask=mask_BT,
                    position_ids=cache.positions_BT[:, -inputs.shape[1] :],
                    past_key_values=cache.keys[segment.place],
                    use_cache=True,
                )
                if segment.stop is None:
                    whole = not self.exact[segment.owner]
                    reached[segment.owner] = output.logits if whole else output.last_hidden_state
                for child in segment.above:
                    cache.waiting[child.place].append(output.last_hidden_state)
            for child in segment.above:
                run(child)

        for segment in self.layout.roots:
            run(segment)
        return reached

    def logits(self, expert: int, reached_BTD: torch.Tensor) -> torch.Tensor:
        """Return an expert's logits `[B, T, V]` from what `hidden` gave for it."""
        return self.parts[expert].head(reached_BTD) if self.exact[expert] else reached_BTD

    def _score(
        self, cache: ComposedCache, new: int, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Mix the last `new` positions, tile by tile; experts that lag behind catch up first."""
        reached = self._run(cache, self.playing)
        first = cache.get_seq_length() - new
        for expert in self.playing:
            lag = reached[expert].shape[1] - new
            if lag:
                self._catch_up(cache, expert, reached[expert][:, :lag])
                reached[expert] = reached[expert][:, lag:]
        batch, kept = cache.ids_BT.shape[0], min(keep or new, new)
        unkept = new - kept
        if self.rule.reads_text:
            for begin, end in self._tiles(batch, 0, unkept):
                tile = {e: self.logits(e, reached[e][:, begin:end]) for e in self.playing}
                cache.count(self.rule, tile, first + begin)
                cache.remember(tile)
        tiles = list(self._tiles(batch, unkept, new))
        output_BTV = torch.empty(0)
        if len(tiles) > 1:
            shape_BTV = (batch, kept, self.config.vocab_size)
            output_BTV = torch.empty(shape_BTV, device=cache.ids_BT.device)
        weights: list[torch.Tensor] = []
        for begin, end in tiles:
            here = {e: reached[e][:, begin:end] for e in self.playing}
            mixed_BTV, log_weights_EBT = self._mix(cache, here, first + begin)
            if log_weights_EBT is not None:
                weights.append(log_weights_EBT)
            if len(tiles) == 1:
                output_BTV = mixed_BTV
            else:
                output_BTV[:, begin - unkept : end - unkept] = mixed_BTV
            del here, mixed_BTV
        cache.read = [cache.get_seq_length()] * len(self.experts)
        cache.counted = list(cache.read)
        return output_BTV, torch.cat(weights, -1) if weights else None

    def _mix(
        self, cache: ComposedCache, reached: Mapping[int, torch.Tensor], first: int
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Return the mixed output and the log weights at positions from `first` on."""
        tile = {expert: self.logits(expert, h_BTD) for expert, h_BTD in reached.items()}
        if isinstance(self.mixer, Adapter):
            return self.mixer(list(tile.values())), None
        if self.mixer is not None:
            log_weights_EBT = self.mixer(list(reached.values()))
            return combine(self.rule, list(tile.values()), log_weights_EBT), log_weights_EBT
        observed_EBT = real_BT = None
        if self.rule.reads_text:
            observed_EBT, real_BT = cache.observed(tile, first)
            cache.remember(tile)
        logits = [tile.get(expert) for expert in range(len(self.experts))]
        mixed = mix(self.rule, logits, observed_EBT, cache.state_EB, real_BT)
        cache.state_EB = mixed.state_EB
        return mixed.output_BTV, mixed.log_weights_EBT

    def _tiles(self, batch: int, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of positions from `low` to `high`."""
        row = 4 * batch * self.config.vocab_size
        least, most = TILE_BYTES
        size = min(max(row * (high - low) // TILE_SHARE, least), most) // (row * len(self.playing))
        for begin in range(low, high, max(1, size)):
            yield begin, min(begin + max(1, size), high)

    def _catch_up(self, cache: ComposedCache, expert: int, reached_BTD: torch.Tensor) -> None:
        """Read the positions that a skipped expert missed into its likelihood sum."""
        for begin, end in self._tiles(reached_BTD.shape[0], 0, reached_BTD.shape[1]):
            tile = {expert: self.logits(expert, reached_BTD[:, begin:end])}
            cache.count(self.rule, tile, cache.read[expert])
            cache.remember(tile)

    def _step(self, cache: ComposedCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix the one new position; experts that are not among the k best are not run."""
        here, k = cache.get_seq_length() - 1, self.rule.k
        before: dict[int, torch.Tensor] = {}
        for expert in self.playing:
            last_BV = cache.last[expert]
            if cache.read[expert] == here and last_BV is not None:
                before[expert] = last_BV.unsqueeze(1)
        log_weights_EB1 = top_k(cache.count(self.rule, before, here), k)
        logits: dict[int, torch.Tensor] = {}
        while wanted := [
            expert
            for expert, largest in enumerate(log_weights_EB1.amax((1, 2)).tolist())
            if largest > -math.inf and expert not in logits
        ]:
            for expert, reached_BTD in self._run(cache, wanted).items():
                logits[expert] = self.logits(expert, reached_BTD[:, -1:])
                if reached_BTD.shape[1] > 1:
                    self._catch_up(cache, expert, reached_BTD[:, :-1])
                    here_EB1 = cache.count(self.rule, {expert: logits[expert]}, here)
                    log_weights_EB1 = top_k(here_EB1, k)
                cache.remember({expert: logits[expert]})
        run, part_RB1 = list(logits.values()), log_weights_EB1[list(logits)]
        return combine(self.rule, run, part_RB1), log_weights_EB1


def _loss(output_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log p of the next labels in nats; nan if there are none."""
    targets_BT = labels_BT[:, 1:]
    counts_BT = targets_BT != -100
    likelihood_BT = log_likelihood(output_BTV[:, :-1], targets_BT.masked_fill(~counts_BT, 0))
    return -likelihood_BT[counts_BT].mean()


def _load_expert(place: Path, **passed: Any) -> PreTrainedModel:
    config = AutoConfig.from_pretrained(place, trust_remote_code=False, local_files_only=True)
    if config.model_type == ComposedConfig.model_type:
        raise ValueError(f"{place}: is a composition, which cannot be an expert")
    model, loaded = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
        place,
        config=config,
        use_safetensors=True,
        trust_remote_code=False,
        local_files_only=True,
        output_loading_info=True,
        **passed,
    )
    if wrong := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
        raise ValueError(f"{place}: {len(wrong)} tensors are missing, first {wrong[0]}")
    return model
