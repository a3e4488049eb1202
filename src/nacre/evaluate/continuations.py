"""What a model writes after many prompts: in batches, with the key-value cache.

Shapes: B prompts of a batch, C continuations of each, T positions, N new tokens.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from transformers import (
    Cache,
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nacre import tokenizer as tokenizers
from nacre.evaluate.scores import damaged
from nacre.models import stock
from nacre.train.observer import Observer

BATCH_TOKENS = {"cpu": 8192, "cuda": 131072}
"""Of all continuations of a batch with their prompts: what its cache holds."""


def room(model: PreTrainedModel, new_tokens: int) -> tuple[int | None, int]:
    """Return the most tokens of a prompt, None for any number, and how many new ones follow it.

    New tokens get at most half of the context.
    """
    context = stock.positions(model.config)
    if context is None:
        return None, new_tokens
    new = max(1, min(new_tokens, context // 2))
    return max(1, context - new), new


def encode(tokenizer: PreTrainedTokenizerBase, prompts: Sequence[str]) -> list[list[int]]:
    """Return the ids of prompts; an empty one is the start of a document."""
    begin = [tokenizers.end_of_document(tokenizer)]
    return [ids or begin for ids in tokenizer(list(prompts)).input_ids]


@torch.no_grad()
def write(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    prompts: Sequence[str],
    *,
    new_tokens: int,
    copies: int = 1,
    sample: bool = False,
    seed: int = 0,
    stop: str = "",
    where: str = "the model",
    observer: Observer | None = None,
) -> list[list[str]]:
    """Continue every prompt `copies` times by up to `new_tokens`, on the model's device.

    The likeliest token is taken each time, or with `sample` one is drawn from the model's own
    distribution, from `seed` on. A text ends before `stop` or the end of the document. Prompts of
    about the same length are read together, each once for all of its copies; which are together
    changes no likeliest token. A prompt that does not fit beside the new tokens loses its
    beginning.
    Returns the texts of every prompt. The observer's units are prompts; it is warned of those that
    were cut. Raises CheckpointError for a model whose scores are no numbers (`where` names it) and
    ConfigError for a tokenizer without a token to end a document.
    """
    end = tokenizers.end_of_document(tokenizer)
    most, new_tokens = room(model, new_tokens)
    watch, encoded = observer or Observer(), encode(tokenizer, prompts)
    kept = [ids if most is None else ids[-most:] for ids in encoded]
    cut = sum(len(ids) > len(rest) for ids, rest in zip(encoded, kept, strict=True))
    if cut:
        watch.warn(
            f"{where}: {cut:,} of {len(kept):,} prompts are longer than {most} tokens, what the "
            f"context leaves beside {new_tokens} new ones: their beginning was cut off"
        )
    drawn: dict[str, Any] = {"temperature": 1.0, "top_k": 0, "top_p": 1.0} if sample else {}
    config = GenerationConfig(
        max_new_tokens=new_tokens, do_sample=sample, **drawn,
        eos_token_id=[end, *_tokens_with(tokenizer, stop)], pad_token_id=end, use_cache=True,
    )  # fmt: skip
    texts: list[list[str]] = [[] for _ in prompts]
    devices = [model.device] if model.device.type == "cuda" else []
    budget = BATCH_TOKENS.get(model.device.type, BATCH_TOKENS["cuda"])
    model.eval()
    with _own_defaults(model), torch.random.fork_rng(devices):
        torch.manual_seed(seed)
        for batch in _batches([len(ids) for ids in kept], budget // copies, new_tokens):
            rows = [kept[index] for index in batch]
            ids_BT, mask_BT = (side.to(model.device) for side in _padded(rows, end))
            new_BCN = _continue(model, ids_BT, mask_BT, copies, config, where)
            for index, new_CN in zip(batch, new_BCN.tolist(), strict=True):
                found = tokenizer.batch_decode(new_CN, skip_special_tokens=True)
                texts[index] = [text.partition(stop)[0] if stop else text for text in found]
            watch.advance(len(batch))
    return texts


def _tokens_with(tokenizer: PreTrainedTokenizerBase, stop: str) -> list[int]:
    """Return the tokens in whose text `stop`, a single character, occurs."""
    if not stop:
        return []
    shown = tokenizer.batch_decode([[index] for index in range(len(tokenizer))])
    return [index for index, text in enumerate(shown) if stop in text]


def _batches(lengths: Sequence[int], budget: int, new_tokens: int) -> Iterator[list[int]]:
    """Yield which prompts are read together, the longest first."""
    order = sorted(range(len(lengths)), key=lambda index: -lengths[index])
    begin = 0
    while begin < len(order):
        size = max(1, budget // (lengths[order[begin]] + new_tokens))
        yield order[begin : begin + size]
        begin += size


def _padded(rows: Sequence[list[int]], padding: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask, int64 `[B, T]`, padded on the left."""
    longest = max(map(len, rows))
    ids = [[padding] * (longest - len(row)) + row for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


def _continue(
    model: PreTrainedModel,
    ids_BT: torch.Tensor,
    mask_BT: torch.Tensor,
    copies: int,
    config: GenerationConfig,
    where: str,
) -> torch.Tensor:
    """Return the new tokens, int64 `[B, C, N]`."""
    begun: dict[str, Any] = {}
    if copies > 1 and ids_BT.shape[1] > 1:
        cache = _read(model, ids_BT[:, :-1], mask_BT[:, :-1])
        if cache is not None:
            cache.batch_repeat_interleave(copies)
            begun["past_key_values"] = cache
    whole: Any = model.generate(  # pyright: ignore[reportCallIssue]
        inputs=ids_BT.repeat_interleave(copies, 0),
        attention_mask=mask_BT.repeat_interleave(copies, 0),
        generation_config=config,
        logits_processor=LogitsProcessorList([_Numbers(where)]),
        **begun,
    )
    return whole[:, ids_BT.shape[1] :].unflatten(0, (len(ids_BT), copies))


def _read(model: PreTrainedModel, ids_BT: torch.Tensor, mask_BT: torch.Tensor) -> Cache | None:
    """Return the keys and values of prompts, None where the model has no cache to go on from."""
    known = inspect.signature(model.forward).parameters
    if "past_key_values" not in known:
        return None
    given: dict[str, Any] = {"logits_to_keep": 1} if "logits_to_keep" in known else {}
    if "position_ids" in known:
        given["position_ids"] = (mask_BT.cumsum(1) - 1).clamp(min=0)
    cache = model(input_ids=ids_BT, attention_mask=mask_BT, use_cache=True, **given).past_key_values
    return cache if isinstance(cache, Cache) else None


class _Numbers(LogitsProcessor):
    """Refuses scores that are no numbers, before a token is drawn from them."""

    def __init__(self, where: str) -> None:
        self.where = where

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        if scores.isnan().any():
            raise damaged(f"{self.where} gives scores that are no numbers")
        return scores


@contextmanager
def _own_defaults(model: PreTrainedModel) -> Iterator[None]:
    """Leave out what a model's generation_config.json would add: penalties, a least length."""
    before = model.generation_config
    model.generation_config = GenerationConfig()
    try:
        yield
    finally:
        model.generation_config = before
