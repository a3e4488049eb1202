"""Benchmarks scored by likelihood, through lm-eval: its prompts, its metrics, its model class.

Of a question the option is picked that is likeliest after it; nothing is generated. Only `score`
needs lm_eval, an extra.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from string import ascii_uppercase

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.errors import ConfigError, DataError, Problem
from nacre.evaluate import benchmarks, language
from nacre.evaluate.benchmarks import Benchmark, Item
from nacre.evaluate.extra import require
from nacre.evaluate.scores import Score, bounded_exp, mean_interval
from nacre.models import stock
from nacre.train.observer import Observer

Answers = list[tuple[float, bool]]
"""Of every option of a question the log-likelihood, and whether each of its tokens is likeliest."""

Measured = tuple[float, tuple[float, float] | None, float | None]
"""The value of a metric, its interval and its chance line."""

Metric = Callable[[Sequence[Item], Sequence[Answers]], Measured]


# --- prompts: what lm-eval's tasks of the same names ask ---


def _lettered(item: Item) -> str:
    options = zip(ascii_uppercase, item.options, strict=False)
    return "".join(f"{letter}. {option}\n" for letter, option in options)


def _letters(item: Item) -> list[str]:
    return [f" {letter}" for letter in ascii_uppercase[: len(item.options)]]


def _options(item: Item) -> list[str]:
    return [f" {option}" for option in item.options]


def _mmlu(item: Item) -> tuple[str, list[str]]:
    about = item.subject.replace("_", " ")
    head = f"The following are multiple choice questions (with answers) about {about}.\n\n"
    return f"{head}{item.question.strip()}\n{_lettered(item)}Answer:", _letters(item)


def _commonsense_qa(item: Item) -> tuple[str, list[str]]:
    return f"Question: {item.question.strip()}\n{_lettered(item)}Answer:", _letters(item)


def _arc(item: Item) -> tuple[str, list[str]]:
    return f"Question: {item.question}\nAnswer:", _options(item)


def _completion(item: Item) -> tuple[str, list[str]]:
    return item.question, _options(item)


def _squad(item: Item) -> tuple[str, list[str]]:
    """Ask as lm-eval's `squadv2` does; the first gold answer is scored."""
    head = f"Title: {item.subject}\n\nBackground: {item.context}\n\n"
    return f"{head}Question: {item.question}\n\nAnswer:", _options(item)[:1]


# --- metrics ---


def _mean(values: Sequence[float], chance: float | None = None) -> Measured:
    return math.fsum(values) / len(values), mean_interval(values), chance


def _picked(items: Sequence[Item], found: Sequence[Sequence[float]]) -> Measured:
    right = [
        float(max(range(len(scores)), key=scores.__getitem__) == item.answer)
        for item, scores in zip(items, found, strict=True)
    ]
    return _mean(right, math.fsum(1 / len(item.options) for item in items) / len(items))


def _acc(items: Sequence[Item], found: Sequence[Answers]) -> Measured:
    return _picked(items, [[nats for nats, _ in answers] for answers in found])


def _acc_norm(items: Sequence[Item], found: Sequence[Answers]) -> Measured:
    """Divide by the characters of the option, as lm-eval does."""
    normed = [
        [nats / max(1, len(o)) for (nats, _), o in zip(answers, item.options, strict=True)]
        for item, answers in zip(items, found, strict=True)
    ]
    return _picked(items, normed)


def _acc_greedy(items: Sequence[Item], found: Sequence[Answers]) -> Measured:
    return _mean([float(greedy) for ((_, greedy),) in found])


def _perplexity(items: Sequence[Item], found: Sequence[Answers]) -> Measured:
    nats, interval, _ = _mean([-nats for ((nats, _),) in found])
    bounds = None if interval is None else (bounded_exp(interval[0]), bounded_exp(interval[1]))
    return bounded_exp(nats), bounds, None


def _bits_per_byte(items: Sequence[Item], found: Sequence[Answers]) -> Measured:
    scores = [
        language.DocumentScore(-nats, 1, len(_options(item)[0].encode()))
        for item, ((nats, _),) in zip(items, found, strict=True)
    ]
    return language.bits_per_byte(scores), language.interval(scores), None


@dataclass(frozen=True)
class Form:
    """How questions of a format are asked and counted.

    `prompt` returns a question's context and the continuations to compare; `parts`: each subject
    has scores of its own too. `version` changes when scores do.
    """

    prompt: Callable[[Item], tuple[str, list[str]]]
    metrics: dict[str, Metric]
    parts: bool = False
    version: str = "1"


