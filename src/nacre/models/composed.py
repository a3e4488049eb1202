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
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    GenerationMixin,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.modeling_outputs import CausalLMOutputWithPast

from . import stock
from .composed_cache import ComposedCache
from .composed_layout import Layout, Segment, view
from .mixing import Rule, log_likelihood, mix, mix_logits, mix_probs, posterior, top_k

TILE_BYTES = (2**20, 64 * 2**20)  # of all experts' fp32 logits at once, at least and at most
TILE_SHARE = 12  # between these, this part of the mixed logits


class ComposedConfig(PreTrainedConfig):
    """Names, places and shared parts of the experts, and the mixing rule.

    `experts` has for each expert its `name`, `path` (relative to the composition's folder, or
    absolute), `fingerprint` or None, and `parts`: hashes of its embedding and of every block, by
    which shared ones are recognised. `mix` is what `Rule.as_json` gives.
    """

    model_type = "nacre-composed"

    def __init__(
        self,
        experts: Sequence[dict[str, Any]] = (),
        mix: dict[str, Any] | None = None,
        vocab_size: int = 0,
        max_position_embeddings: int = 0,
        **kwargs: Any,
    ) -> None:
        self.experts = [dict(expert) for expert in experts]
        self.mix = dict(mix or {"name": "posterior"})
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)


