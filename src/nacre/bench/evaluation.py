"""Suite `eval`: benchmarks by likelihood against lm-eval's own model class, on the same requests.

The questions are made of English words and have the lengths of the benchmarks' own.
"""

from __future__ import annotations

import copy
import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from functools import partial
from importlib.util import find_spec
from typing import Any

from nacre import tokenizer as tokenizers
from nacre.bench.measure import Effort, Row, Target, compare
from nacre.bench.text import english
from nacre.errors import clone_install
from nacre.evaluate.benchmarks import Item
from nacre.evaluate.harness import FORMS
from nacre.growth.stage import drawing
from nacre.models import stock


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of the model, and how many questions it is asked."""

    vocabulary: int
    width: int
    heads: int
    mlp: int
    depth: int
    questions: int


@dataclasses.dataclass(frozen=True)
class Kind:
    """Questions as a benchmark has them: its format, their words and their options' on average."""

    format: str
    words: int
    options: int
    option_words: int


FULL = Shape(vocabulary=4096, width=256, heads=4, mlp=688, depth=6, questions=100)
TINY = Shape(vocabulary=512, width=32, heads=2, mlp=64, depth=2, questions=6)

KINDS = {
    "MMLU, one subject": Kind("mmlu", words=30, options=4, option_words=6),
    "ARC": Kind("arc", words=21, options=4, option_words=5),
    "CommonsenseQA": Kind("commonsense_qa", words=13, options=5, option_words=2),
}
CONTEXT = 512
BATCH_SIZE = 64
FASTER = 1.5
"""How many times, at least."""


def suite(effort: Effort) -> Iterator[Row]:
    """Yield questions/s beside HFLM, in fp32 on the CPU; none where lm-eval is not installed.

    Both read at most 64 requests at once. The note says how far their log-likelihoods are apart.
    """
    if find_spec("lm_eval") is None:
        effort.say(f"left out: it needs lm-eval ({clone_install('eval')})")
        return
    from nacre.evaluate.likelihood import HFLM, Likelihood, quiet

    shape = TINY if effort.quick else FULL
    effort.say("making a model")
    texts = english(effort.quick)
    tokenizer = tokenizers.build(texts, shape.vocabulary)
    config = stock.llama_config(
        len(tokenizer), shape.width, shape.heads, shape.mlp, CONTEXT, shape.depth
    )
    with drawing(0):
        model = stock.build(config).eval()
    with quiet():
        scorers: dict[str, Any] = {
            "ours": Likelihood(model, tokenizer, batch_size=BATCH_SIZE),
            "plain": HFLM(
                pretrained=model, tokenizer=copy.deepcopy(tokenizer), batch_size=BATCH_SIZE
            ),
        }
    for case, kind in KINDS.items():
        effort.say(case)
        asked = requests(kind, shape.questions, " ".join(texts).split())
        answers: dict[str, list[tuple[float, bool]]] = {}

        def answer(name: str, asked: Any = asked, answers: Any = answers) -> None:
            answers[name] = scorers[name].loglikelihood(asked, disable_tqdm=True)

        candidates = {name: partial(answer, name) for name in scorers}
        seconds = compare(candidates, effort.rounds, effort.seconds / len(KINDS))
        rates = {name: sample.per(shape.questions) for name, sample in seconds.items()}
        yield Row(
            suite="eval",
            case=case,
            unit="questions/s",
            better="higher",
            measured=rates["ours"].median,
            spread=rates["ours"].spread,
            rounds=len(rates["ours"].values),
            peer=rates["plain"].median,
            peer_spread=rates["plain"].spread,
            peer_name="HFLM",
            target=Target("ratio", FASTER),
            note=f"{case}: log-likelihoods differ by {apart(*answers.values()):.0e} nats at most",
        )


def requests(kind: Kind, questions: int, words: Sequence[str]) -> list[Any]:
    """Return the requests for so many questions of consecutive words."""
    from lm_eval.api.instance import Instance

    form, stream = FORMS[kind.format], iter(itertools.cycle(words))
    asked: list[Any] = []
    for number in range(questions):
        share = 0.5 + (37 * number % 100) / 100  # lengths vary from half to one and a half
        question = phrase(stream, kind.words * share)
        options = [phrase(stream, kind.option_words * share) for _ in range(kind.options)]
        item = Item(question, tuple(options), 0, "", subject="anatomy")
        context, continuations = form.prompt(item)
        asked += [
            Instance("loglikelihood", {}, (context, continuation), index)
            for index, continuation in enumerate(continuations)
        ]
    return asked


def phrase(words: Iterator[str], length: float) -> str:
    """Return the next words, at least one."""
    return " ".join(itertools.islice(words, max(1, round(length))))


def apart(first: Sequence[tuple[float, bool]], second: Sequence[tuple[float, bool]]) -> float:
    """Return by how many nats two lists of answers differ at most."""
    return max(abs(a - b) for (a, _), (b, _) in zip(first, second, strict=True))
