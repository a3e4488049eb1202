"""The tasks of `nacre eval`, in families: how each is named, prepared, checked and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.errors import ConfigError, Problem, nearest
from nacre.evaluate import benchmarks, harness, language, probes, registry
from nacre.evaluate.scores import Score
from nacre.train.observer import Observer


@dataclass(frozen=True)
class Options:
    """What is asked for besides the tasks; each task takes what it needs.

    `data` is a folder of texts, `data_dir` one of benchmarks' files, `limit` the most examples of a
    task (documents of a domain, questions of a subject), `context` and `stride` the windows of a
    text.
    """

    data: str | Path | None = None
    data_dir: str | Path | None = None
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
    """Tasks of one kind: their names, and how to prepare one; `takes` are the options it reads.

    `lacks` is what the family says where it has no names: what it needs, and how to give it.
    """

    names: Callable[[Options], list[str]]
    prepare: Callable[[str, Options], Task]
    takes: tuple[str, ...]
    lacks: tuple[str, str] = ("", "")


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


def _benchmark_names(options: Options) -> list[str]:
    return [] if options.data_dir is None else list(benchmarks.find(options.data_dir))


def _benchmark(name: str, options: Options) -> Task:
    """Prepare a benchmark of local files; its questions are read now."""
    harness.require()
    assert options.data_dir is not None
    benchmark = benchmarks.find(options.data_dir)[name]
    items = harness.questions(benchmark, options.limit)
    fingerprint = benchmarks.fingerprint(benchmark)

    def settings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        harness.check(benchmark, items, config, tokenizer)
        return {"questions": fingerprint, "limit": options.limit}

    def run(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        where: str,
        observer: Observer,
    ) -> list[Score]:
        observer.phase(f"{where}: {name}", len(items))
        return harness.score(benchmark, items, model, tokenizer, where=where, observer=observer)

    return Task(name, harness.FORMS[benchmark.format].version, settings, run)


def _registered(name: str, options: Options) -> Task:
    """Prepare a task of lm-eval by its name there; its data is fetched now."""
    loaded = registry.load(name)
    decides = registry.settings(loaded, options.limit)

    def settings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        if tokenizer.bos_token_id is None:
            tokenizers.end_of_document(tokenizer)
        return decides

    def run(
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: Mapping[str, Any],
        where: str,
        observer: Observer,
    ) -> list[Score]:
        observer.phase(f"{where}: {name}")
        return registry.score(
            name, loaded, model, tokenizer,
            limit=settings["limit"], where=where, observer=observer,
        )  # fmt: skip

    return Task(name, registry.version(), settings, run)


FAMILIES: dict[str, Family] = {
    "lm": Family(lambda options: ["lm"], _language_modelling, ("data", "context", "stride")),
    "probes": Family(lambda options: list(probes.PROBES), _probe, ()),
    "benchmarks": Family(
        _benchmark_names, _benchmark, ("data_dir",),
        ("needs files of questions", "name their folder with --data-dir"),
    ),
}  # fmt: skip
"""A family's name stands for all of its tasks."""


def prepare(asked: Sequence[str], options: Options) -> list[Task]:
    """Return the tasks that are asked for, each once.

    `asked` are names of tasks, families, and tasks of lm-eval, each perhaps several with commas
    between; without any, `lm` where there are texts and `benchmarks` where there are their files,
    else `probes`. Raises ConfigError for what is no task, a task that lacks an option, an option
    that no task reads and a missing package; DataError for files that cannot be read.
    """
    names = [name.strip() for item in asked for name in item.split(",") if name.strip()]
    if not names:
        given = {"lm": options.data, "benchmarks": options.data_dir}
        names = [name for name, value in given.items() if value is not None] or ["probes"]
    known = {task: family for family in FAMILIES.values() for task in family.names(options)}
    chosen: dict[str, Callable[[str, Options], Task]] = {}
    problems: list[Problem] = []
    for name in dict.fromkeys(names):
        if name in FAMILIES:
            family, tasks = FAMILIES[name], FAMILIES[name].names(options)
            chosen |= dict.fromkeys(tasks, family.prepare)
            if not tasks:
                problems.append(Problem(f"--tasks {name}", *family.lacks))
        elif name in known:
            chosen[name] = known[name].prepare
        elif options.data_dir is not None and name in benchmarks.NAMES:
            fix = "leave --data-dir out to fetch what lm-eval knows"
            problems.append(Problem("--tasks", f"{options.data_dir} holds no {name}", fix))
        elif name in registry.names():
            chosen[name] = _registered
        else:
            problems.append(Problem("--tasks", f"there is no task {name!r}", _hint(name, known)))
    problems += _unread(names, [known[task] for task in chosen if task in known], options)
    if options.limit is not None and options.limit < 1:
        problems.append(Problem("--limit", f"{options.limit} is not 1 or more", "leave it out"))
    if problems:
        raise ConfigError(problems)
    return [make(task, options) for task, make in chosen.items()]


def _hint(name: str, known: Iterable[str]) -> str:
    """Return the task nearest to what is none, else where the tasks are listed."""
    own = list(dict.fromkeys([*FAMILIES, *known]))
    others = registry.names()
    more = (
        "`lm-eval ls tasks` lists lm-eval's" if others
        else "lm-eval's own need pip install 'nacre[eval]'"
    )  # fmt: skip
    return nearest(name, own) or nearest(name, others) or f"there are: {', '.join(own)}; {more}"


def _unread(names: Sequence[str], families: Sequence[Family], options: Options) -> list[Problem]:
    """Return the options that are given and that no task reads."""
    taken = {"limit", *(key for family in families for key in family.takes)}
    problems: list[Problem] = []
    for key, value in vars(options).items():
        if value is not None and key not in taken:
            readers = [name for name, family in FAMILIES.items() if key in family.takes]
            message = f"no task of {', '.join(names)} reads it"
            option = f"--{key.replace('_', '-')}"
            problems.append(Problem(option, message, f"add {' or '.join(readers)} to --tasks"))
    return problems