@dataclass
class ComposedOutput(CausalLMOutputWithPast):
    """The mixed output; `log_weights` (fp32 `[E, B, T]`) say who carried each position.

    `logits` (fp32 `[B, T, V]`) are log-probabilities where the rule mixes probabilities.
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
        self.arrangement = 0
        self.arrange()

    @classmethod
    def from_pretrained(
        cls, pretrained_model_name_or_path: Any, *args: Any, config: Any = None, **kwargs: Any
    ) -> ComposedForCausalLM:
        """Load a composition's folder: its config, then every expert from its own place.

        `dtype`, `device_map` and `attn_implementation` go to the experts. Raises ValueError for a
        folder whose experts are not where its config says, or lack tensors.
        """
        folder = Path(pretrained_model_name_or_path)
        if config is None:
            config = ComposedConfig.from_pretrained(folder)
        known = ("dtype", "torch_dtype", "device_map", "attn_implementation")
        passed = {key: value for key, value in kwargs.items() if key in known}
        places = [folder / expert["path"] for expert in config.experts]
        for expert, place in zip(config.experts, places, strict=True):
            if not (place / "config.json").is_file():
                raise ValueError(f"{folder}: expert {expert['name']!r} is not in {place}")
        model = cls(config, [_load_expert(place, **passed) for place in places])
        if (folder / "generation_config.json").is_file():
            model.generation_config = GenerationConfig.from_pretrained(folder)
        return model

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
        self.rule, self.parts = rule, all_parts
        self.eval()
        self.exact = [stock.splits_exactly(model, 0) for model in self.experts]  # pyright: ignore
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
        that is there, another vocabulary, or a rule that has numbers for each expert; the
        composition is then as it was.
        """
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
        for the only expert, or if no expert with a weight would be left.
        """
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
        cache = past_key_values
        if cache is None:
            starts = [segment.start for segment in self.layout.segments]
            cache = ComposedCache(starts, len(self.experts), self.arrangement)
        elif not isinstance(cache, ComposedCache) or cache.arrangement != self.arrangement:
            raise ValueError("past_key_values: not of these experts (begin the text without)")
        input_ids = input_ids.long()
        batch, new = input_ids.shape
        past = cache.get_seq_length()
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

    def _logits(self, expert: int, reached_BTD: torch.Tensor) -> torch.Tensor:
        return self.parts[expert].head(reached_BTD) if self.exact[expert] else reached_BTD

    def _score(
        self, cache: ComposedCache, new: int, keep: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
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
                tile = {e: self._logits(e, reached[e][:, begin:end]) for e in self.playing}
                self._count(cache, tile, first + begin)
                self._remember(cache, tile)
        tiles = list(self._tiles(batch, unkept, new))
        output_BTV = torch.empty(0)
        if len(tiles) > 1:
            shape_BTV = (batch, kept, self.config.vocab_size)
            output_BTV = torch.empty(shape_BTV, device=cache.ids_BT.device)
        weights: list[torch.Tensor] = []
        for begin, end in tiles:
            tile = {e: self._logits(e, reached[e][:, begin:end]) for e in self.playing}
            logits = [tile.get(expert) for expert in range(len(self.experts))]
            observed_EBT = real_BT = None
            if self.rule.reads_text:
                observed_EBT, real_BT = self._observed(cache, tile, first + begin)
                self._remember(cache, tile)
            mixed = mix(self.rule, logits, observed_EBT, cache.state_EB, real_BT)
            cache.state_EB = mixed.state_EB
            weights.append(mixed.log_weights_EBT)
            if len(tiles) == 1:
                output_BTV = mixed.output_BTV
            else:
                output_BTV[:, begin - unkept : end - unkept] = mixed.output_BTV
            del tile, logits, mixed
        cache.read = [cache.get_seq_length()] * len(self.experts)
        cache.counted = list(cache.read)
        return output_BTV, torch.cat(weights, -1) if len(weights) > 1 else weights[0]

    def _tiles(self, batch: int, low: int, high: int) -> Iterator[tuple[int, int]]:
        """Yield (begin, end) of positions from `low` to `high`."""
        row = 4 * batch * self.config.vocab_size
        least, most = TILE_BYTES
        size = min(max(row * (high - low) // TILE_SHARE, least), most) // (row * len(self.playing))
        for begin in range(low, high, max(1, size)):
            yield begin, min(begin + max(1, size), high)

    def _observed(
        self, cache: ComposedCache, logits: dict[int, torch.Tensor], first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log p_e of the tokens from `first` on, `[E, B, T]`, and where it counts, `[B, T]`.

        `logits` `[B, T, V]` are experts' at these positions; their `last` are those before them. It
        counts where a token stands and another stands before it.
        """
        length = next(iter(logits.values())).shape[1]
        ids_BT = cache.ids_BT[:, first : first + length]
        before_BT = nn.functional.pad(cache.mask_BT[:, :-1], (1, 0))
        real_BT = (cache.mask_BT & before_BT)[:, first : first + length]
        observed_EBT = torch.zeros(len(self.experts), *ids_BT.shape, device=ids_BT.device)
        lasts = {e: last_BV for e in logits if (last_BV := cache.last[e]) is not None}
        if lasts:
            log_p_RBV = torch.stack(list(lasts.values())).log_softmax(-1)
            token_RB1 = ids_BT[:, :1].expand(len(lasts), -1, -1)
            observed_EBT[list(lasts), :, :1] = log_p_RBV.gather(-1, token_RB1)
        if length > 1:
            for expert, logits_BTV in logits.items():
                likelihood_Bt = log_likelihood(logits_BTV[:, :-1], ids_BT[:, 1:])
                observed_EBT[expert, :, 1:] = likelihood_Bt
        return observed_EBT, real_BT

    def _count(
        self, cache: ComposedCache, logits: dict[int, torch.Tensor], first: int
    ) -> torch.Tensor:
        """Move on some experts' likelihood sums by tokens that are not in them; others' stay.

        Returns the log weights that all experts then have by the posterior, `[E, B, T]`.
        """
        observed_EBT, real_BT = self._observed(cache, logits, first)
        real_EBT = real_BT.new_zeros(observed_EBT.shape)
        for expert in logits:
            known = max(0, cache.counted[expert] - first)
            real_EBT[expert, :, known:] = real_BT[:, known:]
            cache.counted[expert] = max(cache.counted[expert], first + real_BT.shape[1])
        rule, prior = self.rule, self.rule.shares(len(self.experts))
        log_weights_EBT, cache.state_EB = posterior(
            observed_EBT, prior, rule.decay, cache.state_EB, floor=rule.floor, mask=real_EBT
        )
        return log_weights_EBT

    def _remember(self, cache: ComposedCache, logits: dict[int, torch.Tensor]) -> None:
        for expert, logits_BTV in logits.items():
            cache.last[expert] = logits_BTV[:, -1].to(torch.float32, copy=True)
            cache.read[expert] += logits_BTV.shape[1]

    def _catch_up(self, cache: ComposedCache, expert: int, reached_BTD: torch.Tensor) -> None:
        """Read the positions that a skipped expert missed into its likelihood sum."""
        for begin, end in self._tiles(reached_BTD.shape[0], 0, reached_BTD.shape[1]):
            tile = {expert: self._logits(expert, reached_BTD[:, begin:end])}
            self._count(cache, tile, cache.read[expert])
            self._remember(cache, tile)

    def _step(self, cache: ComposedCache) -> tuple[torch.Tensor, torch.Tensor]:
        """Mix the one new position; experts that are not among the k best are not run."""
        here, k = cache.get_seq_length() - 1, self.rule.k
        before: dict[int, torch.Tensor] = {}
        for expert in self.playing:
            last_BV = cache.last[expert]
            if cache.read[expert] == here and last_BV is not None:
                before[expert] = last_BV.unsqueeze(1)
        log_weights_EB1 = top_k(self._count(cache, before, here), k)
        logits: dict[int, torch.Tensor] = {}
        while wanted := [
            expert
            for expert, largest in enumerate(log_weights_EB1.amax((1, 2)).tolist())
            if largest > -math.inf and expert not in logits
        ]:
            for expert, reached_BTD in self._run(cache, wanted).items():
                logits[expert] = self._logits(expert, reached_BTD[:, -1:])
                if reached_BTD.shape[1] > 1:
                    self._catch_up(cache, expert, reached_BTD[:, :-1])
                    here_EB1 = self._count(cache, {expert: logits[expert]}, here)
                    log_weights_EB1 = top_k(here_EB1, k)
                self._remember(cache, {expert: logits[expert]})
        run, part_RB1 = list(logits.values()), log_weights_EB1[list(logits)]
        if self.rule.mixes_logits:
            return mix_logits(run, part_RB1.exp()), log_weights_EB1
        return mix_probs(run, part_RB1), log_weights_EB1


def _loss(output_BTV: torch.Tensor, labels_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean of -log p of the next labels in nats; nan if there are none."""
    targets_BT = labels_BT[:, 1:]
    counts_BT = targets_BT != -100
    likelihood_BT = log_likelihood(output_BTV[:, :-1], targets_BT.masked_fill(~counts_BT, 0))
    return -likelihood_BT[counts_BT].mean()


def _load_expert(place: Path, **passed: Any) -> PreTrainedModel:
    model, loaded = AutoModelForCausalLM.from_pretrained(  # pyright: ignore
        place, use_safetensors=True, output_loading_info=True, **passed
    )
    if wrong := sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]])):
        raise ValueError(f"{place}: {len(wrong)} tensors are missing, first {wrong[0]}")
    return model
