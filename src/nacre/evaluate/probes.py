"""Probes: small tasks made from a seed, whose answers stand in the context; no files are read.

A probe's document is a string of single characters, each of them one token. At one place a model is
asked for the next character; the likeliest of the stated candidates is its answer. `text` gives the
same kind of documents to train on. What an example of an evaluation asks never occurs there: of
every document a core decides, by a hash, on which side it is (`is_held_out`).

Letters, digits and signs take turns, so that no tokenizer that cuts between them joins two of them.
All numbers are drawn from SHA-256: examples are the same on every machine.

Shapes: B examples, T positions, V vocabulary, C candidates.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import struct
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from string import ascii_letters, digits

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.errors import ConfigError, Problem, nearest
from nacre.evaluate.scores import Score, damaged, mean_interval

EXAMPLES = 1000
HELD_OUT = 8  # one core of so many is kept for evaluation
PAIRS = 8
CHAINS = 4
BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}
CLOSING = "".join(BRACKETS.values())


class Draw:
    """Whole numbers that follow from a key."""

    def __init__(self, key: str) -> None:
        blocks = (hashlib.sha256(f"{key} {block}".encode()).digest() for block in itertools.count())
        self.numbers = itertools.chain.from_iterable(
            struct.unpack("<4Q", block) for block in blocks
        )

    def below(self, count: int) -> int:
        """Return a number from 0, under `count`."""
        return next(self.numbers) % count

    def one(self, characters: Sequence[str]) -> str:
        """Return one of the characters."""
        return characters[self.below(len(characters))]

    def some(self, count: int, items: Sequence[str]) -> list[str]:
        """Return `count` different items, in random order."""
        pool = list(items)
        for place in range(count):
            other = place + self.below(len(pool) - place)
            pool[place], pool[other] = pool[other], pool[place]
        return pool[:count]


@dataclass(frozen=True)
class Example:
    """A whole document; its character at `place` is asked for, given all before it."""

    text: str
    place: int
    candidates: str

    @property
    def prompt(self) -> str:
        """What the model reads."""
        return self.text[: self.place]

    @property
    def answer(self) -> str:
        """What is right; one of the candidates."""
        return self.text[self.place]


def is_held_out(core: str) -> bool:
    """Tell whether a core is kept for evaluation; one of `HELD_OUT` is."""
    return int.from_bytes(hashlib.sha256(core.encode()).digest()[:8], "little") % HELD_OUT == 0


def _core(make: Callable[[], str], held_out: bool) -> str:
    """Return the first core that `make` gives on the asked side."""
    while is_held_out(core := make()) != held_out:
        pass
    return core


def copy(draw: Draw, letters: str, held_out: bool) -> Example:
    """Repeat a sequence: four of ten letters and four digits by turns, which may recur.

    `a3f0f3b7|a3f0` asks for `f`, of the ten letters; a digit is asked for as often, of the ten
    digits. Chance 1/10. The core is the sequence.
    """
    kinds = (letters, digits) * 4
    core = _core(lambda: "".join(draw.one(kind) for kind in kinds), held_out)
    place = draw.below(len(core))
    return Example(f"{core}|{core}", len(core) + 1 + place, kinds[place])


def induction(draw: Draw, letters: str, held_out: bool) -> Example:
    """Say what followed a letter when it stood there before: eight of ten, each with a digit.

    `k3f7a1b5c0d2e9g4;a` asks for `1`, of the eight digits that occur: chance 1/8. A document goes
    on with all pairs in another order. The core is the pairs.
    """

    def make() -> str:
        pairs = zip(draw.some(PAIRS, letters), draw.some(PAIRS, digits), strict=True)
        return "".join(itertools.chain.from_iterable(pairs))

    core = _core(make, held_out)
    again = draw.some(PAIRS, [core[place : place + 2] for place in range(0, len(core), 2)])
    return Example(f"{core};{''.join(again)}", len(core) + 2, "".join(sorted(core[1::2])))


def lookup(draw: Draw, letters: str, held_out: bool, hops: int) -> Example:
    """Follow a chain of `hops` links to its end, among four such chains whose links are mixed.

    With two hops `k>f;a>b;q>z;f>c;b>m;s>q;x>y;y>t;k=` asks for `c` (by `k>f` and `f>c`), of the
    four ends `c`, `m`, `t`, `z`: chance 1/4, also for who follows fewer links, since the ends look
    alike. A document goes on with the ends of the other chains. The core is the links.
    """

    def make() -> str:
        nodes = draw.some(CHAINS * (hops + 1), letters)
        links = [f"{a}>{b}" for a, b in itertools.pairwise(nodes)]
        del links[hops :: hops + 1]  # from the end of a chain to the start of the next
        return ";".join(draw.some(len(links), links))

    core = _core(make, held_out)
    follow = dict(link.split(">") for link in core.split(";"))
    ends = {start: start for start in sorted(follow.keys() - follow.values())}
    for _ in range(hops):
        ends = {start: follow[node] for start, node in ends.items()}
    asked = draw.some(CHAINS, [f"{start}={end}" for start, end in ends.items()])
    return Example(f"{core};{';'.join(asked)}", len(core) + 3, "".join(sorted(ends.values())))


def brackets(draw: Draw, letters: str, held_out: bool) -> Example:
    """Close the bracket that is open: eight pairs of four kinds, a letter after every bracket.

    `(k[f]a{b}c` asks for `)`, of the four closing brackets: chance 1/4. The bracket before is a
    closing one, so that the open one is further back. The core is the prompt; in a document to
    train on that of no place, where such a question could be asked, is held out.
    """

    def make() -> str:
        found: list[str] = []
        closes: list[str] = []
        while len(found) < 2 * PAIRS:
            may_open = len(found) + len(closes) < 2 * PAIRS
            if not closes or (may_open and draw.below(2)):
                found.append(draw.one(list(BRACKETS)))
                closes.append(BRACKETS[found[-1]])
            else:
                found.append(closes.pop())
        return "".join(bracket + draw.one(letters) for bracket in found)

    while True:
        document = make()
        ends = [p for p in range(2, 4 * PAIRS, 2) if {document[p - 2], document[p]} <= set(CLOSING)]
        kept = [place for place in ends if is_held_out(document[:place])]
        chosen = kept if held_out else [] if kept else ends
        if chosen:
            return Example(document, chosen[draw.below(len(chosen))], CLOSING)


def modular(draw: Draw, letters: str, held_out: bool) -> Example:
    """Add four digits modulo ten, after two sums that show how.

    `3+8+5+1=7;0+4+4+9=7;2+6+3+3=` asks for `4`, of the ten digits: chance 1/10. A core is one sum;
    the two that show how are never held out.
    """

    def add(held_out: bool) -> str:
        total = draw.below(10)

        def make() -> str:
            terms = [draw.below(10) for _ in range(3)]
            return "+".join(map(str, [*terms, (total - sum(terms)) % 10]))

        return f"{_core(make, held_out)}={total}"

    text = ";".join(map(add, (False, False, held_out)))
    return Example(text, len(text) - 1, digits)


@dataclass(frozen=True)
class Probe:
    """How a probe is made, of how many letters and what else, and the longest prompt.

    `context` counts the token that begins a document. A new `version` makes other examples.
    """

    make: Callable[[Draw, str, bool], Example]
    letters: int
    others: str
    context: int
    version: str = "1"


PROBES: dict[str, Probe] = {
    "copy": Probe(copy, 10, digits + "|", 17),
    "induction": Probe(induction, 10, digits + ";", 19),
    **{
        f"khop-{hops}": Probe(
            partial(lookup, hops=hops),
            max(10, CHAINS * (hops + 1)),
            ">;=",
            4 * CHAINS * hops + 3,
        )
        for hops in range(1, 7)
    },
    "brackets": Probe(brackets, 10, "".join(BRACKETS) + CLOSING, 31),
    "modular": Probe(modular, 0, digits + "+=;", 29),
}


def text(name: str, seed: int, count: int) -> Iterator[str]:
    """Yield `count` documents of a probe to train on; raise ConfigError for an unknown probe."""
    for example in _make(name, "train", seed, count, ascii_letters):
        yield example.text


def examples(
    name: str, tokenizer: PreTrainedTokenizerBase, seed: int = 0, count: int = EXAMPLES
) -> list[Example]:
    """Return the examples of an evaluation, in letters that are tokens of the tokenizer.

    Fewer of a seed are the first ones of more. Raises ConfigError as `check` does.
    """
    ids = check(name, tokenizer)
    letters = "".join(letter for letter in ascii_letters if letter in ids)
    return list(_make(name, "evaluate", seed, count, letters))


def _make(name: str, purpose: str, seed: int, count: int, letters: str) -> Iterator[Example]:
    probe = _probe(name)
    for number in range(count):
        draw = Draw(f"{name} {purpose} {seed} {number}")
        yield probe.make(draw, letters[: probe.letters], purpose == "evaluate")


def _probe(name: str) -> Probe:
    if name not in PROBES:
        hint = nearest(name, PROBES) or f"there are: {', '.join(PROBES)}"
        raise ConfigError(Problem("probe", f"there is no {name!r}", hint))
    return PROBES[name]


@lru_cache(maxsize=1)
def _characters(tokenizer: PreTrainedTokenizerBase) -> dict[str, int]:
    return {
        token: index
        for index, token in enumerate(tokenizers.token_strings(tokenizer))
        if isinstance(token, str) and len(token) == 1
    }


def check(
    name: str, tokenizer: PreTrainedTokenizerBase, context: int | None = None
) -> dict[str, int]:
    """Return the ids of all characters that are tokens of their own.

    Raises ConfigError for an unknown probe, a tokenizer that lacks characters the probe needs, and
    a model whose `context` is too short for it.
    """
    probe, problems, ids = _probe(name), list[Problem](), _characters(tokenizer)
    letters = sum(letter in ids for letter in ascii_letters)
    missing = [character for character in probe.others if character not in ids]
    if letters < probe.letters or missing:
        needs = f"needs characters that are tokens: {probe.letters} of a to z and A to Z"
        message = f"{needs} (there are {letters}), and {probe.others}"
        if missing:
            message += f" (there is no {' '.join(missing)})"
        problems.append(Problem(name, message, "leave it out: the tokenizer has too few"))
    if context is not None and context < probe.context:
        message = f"reads {probe.context} tokens before an answer, the model at most {context}"
        problems.append(Problem(name, message, "leave it out"))
    if problems:
        raise ConfigError(problems)
    return ids


@torch.no_grad()
def score(
    name: str,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    seed: int = 0,
    count: int = EXAMPLES,
    batch_tokens: int = 8192,
    where: str = "the model",
    progress: Callable[[int], None] | None = None,
) -> Score:
    """Return how often the right candidate is the likeliest to a model, on the model's device.

    A document begins after the end-of-document token. About `batch_tokens` tokens are read at once,
    which changes no answer. `progress` receives the number of examples done since its last call.
    Raises ConfigError as `check` does, and CheckpointError, which begins with `where`, for a model
    that gives nan.
    """
    ids, asked = check(name, tokenizer), examples(name, tokenizer, seed, count)
    end_id = tokenizers.end_of_document(tokenizer)
    model.eval()
    right: list[float] = []
    for batch in _batches(asked, batch_tokens):
        rows = [[end_id, *(ids[character] for character in example.prompt)] for example in batch]
        ids_BT = torch.tensor(rows, device=model.device)
        choices = [[ids[character] for character in example.candidates] for example in batch]
        choices_BC = torch.tensor(choices, device=model.device)
        logits_BTV = model(input_ids=ids_BT, use_cache=False).logits
        logits_BC = logits_BTV[:, -1].gather(1, choices_BC)
        if logits_BC.isnan().any():
            raise damaged(f"{where} gives no likelihood for {name} (nan)")
        for example, pick in zip(batch, logits_BC.argmax(1).tolist(), strict=True):
            right.append(float(example.candidates[pick] == example.answer))
        if progress:
            progress(len(batch))
    chance = math.fsum(1 / len(example.candidates) for example in asked) / len(asked)
    value = sum(right) / len(right)
    return Score(name, "accuracy", value, len(right), interval=mean_interval(right), chance=chance)


def _batches(asked: Sequence[Example], batch_tokens: int) -> Iterator[list[Example]]:
    """Yield examples whose prompts are of one length together."""
    ordered = sorted(asked, key=lambda example: example.place)
    for place, same in itertools.groupby(ordered, key=lambda example: example.place):
        while batch := list(itertools.islice(same, max(1, batch_tokens // (place + 1)))):
            yield batch