_LAST_WORD = Form(_completion, {"acc": _acc_greedy, "perplexity": _perplexity})
FORMS = {
    "mmlu": Form(_mmlu, {"acc": _acc}, parts=True),
    "commonsense_qa": Form(_commonsense_qa, {"acc": _acc}),
    "arc": Form(_arc, {"acc": _acc, "acc_norm": _acc_norm}),
    "hellaswag": Form(_completion, {"acc": _acc, "acc_norm": _acc_norm}),
    "lambada_text": _LAST_WORD,
    "lambada_jsonl": _LAST_WORD,
    "pairs": Form(_completion, {"acc": _acc}, parts=True),
    "squad": Form(_squad, {"bits_per_byte": _bits_per_byte}),
}
"""Of every format that `benchmarks` reads."""


# --- runs ---


def questions(benchmark: Benchmark, limit: int | None = None) -> list[Item]:
    """Return the questions that are scored: of each subject or paradigm the first `limit`.

    Those without an answer are left out. Raises DataError as `benchmarks.read` does, and where no
    question has an answer.
    """
    parts, counts = FORMS[benchmark.format].parts, Counter[str]()
    chosen: list[Item] = []
    for item in benchmarks.read(benchmark):
        part = item.subject if parts else ""
        if item.options and (limit is None or counts[part] < limit):
            counts[part] += 1
            chosen.append(item)
    if not chosen:
        raise DataError(f"{benchmark.files[0]}: none of its questions has an answer")
    return chosen


def check(
    benchmark: Benchmark,
    items: Sequence[Item],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
) -> None:
    """Raise ConfigError for a model that cannot be asked these questions; no weights are needed.

    It lacks a token to begin a text with, or an answer is longer than its context.
    """
    if tokenizer.bos_token_id is None:
        tokenizers.end_of_document(tokenizer)
    context = stock.positions(config)
    if context is None:
        return
    for item in items:
        for answer in FORMS[benchmark.format].prompt(item)[1]:
            if len(answer.encode()) <= context:  # a token is a byte or more
                continue
            tokens = len(tokenizer(answer, add_special_tokens=False).input_ids)
            if tokens > context:
                message = (
                    f"an answer in {item.source} is {tokens} tokens, the model reads {context}"
                )
                raise ConfigError(Problem(benchmark.name, message, "leave the task out"))


def score(
    benchmark: Benchmark,
    items: Sequence[Item],
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    where: str = "the model",
    observer: Observer | None = None,
    batch_size: int | None = None,
) -> list[Score]:
    """Score a benchmark's questions, on the model's device: all together, and by subject.

    `where` is what errors call the model. The observer's units are questions; it is warned of
    requests longer than the context, which lose their beginning. `batch_size` is the most requests
    read at once (default: the model class's own), which changes no score. Raises ConfigError for a
    missing package and as `check` does, CheckpointError for a model without finite likelihoods.
    """
    require("lm_eval", "benchmarks")
    from lm_eval.api.instance import Instance

    from nacre.evaluate.likelihood import Likelihood

    watch, form = observer or Observer(), FORMS[benchmark.format]
    requests: list[Instance] = []
    questions: list[int] = []
    for number, item in enumerate(items):
        context, continuations = form.prompt(item)
        for index, continuation in enumerate(continuations):
            requests.append(Instance("loglikelihood", {}, (context, continuation), index))
            questions.append(number)
    left = Counter(questions)

    def advance(answered: Sequence[int]) -> None:
        left.subtract(questions[request] for request in answered)
        watch.advance(sum(not left[question] for question in {questions[r] for r in answered}))

    scorer = Likelihood(model, tokenizer, name=where, batch_size=batch_size, progress=advance)
    answers: list[Answers] = [[] for _ in items]
    found = scorer.loglikelihood(requests, disable_tqdm=True)
    for number, answer in zip(questions, found, strict=True):
        answers[number].append(answer)
    scorer.warn_of_cuts(benchmark.name, len(requests), watch)
    return _scores(benchmark.name, form, items, answers)


def _scores(
    name: str, form: Form, items: Sequence[Item], answers: Sequence[Answers]
) -> list[Score]:
    parts = {"": list(range(len(items)))}
    for index, item in enumerate(items if form.parts else ()):
        parts.setdefault(item.subject, []).append(index)
    scores: list[Score] = []
    for part, chosen in parts.items():
        for metric, measure in form.metrics.items():
            value, interval, chance = measure(
                [items[index] for index in chosen], [answers[index] for index in chosen]
            )
            scores.append(Score(name, metric, value, len(chosen), part, interval, chance))
    return scores
