"""The paper's protocol: what a model writes is compared, not what it finds likely.

Letters for MMLU (one token), ARC and CommonsenseQA (two), a substring for SQuAD, BLEU and chrF for
translations; every answer is drawn several times and scores are means over these runs. What arXiv
2507.07129 does not say is fixed here: tokens are drawn from the model's own distribution (no
temperature, no cut), an answer to SQuAD has 16 tokens, and which of its questions are asked.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import ascii_uppercase

from nacre.evaluate import benchmarks, parallel, translation
from nacre.evaluate.benchmarks import Item
from nacre.evaluate.harness import questions
from nacre.evaluate.scores import Score, mean_interval

VERSION = "1"
RUNS = 10
SQUAD_QUESTIONS, SQUAD_CHARACTERS = 256, 8

BENCHMARKS = {
    "paper-mmlu": "mmlu",
    "paper-arc_easy": "arc_easy_dev",
    "paper-arc_challenge": "arc_challenge_dev",
    "paper-commonsense_qa": "commonsense_qa",
    "paper-squad_v2": "squad_v2",
}
"""Of every task the benchmark whose questions it asks."""

NEW_TOKENS = {"mmlu": 1, "arc": 2, "commonsense_qa": 2, "squad": 16}
"""By the benchmark's format."""


@dataclass(frozen=True)
class Asked:
    """A task's prompts, how they are continued, and what the texts of every prompt are worth."""

    prompts: list[str]
    new_tokens: int
    stop: str
    fingerprint: str
    score: Callable[[Sequence[Sequence[str]]], list[Score]]


def names(data_dir: str | Path) -> list[str]:
    """Return what the protocol can ask from the files in a folder."""
    held = benchmarks.find(data_dir)
    found = [name for name, benchmark in BENCHMARKS.items() if benchmark in held]
    return [*found, *(f"paper-{name}" for name in parallel.find(data_dir))]


def prepare(name: str, data_dir: str | Path, limit: int | None = None) -> Asked:
    """Read a task's questions: the first `limit`, of each subject; of SQuAD 256 spread evenly.

    Raises DataError for files that cannot be read and ConfigError for a missing package.
    """
    if name not in BENCHMARKS:
        return _translation(name, data_dir, limit)
    benchmark = benchmarks.find(data_dir)[BENCHMARKS[name]]
    fingerprint = benchmarks.fingerprint(benchmark)
    new_tokens = NEW_TOKENS[benchmark.format]
    if benchmark.format == "squad":
        items = _short(questions(benchmark))[:limit]
        prompts = [_squad_prompt(item) for item in items]
        score: Callable[..., list[Score]] = _squad_scores
    else:
        items = questions(benchmark, limit)
        prompts = [_letter_prompt(item) for item in items]
        score = _letter_scores
    return Asked(prompts, new_tokens, "", fingerprint, lambda texts: score(name, items, texts))


def _letter_prompt(item: Item) -> str:
    options = " ".join(
        f"{letter}) {option}" for letter, option in zip(ascii_uppercase, item.options, strict=False)
    )
    return f"Question: {item.question.strip()}\nOptions: {options}\nAnswer:"


def _letter_scores(name: str, items: Sequence[Item], texts: Sequence[Sequence[str]]) -> list[Score]:
    """Compare the first letter; MMLU also by subject."""
    parts = {"": list(range(len(items)))}
    for index, item in enumerate(items):
        if item.subject:
            parts.setdefault(item.subject, []).append(index)
    scores: list[Score] = []
    for part, chosen in parts.items():
        right = [
            [text.strip()[:1] == ascii_uppercase[items[index].answer] for text in texts[index]]
            for index in chosen
        ]
        chance = math.fsum(1 / len(items[index].options) for index in chosen) / len(chosen)
        scores.append(_mean(name, "accuracy", _by_run(right), len(chosen), part, chance))
    return scores


def _short(items: Sequence[Item]) -> list[Item]:
    """Return the questions whose first gold answer is short: at most 256, spread evenly."""
    short = [item for item in items if len(item.options[0]) <= SQUAD_CHARACTERS]
    count = min(len(short), SQUAD_QUESTIONS)
    return [short[index * len(short) // count] for index in range(count)]


def _squad_prompt(item: Item) -> str:
    return f"Context: {item.context}\nQuestion: {item.question.strip()}\nAnswer:"


def _squad_scores(name: str, items: Sequence[Item], texts: Sequence[Sequence[str]]) -> list[Score]:
    right = [
        [any(answer in text for answer in item.options) for text in written]
        for item, written in zip(items, texts, strict=True)
    ]
    return [_mean(name, "match", _by_run(right), len(items))]


def _translation(name: str, data_dir: str | Path, limit: int | None) -> Asked:
    text = parallel.find(data_dir)[name.removeprefix("paper-")]
    pairs = parallel.read(text, limit)
    metrics = translation.metrics(text.target)
    expected = [target for _, target in pairs]

    def score(texts: Sequence[Sequence[str]]) -> list[Score]:
        return [
            _mean(
                name,
                metric,
                [translation.score(measure, run, expected) for run in zip(*texts, strict=True)],
                len(pairs),
            )
            for metric, measure in metrics.items()
        ]

    return Asked(
        translation.prompts(text, pairs), translation.NEW_TOKENS, translation.STOP,
        parallel.fingerprint(text, pairs), score,
    )  # fmt: skip


def _by_run(right: Sequence[Sequence[bool]]) -> list[float]:
    """Return the share of right answers in every run."""
    return [sum(run) / len(run) for run in zip(*right, strict=True)]


def _mean(
    name: str,
    metric: str,
    values: Sequence[float],
    count: int,
    part: str = "",
    chance: float | None = None,
) -> Score:
    """Return the mean over runs, and how sure it is of other runs on the same questions."""
    value = math.fsum(values) / len(values)
    return Score(name, metric, value, count, part, mean_interval(values), chance)
