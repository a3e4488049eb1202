"""lm-eval's model class with fewer tokens to read, and the same answers.

Importing this needs lm_eval, which is an extra.

Shapes: B rows, T positions, V vocabulary, U distinct beginnings.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import inspect
import itertools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from lm_eval.models import huggingface
from transformers import Cache, PreTrainedModel, PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.errors import ConfigError, Problem
from nacre.evaluate.scores import damaged
from nacre.train.observer import Observer

BATCH_TOKENS = {"cpu": 1024, "cuda": 16384}
"""Read at once: on a CPU more no longer fits its caches, and is slower."""

BATCH_SIZE = 64
"""Requests read at once, at most."""

WORTH = 16
"""Beginnings are read apart where that saves at least one token of so many."""

HFLM: Any = huggingface.HFLM  # a decorator without types hides what it is

Request = tuple[tuple[str, str] | None, list[int], list[int]]
"""As in HFLM: the strings, the ids of the context and those of the continuation."""


@dataclass(frozen=True)
class _Row:
    """Ids that the model reads, the first position whose logits count, and which requests ask."""

    ids: tuple[int, ...]
    first: int
    requests: tuple[int, ...]


class Likelihood(HFLM):
    """Scores continuations of contexts as HFLM does, from the same requests.

    Rows of about the same length are read together, at most `batch_size` of them and about
    `BATCH_TOKENS`; what several rows begin with (a context and its options, a task's description or
    examples) is read once and its keys and values are shared; logits are made only where they
    count. `cut` counts the requests whose beginning was cut off to fit the context, and `progress`
    receives the places of the requests that were answered since its last call. The model is left in
    evaluation mode, the tokenizer as it is; errors call the model `name`. Raises ConfigError for a
    tokenizer without a token to begin a text with, and, when asked for it, for a continuation that
    does not fit the context; CheckpointError for a likelihood that is not finite.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        *,
        name: str = "the model",
        batch_size: int | None = None,
        progress: Callable[[Sequence[int]], None] | None = None,
    ) -> None:
        first = tokenizer.bos_token_id
        with quiet():
            super().__init__(
                pretrained=model,
                backend="causal",
                tokenizer=copy.deepcopy(tokenizer),  # HFLM gives it a padding token
                batch_size=BATCH_SIZE if batch_size is None else batch_size,
                prefix_token_id=tokenizers.end_of_document(tokenizer) if first is None else first,
            )
        self.name = name
        self.progress = progress
        self.cut = 0
        known = inspect.signature(model.forward).parameters
        self._may_keep = "logits_to_keep" in known
        self._may_share = "past_key_values" in known
        self._keep = 0
        # the options of a question share its context
        self.tok_encode = functools.lru_cache(maxsize=4)(self.tok_encode)

    def _encode_pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        before, after = super()._encode_pair(context, continuation)
        if not after:  # the last token of the context reaches to the end; HFLM stops here
            before = self.tok_encode(context)
            after = self.tok_encode(continuation, add_special_tokens=False)
        return before, after

    def _loglikelihood_tokens(
        self,
        requests: Sequence[Request],
        disable_tqdm: bool = False,
        override_bs: int | None = None,
    ) -> list[tuple[float, bool]]:
        fitting = [self._fit(request) for request in requests]
        answers = [(0.0, False)] * len(requests)
        for batch in self._batches(_rows(fitting)):
            longest = max(len(row.ids) for row in batch)
            self._keep = longest - min(row.first for row in batch)
            asked = [index for row in batch for index in row.requests]
            found = super()._loglikelihood_tokens([fitting[i] for i in asked], disable_tqdm=True)
            for index, (nats, greedy) in zip(asked, found, strict=True):
                if not math.isfinite(nats):
                    whose = f"{_shown(fitting[index])} ({nats} nats)"
                    raise damaged(f"{self.name} gives no finite likelihood for {whose}")
                answers[index] = nats, greedy
            if self.progress:
                self.progress(asked)
        return answers

    def _fit(self, request: Request) -> Request:
        """Cut off the beginning of a context that does not fit."""
        strings, context, continuation = request
        if len(continuation) > self.max_length:
            size = f"{len(continuation)} tokens, the model reads {self.max_length}"
            message = f"{_shown(request)} is {size}"
            raise ConfigError(Problem("an answer to score", message, "leave its task out"))
        too_long = len(context) + len(continuation) - (self.max_length + 1)
        if too_long <= 0:
            return request
        self.cut += 1
        return strings, context[too_long:], continuation

    def warn_of_cuts(self, task: str, requests: int, observer: Observer) -> None:
        """Say how many of a task's requests lost their beginning, if some did."""
        if self.cut:
            observer.warn(
                f"{self.name}: {self.cut:,} of {requests:,} requests of {task} are longer than the "
                f"context of {self.max_length} tokens: their beginning was cut off"
            )

    def _batches(self, rows: Sequence[_Row]) -> Iterator[list[_Row]]:
        """Yield rows that are read together, in order; what all begin with counts once."""
        most = BATCH_TOKENS.get(self.device.type, BATCH_TOKENS["cuda"])
        batch: dict[tuple[int, ...], _Row] = {}
        shared = longest = 0
        for row in rows:
            size = len(row.ids)
            common = min(shared, _common(row.ids, next(iter(batch)))) if batch else size
            tokens = common + (len(batch) + 1) * (max(longest, size) - common)
            full = len(batch) == self.batch_size or tokens > most
            if batch and (full or row.ids in batch):  # HFLM would take equal ids for one row
                yield list(batch.values())
                batch, common, longest = {}, size, 0
            shared, longest = common, max(longest, size)
            batch[row.ids] = row
        if batch:
            yield list(batch.values())

    @torch.no_grad()
    def _model_call(
        self,
        inps: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the logits of the last positions, from where they count."""
        (rows, length), keep = inps.shape, self._keep
        kept: dict[str, Any] = {"logits_to_keep": keep} if self._may_keep else {}
        shared, saved = _beginning(inps.tolist(), length - keep) if self._may_share else (0, 0)
        if saved * WORTH > rows * length:
            begun_UT, which_B = inps[:, :shared].unique(dim=0, return_inverse=True)
            last: dict[str, Any] = {"logits_to_keep": 1} if self._may_keep else {}
            cache = self.model(begun_UT, use_cache=True, **last).past_key_values
            if isinstance(cache, Cache):
                cache.batch_select_indices(which_B)
                rest_BT = inps[:, shared:]
                logits_BTV = self.model(rest_BT, past_key_values=cache, use_cache=True, **kept)
                return logits_BTV.logits[:, -keep:]
        return self.model(inps, use_cache=False, **kept).logits[:, -keep:]


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Leave out what lm-eval warns of: that the model is loaded already."""
    logger = logging.getLogger("lm_eval.models.huggingface")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(level)


def _shown(request: Request) -> str:
    """Return the beginning of what is scored, for an error."""
    text = request[0][1].strip() if request[0] else ""
    return repr(text if len(text) <= 40 else f"{text[:40]}...")


def _rows(requests: Sequence[Request]) -> list[_Row]:
    """Return what is to be read, each once: the longest first, but what is akin together.

    Akin are rows that have the first half in common: the options of a question, questions about one
    text or after the same examples.
    """
    asking: dict[tuple[tuple[int, ...], int], list[int]] = {}
    for index, (_, context, continuation) in enumerate(requests):
        ids = (*context, *continuation[:-1])
        asking.setdefault((ids, len(ids) - len(continuation)), []).append(index)
    families: list[list[_Row]] = []
    for (ids, first), indices in sorted(asking.items()):
        row = _Row(ids, first, tuple(indices))
        if families and 2 * _common(families[-1][-1].ids, ids) > len(ids):
            families[-1].append(row)
        else:
            families.append([row])
    for family in families:
        family.sort(key=lambda row: (-row.first, row.ids))
    families.sort(key=lambda family: -len(family[0].ids))
    return [row for family in families for row in family]


def _beginning(rows: Sequence[list[int]], most: int) -> tuple[int, int]:
    """Return how many first tokens, up to `most`, to read once for all rows that begin so.

    And how many tokens of the rows need then not be read: as many as possible.
    """
    common = sorted(min(most, _common(a, b)) for a, b in itertools.pairwise(sorted(rows)))
    saved = [(length * (len(common) - index), length) for index, length in enumerate(common)]
    tokens, length = max(saved, default=(0, 0))
    return length, tokens


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    """Return how many first tokens are the same."""
    return next(
        (i for i, (x, y) in enumerate(zip(a, b, strict=False)) if x != y), min(len(a), len(b))
    )
