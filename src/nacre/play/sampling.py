"""Tokens drawn one by one from any causal language model, with who carried each.

A loop of our own, over the logits processors of `transformers`: several models can then take turns,
two people can draw at once, and a seed gives the same text whoever else is drawing.

Shapes: E experts, B = 1, T positions, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from transformers import (
    LogitsProcessorList,
    PreTrainedModel,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from nacre.generation import NEW_TOKENS, Sampling


@dataclass(frozen=True)
class Drawn:
    """A token, and the experts' shares at each position that was read to draw it.

    `shares` is `[positions][E]`: the prompt's for the first token, one position for the others. The
    last are those that the token itself was drawn with. Empty for a model that is no composition.
    """

    token: int
    shares: list[list[float]]


def draw(
    model: PreTrainedModel, ids_BT: torch.Tensor, sampling: Sampling, stop: Collection[int] = ()
) -> Iterator[Drawn]:
    """Yield new tokens after `ids_BT` (int64 `[1, T]`) until one of `stop` or enough are drawn.

    Greedy and sampled choices are those of `generate` of transformers; the random numbers are our
    own. Raises ConfigError for options that cannot be.
    """
    sampling.options()
    return _draw(model, ids_BT, sampling, stop)


@torch.inference_mode()
def _draw(
    model: PreTrainedModel, ids_BT: torch.Tensor, sampling: Sampling, stop: Collection[int]
) -> Iterator[Drawn]:
    processors = _processors(sampling)
    generator = torch.Generator().manual_seed(sampling.seed)
    unread_BT, cache = ids_BT, None
    for _ in range(sampling.max_new_tokens or NEW_TOKENS):
        output: Any = model(input_ids=unread_BT, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        scores_BV: Any = processors(ids_BT, output.logits[:, -1].float())  # pyright: ignore
        if sampling.temperature > 0:
            unread_BT = torch.multinomial(scores_BV.softmax(-1), 1, generator=generator)
        else:
            unread_BT = scores_BV.argmax(-1, keepdim=True)
        token = int(unread_BT)
        if token in stop:
            return
        log_weights_EBT = getattr(output, "log_weights", None)
        shares = [] if log_weights_EBT is None else log_weights_EBT[:, 0].exp().T.tolist()
        yield Drawn(token, shares)
        ids_BT = torch.cat([ids_BT, unread_BT], 1)


def _processors(sampling: Sampling) -> LogitsProcessorList:
    """Return what `generate` would apply to the logits, in its order."""
    chosen: list[Any] = []
    if sampling.repetition_penalty != 1:
        chosen.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.temperature > 0:
        chosen.append(TemperatureLogitsWarper(sampling.temperature))
        if sampling.top_k:
            chosen.append(TopKLogitsWarper(sampling.top_k))
        if sampling.top_p < 1:
            chosen.append(TopPLogitsWarper(sampling.top_p))
    return LogitsProcessorList(chosen)
