"""The tab *Grow*: one prompt continued at every depth, and what each depth loses on a text.

Shapes: T tokens of a text, V vocabulary.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.errors import ConfigError, Problem
from nacre.generation import NEW_TOKENS, Sampling, opening, pieces
from nacre.models import stock
from nacre.models.mixing import log_likelihood
from nacre.play.markup import LONGEST_TEXT, details, quoted, token, tokens
from nacre.play.models import Depths
from nacre.play.sampling import draw
from nacre.report.formats import to_html
from nacre.report.html import tiles

View = Literal["first", "second", "difference"]

FAR = 3.0  # nats; a difference this large has all its colour
CHUNK = 128  # positions whose logits are held at once


def begin(
    prompt: str, tokenizer: PreTrainedTokenizerBase, model: PreTrainedModel, sampling: Sampling
) -> tuple[torch.Tensor, Sampling]:
    """Return a prompt's ids, int64 `[1, T]`, and the sampling with no more tokens than fit.

    An empty prompt is the start of a document. Raises ConfigError for a text that is too long.
    """
    check_length(prompt, "The prompt")
    ids_BT, room = opening(prompt, tokenizer, model, "The prompt")
    length = ids_BT.shape[1]
    if room < 1:
        message = f"{length} tokens leave no room for new ones"
        raise ConfigError(Problem("The prompt", message, f"this model reads {length + room}"))
    fitting = replace(sampling, max_new_tokens=min(sampling.max_new_tokens or NEW_TOKENS, room))
    return ids_BT, fitting


def check_length(text: str, what: str) -> None:
    """Raise ConfigError for a text of more than `LONGEST_TEXT` characters."""
    if len(text) > LONGEST_TEXT:
        message = f"{len(text):,} characters are too many"
        raise ConfigError(Problem(what, message, f"{LONGEST_TEXT:,} at most"))


def stops(tokenizer: PreTrainedTokenizerBase) -> set[int]:
    """Return the ids that end a text."""
    return {tokenizers.end_of_document(tokenizer)}


def continue_at(
    depths: Depths, places: Sequence[int], prompt: str, sampling: Sampling
) -> Iterator[list[str]]:
    """Yield the continuations so far at the depths `places`, which take turns token by token.

    Each depth draws with the same seed. Raises as `begin` and `Sampling` do.
    """
    tokenizer = depths.tokenizer
    drawing: list[Iterator[int]] = []
    for place in places:
        model = depths.model(place)
        ids_BT, fitting = begin(prompt, tokenizer, model, sampling)
        drawn = draw(model, ids_BT, fitting, stops(tokenizer))
        drawing.append(each.token for each in drawn)
    ids: list[list[int]] = [[] for _ in places]
    texts = [""] * len(places)
    going = list(range(len(places)))
    while going:
        for index in list(going):
            new = next(drawing[index], None)
            if new is None:
                going.remove(index)
            else:
                ids[index].append(new)
                texts[index] = _text(tokenizer, ids[index])
        yield list(texts)


def _text(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    """Decode ids, without the beginning of a character that is not whole yet."""
    return str(tokenizer.decode(ids, skip_special_tokens=True)).rstrip("\ufffd")


def cards(depths: Sequence[int], prompt: str, texts: Sequence[str], going: bool) -> str:
    """Return continuations side by side, a card for each depth."""
    state = "going" if going else "done"
    inside = "".join(
        f'<article class="card {state}"><h3>{_blocks(depth)}</h3>'
        f"<p><b>{html.escape(prompt)}</b>{html.escape(text)}</p></article>"
        for depth, text in zip(depths, texts, strict=True)
    )
    several = "several" if len(depths) > 1 else "one"
    return f'<div class="cards {several}" aria-live="off">{inside}</div>'


def _blocks(depth: int) -> str:
    return f"{depth} block{'s' if depth != 1 else ''}"


@dataclass(frozen=True)
class Losses:
    """What a model makes of a text: per token the loss in nats, and what it thought likeliest.

    `nats` and `sure` (the likeliest token's probability) are `[T]`, `likeliest` ids `[T]`.
    """

    nats: list[float]
    likeliest: list[int]
    sure: list[float]

    @property
    def mean(self) -> float:
        """Nats a token."""
        return sum(self.nats) / len(self.nats)


@torch.inference_mode()
def read(model: PreTrainedModel, ids: Sequence[int], start: int) -> Losses:
    """Return the loss of every token of `ids`, the first one after the token `start`.

    A text longer than the context is read in windows: each begins half a context further on, so
    that every token but the first window's has at least half a context before it.
    """
    whole = torch.tensor([start, *ids])
    window = stock.positions(model.config) or len(ids)
    nats: list[float] = []
    likeliest: list[int] = []
    sure: list[float] = []
    begin = 0
    while len(nats) < len(ids):
        read_T = whole[begin : begin + window]
        targets_T = whole[begin + 1 : begin + window + 1]
        known = len(nats) - begin
        for found in _chunks(model, read_T[: len(targets_T)], targets_T, known):
            nats += found[0]
            likeliest += found[1]
            sure += found[2]
        begin += max(1, window // 2)
    return Losses(nats, likeliest, sure)


def _chunks(
    model: PreTrainedModel, ids_T: torch.Tensor, targets_T: torch.Tensor, known: int
) -> Iterator[tuple[list[float], list[int], list[float]]]:
    """Yield losses, likeliest tokens and their probabilities, chunk by chunk, from `known` on."""
    cache = None
    for start in range(0, len(ids_T), CHUNK):
        output: Any = model(
            input_ids=ids_T[None, start : start + CHUNK], past_key_values=cache, use_cache=True
        )
        cache = output.past_key_values
        skip = min(max(known - start, 0), output.logits.shape[1])
        logits_BTV = output.logits[:, skip:].float()
        if logits_BTV.shape[1]:
            nats_BT = -log_likelihood(logits_BTV, targets_T[None, start + skip : start + CHUNK])
            sure_T, likeliest_T = logits_BTV[0].softmax(-1).max(-1)
            yield nats_BT[0].tolist(), likeliest_T.tolist(), sure_T.tolist()


def losses(depths: Depths, place: int, text: str) -> Losses:
    """Return what the model after stage `place` loses on a text; ConfigError for an empty one."""
    check_length(text, "The text")
    tokenizers.check_text(text, "The text")
    ids = depths.tokenizer(text)["input_ids"]
    if not ids:
        raise ConfigError(Problem("The text", "there is none", "type or paste some"))
    return read(depths.model(place), ids, tokenizers.end_of_document(depths.tokenizer))


def painted(
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    both: tuple[Losses, Losses],
    depths: tuple[int, int],
    view: View,
) -> str:
    """Return a text with every token's loss as colour, its figures, and all of it as a table.

    `first` and `second` show one depth, full colour being the loss of chance; `difference` shows in
    blue what the second depth knows better, in vermilion what it knows worse.
    """
    ids = tokenizer(text)["input_ids"]
    shown = list(pieces(tokenizer, ids))
    first, second = both
    chance = math.log(len(tokenizer))
    spans: list[str] = []
    rows: list[dict[str, str]] = []
    decode: Callable[[int], str] = lambda index: str(tokenizer.decode([index]))  # noqa: E731
    for index, piece in enumerate(shown):
        one, other = first.nats[index], second.nats[index]
        change = other - one
        title = f"{quoted(piece)}: {one:.2f} nats at depth {depths[0]}, {other:.2f} at {depths[1]}"
        if view == "difference":
            kind = "better" if change < 0 else "worse"
            spans.append(token(piece, kind, title, abs(change) / FAR))
        else:
            own = first if view == "first" else second
            likeliest = quoted(decode(own.likeliest[index]))
            title += f"; likeliest here: {likeliest} ({own.sure[index]:.0%})"
            spans.append(token(piece, "loss", title, own.nats[index] / chance))
        rows.append(
            {
                "token": quoted(piece),
                f"first (depth {depths[0]})": f"{one:.2f}",
                f"second (depth {depths[1]})": f"{other:.2f}",
                "difference": f"{change:+.2f}",
                "likeliest": f"{quoted(decode(second.likeliest[index]))} {second.sure[index]:.0%}",
            }
        )
    label = f"The text, coloured by {'the difference' if view == 'difference' else 'loss'}"
    return (
        _figures(text, first, second, depths)
        + _scale(view, chance, depths)
        + tokens(spans, label)
        + details("Every token as a table", to_html(rows))
    )


def _figures(text: str, first: Losses, second: Losses, depths: tuple[int, int]) -> str:
    bits = math.log(2) * max(1, len(text.encode()))
    better = sum(b < a for a, b in zip(first.nats, second.nats, strict=True))
    figures = {
        f"bits per byte, {name} (depth {depth})": f"{sum(own.nats) / bits:.3f}"
        for name, depth, own in zip(("first", "second"), depths, (first, second), strict=True)
    }
    return tiles(
        figures
        | {"nats a token": f"{first.mean:.2f} → {second.mean:.2f}"}
        | {"tokens the second knows better": f"{better} of {len(first.nats)}"}
    )


def _scale(view: View, chance: float, depths: tuple[int, int]) -> str:
    """Return the legend of the colours."""
    if view == "difference":
        worse, better = f"{FAR:g} nats worse at {depths[1]}", f"{FAR:g} nats better"
        return f'<p class="scale"><i class="from-worse"></i>{worse} … {better}</p>'
    return f'<p class="scale"><i class="from-none"></i>0 … {chance:.1f} nats, as bad as chance</p>'
