"""Text from a grown model, from every depth of a run, or from a composition with who said what.

Shapes: E experts, B batch, T positions.
"""

from __future__ import annotations

import itertools
import math
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.text import Text
from transformers import (
    PreTrainedModel,
    PreTrainedTokenizerBase,
    StoppingCriteria,
    StoppingCriteriaList,
    TextIteratorStreamer,
    set_seed,
)

from nacre import composition
from nacre import tokenizer as tokenizers
from nacre.errors import CheckpointError, ConfigError, Problem
from nacre.models import stock
from nacre.train import checkpoint, files

NEW_TOKENS = 100
COLORS = ("cyan", "magenta", "yellow", "green", "blue", "red")
"""Of the experts of a composition, in order; used again where there are more."""


@dataclass(frozen=True)
class Sampling:
    """How to draw tokens; the names and meanings are those of transformers' `generate`.

    A temperature of 0 takes the likeliest token every time. Without `max_new_tokens` there are
    `NEW_TOKENS`, or as many as the model's context has room for.
    """

    max_new_tokens: int | None = None
    temperature: float = 0.8
    top_k: int = 50
    top_p: float = 0.95
    repetition_penalty: float = 1.0
    seed: int = 0

    def options(self) -> dict[str, Any]:
        """Return keyword arguments for `generate`; raise `ConfigError` with every problem."""
        problems: list[Problem] = []
        if self.max_new_tokens is not None and self.max_new_tokens < 1:
            problems.append(Problem("--max-new-tokens", f"{self.max_new_tokens} is less than 1"))
        if not (math.isfinite(self.temperature) and self.temperature >= 0):
            message = f"{self.temperature} is not a number from 0 on"
            problems.append(Problem("--temperature", message, "0 is greedy"))
        if self.top_k < 0:
            problems.append(Problem("--top-k", f"{self.top_k} is negative", "0 keeps every token"))
        if not 0 <= self.seed < 2**32:
            message = f"{self.seed} is not in 0 to {2**32 - 1:,}"
            problems.append(Problem("--seed", message))
        if not 0 < self.top_p <= 1:
            problems.append(Problem("--top-p", f"{self.top_p} is not in (0, 1]"))
        if not (math.isfinite(self.repetition_penalty) and self.repetition_penalty > 0):
            message = f"{self.repetition_penalty} is not a positive number"
            problems.append(Problem("--repetition-penalty", message, "1 changes nothing"))
        if problems:
            raise ConfigError(problems)
        options: dict[str, Any] = {
            "repetition_penalty": self.repetition_penalty,
            "do_sample": self.temperature > 0,
        }
        if self.max_new_tokens is not None:
            options["max_new_tokens"] = self.max_new_tokens
        if self.temperature > 0:
            options |= {
                "temperature": self.temperature, "top_k": self.top_k, "top_p": self.top_p,
            }  # fmt: skip
        return options


def generate(path: str | Path, prompt: str, sampling: Sampling | None = None) -> Iterator[str]:
    """Yield the continuation of `prompt` piece by piece as it is made; a run means its last stage.

    `path` is a stage, a run, any Hugging Face folder or a composition. Raises `ConfigError` for
    impossible options and `CheckpointError` for a path without a model, both before anything is
    yielded. To close the iterator ends the generation.
    """
    sampling = sampling or Sampling()
    options = sampling.options()
    folder = checkpoint.newest(path)
    model = composition.load_on_device(folder)
    tokenizer = tokenizers.load(folder)
    inputs, options["max_new_tokens"] = encode(prompt, tokenizer, model, sampling.max_new_tokens)
    return _stream(model, tokenizer, inputs, options, sampling.seed)


def generate_at_depths(
    run: str | Path, prompt: str, sampling: Sampling | None = None
) -> Iterator[tuple[dict[str, Any], str]]:
    """Yield (stage record, continuation of `prompt`) for every finished stage of a run."""
    sampling = sampling or Sampling()
    sampling.options()
    folders = files.stages(Path(run))
    if not folders:
        raise CheckpointError(f"{run}: holds no stages (--depths needs a run folder)")
    return ((files.read_stage(path), "".join(generate(path, prompt, sampling))) for path in folders)


