"""The tasks of `nacre eval`, in families: how each is named, prepared, checked and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.errors import ConfigError, Problem, nearest
from nacre.evaluate import language, probes
from nacre.evaluate.scores import Score
from nacre.train.observer import Observer


@dataclass(frozen=True)
class Options:
    """What is asked for besides the tasks; each task takes what it needs.

    `data` is a folder of texts, `limit` the most examples of a task (documents of a domain),
    `context` and `stride` the windows of a text.
    """

    data: str | Path | None = None
    limit: int | None = None
    context: int | None = None
    stride: int | None = None


@dataclass(frozen=True)
class Task:
    """A task, ready to be run on any checkpoint.

    `settings` says what decides the scores besides checkpoint and version, as plain data, and
    raises ConfigError where the task cannot be run; it needs no weights. `run` takes the model, its
    tokenizer, those settings, what to call the model in an error, and who counts the progress.
    """

    name: str
    version: str
    settings: Callable[[PreTrainedConfig, PreTrainedTokenizerBase], dict[str, Any]]
    run: Callable[
        [PreTrainedModel, PreTrainedTokenizerBase, Mapping[str, Any], str, Observer], list[Score]
    ]


@dataclass(frozen=True)
class Family:
    """Tasks of one kind: their names, and how to prepare one; `takes` are the options it reads."""

    names: Callable[[Options], list[str]]
    prepare: Callable[[str, Options], Task]
    takes: tuple[str, ...]


def _language_modelling(name: str, options: Options) -> Task:
    """Prepare bits per byte and perplexity of texts, per domain, language, and of all."""
    if options.data is None:
        raise ConfigError(Problem("--tasks lm", "needs texts", "name their folder with --data"))
    counts: Counter[str] = Counter()
    documents: list[language.EvalDocument] = []
    for document in language.read_documents(options.data):
        counts[document.domain] += 1
        if options.limit is None or counts[document.domain] <= options.limit:
            documents.append(document)
    texts, fingerprint = [d.text for d in documents], language.fingerprint(documents)

    def settings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tokenizers.end_of_document(tokenizer)
        context, stride = language.reach(config, options.context, options.stride)
        if options.context is None and context > language.LONGEST:
            context, stride = language.reach(config, language.LONGEST, options.stride)
        return {"texts": fingerprint, "context": context, "stride": stride}

    def run(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        where: str,
        observer: Observer,
    ) -> list[Score]:
        observer.phase(f"{where}: lm", sum(map(len, language.encode(tokenizer, texts))))
        found = language.score(
            model, tokenizer, texts,
            context=settings["context"], stride=settings["stride"], progress=observer.advance,
        )  # fmt: skip
        language.check_finite(where, documents, found)
        subsets = {"domain": "{}", "language": "all of {}", "all": ""}
        return [
            score
            for kind, part, chosen in language.groups(documents)
            for score in _text_scores(subsets[kind].format(part), [found[i] for i in chosen])
        ]

    return Task(name, "1", settings, run)


def _text_scores(subset: str, found: Sequence[language.DocumentScore]) -> list[Score]:
    return [
        Score("lm", metric, value(found), len(found), subset, interval(found))
        for metric, value, interval in (
            ("bits_per_byte", language.bits_per_byte, language.interval),
            ("perplexity", language.perplexity, language.perplexity_interval),
        )
    ]


def _probe(name: str, options: Options) -> Task:
    count = probes.EXAMPLES if options.limit is None else options.limit

    def settings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tokenizers.end_of_document(tokenizer)
        context = getattr(config.get_text_config(), "max_position_embeddings", None)
        probes.check(name, tokenizer, context)
        return {"seed": 0, "examples": count}

    def run(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        where: str,
        observer: Observer,
    ) -> list[Score]:
        observer.phase(f"{where}: {name}", count)
        return [
            probes.score(
                name, model, tokenizer,
                seed=settings["seed"], count=count, where=where, progress=observer.advance,
            )
        ]  # fmt: skip

    return Task(name, probes.PROBES[name].version, settings, run)


FAMILIES: dict[str, Family] = {
    "lm": Family(lambda options: ["lm"], _language_modelling, ("data", "context", "stride")),
    "probes": Family(lambda options: list(probes.PROBES), _probe, ()),
}
"""A family's name stands for all of its tasks."""


def prepare(asked: Sequence[str], options: Options) -> list[Task]:
    """Return the tasks that are asked for, each once.

    `asked` are names of tasks and families, each perhaps several with commas between; without any,
    `lm` where there are texts, else `probes`. Raises ConfigError for what is no task, a task that
    lacks an option and an option that no task reads, and DataError for texts that cannot be read.
    """
    names = [name.strip() for item in asked for name in item.split(",") if name.strip()]
    names = names or ["lm" if options.data is not None else "probes"]
    known = {task: family for family in FAMILIES.values() for task in family.names(options)}
    problems: list[Problem] = []
    for name in dict.fromkeys(names):
        if name not in known and name not in FAMILIES:
            allowed = dict.fromkeys([*FAMILIES, *known])
            hint = nearest(name, allowed) or f"there are: {', '.join(allowed)}"
            problems.append(Problem("--tasks", f"there is no task {name!r}", hint))
    chosen = list(
        dict.fromkeys(
            task
            for name in names
            for task in (FAMILIES[name].names(options) if name in FAMILIES else [name])
        )
    )
    taken = {"limit", *(key for task in chosen if task in known for key in known[task].takes)}
    for key, value in vars(options).items():
        if value is not None and key not in taken:
            readers = [name for name, family in FAMILIES.items() if key in family.takes]
            message = f"no task of {', '.join(names)} reads it"
            option = f"--{key.replace('_', '-')}"
            problems.append(Problem(option, message, f"add {' or '.join(readers)} to --tasks"))
    if options.limit is not None and options.limit < 1:
        problems.append(Problem("--limit", f"{options.limit} is not 1 or more", "leave it out"))
    if problems:
        raise ConfigError(problems)
    return [known[task].prepare(task, options) for task in chosen]