@torch.no_grad()
def trace(path: str | Path, prompt: str, sampling: Sampling | None = None) -> list[dict[str, Any]]:
    """Continue `prompt` with a composition; return for every new token who carried it.

    Each entry has the `token`, its `text` (empty inside a character that later tokens complete) and
    `weights`: the share of each expert, by name, in the distribution that the token was drawn from.
    The shares come from one pass over the whole text, in which no expert is skipped. Raises
    `ConfigError` for a path that is no composition or is mixed by an adapter, and as `generate`
    does.
    """
    sampling = sampling or Sampling()
    options = sampling.options()
    if not composition.is_composition(path):
        fix = "make one with `nacre compose`"
        raise ConfigError(Problem("--weights-trace", f"{path} is no composition", fix))
    if composition.read_record(path)["mix"]["name"] == "adapter":
        message = f"{path} is mixed by an adapter, which has no weights for each expert"
        raise ConfigError(Problem("--weights-trace", message, "use another rule"))
    model: Any = composition.load_on_device(path)
    tokenizer = tokenizers.load(path)
    ids_BT, options["max_new_tokens"] = encode(prompt, tokenizer, model, sampling.max_new_tokens)
    set_seed(sampling.seed)
    whole_BT = model.generate(inputs=ids_BT, attention_mask=torch.ones_like(ids_BT), **options)
    new = whole_BT[0, ids_BT.shape[1] :].tolist()
    scored = model(whole_BT[:, :-1], logits_to_keep=len(new), use_cache=False)
    shares_TE = scored.log_weights[:, 0].exp().T.tolist()
    return [
        {
            "token": token,
            "text": text,
            "weights": dict(zip(model.expert_names, shares, strict=True)),
        }
        for token, text, shares in zip(
            tokenizer.convert_ids_to_tokens(new), pieces(tokenizer, new), shares_TE, strict=True
        )
    ]


def painted(prompt: str, traced: Sequence[Mapping[str, Any]]) -> Text:
    """Return what `trace` found for a terminal: text in its leading expert's colour, and a legend.

    The legend gives each expert's mean share.
    """
    names = list(traced[0]["weights"])
    colors = dict(zip(names, itertools.cycle(COLORS), strict=False))
    text = Text(prompt)
    for token in traced:
        weights = token["weights"]
        text.append(token["text"], style=colors[max(weights, key=weights.__getitem__)])
    text.append("\n\n")
    for name in names:
        share = sum(token["weights"][name] for token in traced) / len(traced)
        text.append(f"{name} {share:.0%}", style=colors[name]).append("  ")
    return text


def pieces(
    tokenizer: PreTrainedTokenizerBase, ids: list[int], before: Sequence[str] = ()
) -> Iterator[str]:
    """Yield what each token adds to the text; the last token of a character adds all of it.

    `before` are the pieces of the first tokens, known from a longer beginning of the same text:
    those of the tokens after them are yielded.
    """
    shown = "".join(before)
    for end in range(len(before) + 1, len(ids) + 1):
        text = str(tokenizer.decode(ids[:end], skip_special_tokens=True))
        whole = text if end == len(ids) else text.rstrip("\ufffd")
        yield whole[len(shown) :]
        shown = whole if len(whole) > len(shown) else shown


def encode(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    new_tokens: int | None = None,
) -> tuple[torch.Tensor, int]:
    """Return the prompt's ids, int64 `[1, T]` beside the model, and how many tokens may follow.

    Raises `ConfigError` if prompt and `new_tokens`, or one where these are None, do not fit the
    model's context together.
    """
    ids_BT, room = opening(prompt, tokenizer, model)
    length = ids_BT.shape[1]
    wanted: int = max(1, min(NEW_TOKENS, room)) if new_tokens is None else new_tokens
    if wanted > room:
        message = f"{length} of the prompt and {wanted} new ones exceed {length + room}"
        fix = "shorten the prompt" + (f" or use --max-new-tokens {room}" if room > 0 else "")
        raise ConfigError(Problem("tokens", message, fix))
    return ids_BT, wanted


def opening(
    prompt: str,
    tokenizer: PreTrainedTokenizerBase,
    model: PreTrainedModel,
    what: str = "the prompt",
) -> tuple[torch.Tensor, int]:
    """Return a prompt's ids, int64 `[1, T]` beside the model, and the room after them in tokens.

    An empty prompt is the start of a document. Raises `ConfigError` for text that is no Unicode.
    """
    tokenizers.check_text(prompt, what)
    ids = tokenizer(prompt)["input_ids"] or [tokenizers.end_of_document(tokenizer)]
    room = (stock.positions(model.config) or sys.maxsize) - len(ids)
    return torch.tensor([ids], device=model.device), room


def _stream(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    ids_BT: torch.Tensor,
    options: dict[str, Any],
    seed: int,
) -> Iterator[str]:
    streamer = TextIteratorStreamer(
        tokenizer,  # pyright: ignore[reportArgumentType]
        skip_prompt=True,
        skip_special_tokens=True,
    )
    failure: list[BaseException] = []
    abandoned = threading.Event()

    def work() -> None:
        try:
            set_seed(seed)
            model.generate(  # pyright: ignore[reportCallIssue]
                inputs=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                streamer=streamer,
                stopping_criteria=StoppingCriteriaList([_StopAt(abandoned)]),
                **options,
            )
        except BaseException as error:
            failure.append(error)
            streamer.end()

    thread = threading.Thread(target=work, daemon=True)
    thread.start()
    try:
        yield from streamer
    finally:
        abandoned.set()
        thread.join()
    if failure:
        raise failure[0]


class _StopAt(StoppingCriteria):
    """Ends a generation before its next token once an event is set."""

    def __init__(self, event: threading.Event) -> None:
        self.event = event

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **_: Any) -> torch.BoolTensor:
        return torch.full(  # pyright: ignore[reportReturnType]
            input_ids.shape[:1], self.event.is_set(), dtype=torch.bool, device=input_ids.device
        )
