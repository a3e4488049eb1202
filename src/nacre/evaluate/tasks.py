"""The tasks of `nacre eval`, in families: how each is named, prepared, checked and run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.errors import ConfigError, DataError, Problem, clone_install, nearest
from nacre.evaluate import (
    benchmarks,
    continuations,
    harness,
    language,
    parallel,
    probes,
    protocol,
    registry,
    translation,
)
from nacre.evaluate.extra import require
from nacre.evaluate.scores import Score
from nacre.models import stock
from nacre.train.observer import Observer


@dataclass(frozen=True)
class Options:
    """What is asked for besides the tasks; each task takes what it needs.

    `data` is a folder of texts, `data_dir` one of benchmarks' files and parallel text, `limit` the
    most examples of a task (documents of a domain, questions of a subject), `context` and `stride`
    the windows of a text; `protocol` means its tasks by the names of others, `runs` how often an
    answer is drawn.
    """

    data: str | Path | None = None
    data_dir: str | Path | None = None
    limit: int | None = None
    context: int | None = None
    stride: int | None = None
    protocol: str | None = None
    runs: int | None = None


@dataclass(frozen=True)
class Subject:
    """A model to run a task on, what errors call it, and who counts the progress."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    where: str
    observer: Observer


@dataclass(frozen=True)
class Task:
    """A task, ready to be run on any checkpoint.

    `settings` says what decides the scores besides checkpoint and version, as plain data, and
    raises ConfigError where the task cannot be run; it needs no weights. `run` takes the model and
    those settings.
    """

    name: str
    version: str
    settings: Callable[[PreTrainedConfig, PreTrainedTokenizerBase], dict[str, Any]]
    run: Callable[[Subject, Mapping[str, Any]], list[Score]]


@dataclass(frozen=True)
class Family:
    """Tasks of one kind: their names, and how to prepare one; `takes` are the options it reads.

    `lacks` is what the family says where it has no names: what it needs, and how to give it; with
    `begins` begin all of its names, if with one word.
    """

    names: Callable[[Options], list[str]]
    prepare: Callable[[str, Options], Task]
    takes: tuple[str, ...]
    lacks: tuple[str, str] = ("", "")
    begins: str | None = None


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

    def run(on: Subject, settings: Mapping[str, Any]) -> list[Score]:
        on.observer.phase(f"{on.where}: lm", sum(map(len, language.encode(on.tokenizer, texts))))
        found = language.score(
            on.model, on.tokenizer, texts,
            context=settings["context"], stride=settings["stride"], progress=on.observer.advance,
        )  # fmt: skip
        language.check_finite(on.where, documents, found)
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
        context = stock.positions(config)
        probes.check(name, tokenizer, context)
        return {"seed": 0, "examples": count}

    def run(on: Subject, settings: Mapping[str, Any]) -> list[Score]:
        on.observer.phase(f"{on.where}: {name}", count)
        return [
            probes.score(
                name, on.model, on.tokenizer,
                seed=settings["seed"], count=count, where=on.where, progress=on.observer.advance,
            )
        ]  # fmt: skip

    return Task(name, probes.PROBES[name].version, settings, run)


def _held(find: Callable[[str | Path], Iterable[str]]) -> Callable[[Options], list[str]]:
    """Return what names the tasks that `find` finds in the folder of files."""
    return lambda options: [] if options.data_dir is None else list(find(options.data_dir))


def _benchmark(name: str, options: Options) -> Task:
    """Prepare a benchmark of local files; its questions are read now."""
    require("lm_eval", "benchmarks")
    assert options.data_dir is not None
    benchmark = benchmarks.find(options.data_dir)[name]
    items = harness.questions(benchmark, options.limit)
    fingerprint = benchmarks.fingerprint(benchmark)

    def settings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        harness.check(benchmark, items, config, tokenizer)
        return {"questions": fingerprint, "limit": options.limit}

    def run(on: Subject, settings: Mapping[str, Any]) -> list[Score]:
        on.observer.phase(f"{on.where}: {name}", len(items))
        return harness.score(
            benchmark, items, on.model, on.tokenizer, where=on.where, observer=on.observer
        )

    return Task(name, harness.FORMS[benchmark.format].version, settings, run)


def _registered(name: str, options: Options) -> Task:
    """Prepare a task of lm-eval by its name there; its data is fetched now."""
    loaded = registry.load(name)
    decides = registry.settings(loaded, options.limit)

    def settings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        if tokenizer.bos_token_id is None:
            tokenizers.end_of_document(tokenizer)
        return decides

    def run(on: Subject, settings: Mapping[str, Any]) -> list[Score]:
        on.observer.phase(f"{on.where}: {name}")
        return registry.score(
            name, loaded, on.model, on.tokenizer,
            limit=settings["limit"], where=on.where, observer=on.observer,
        )  # fmt: skip

    return Task(name, registry.version(), settings, run)


def _translation(name: str, options: Options) -> Task:
    """Prepare a direction of translation: the likeliest words, BLEU and chrF."""
    assert options.data_dir is not None
    text = parallel.find(options.data_dir)[name]
    pairs = parallel.read(text, options.limit)
    metrics = translation.metrics(text.target)
    prompts, expected = translation.prompts(text, pairs), [target for _, target in pairs]
    decides = {"text": parallel.fingerprint(text, pairs), "limit": options.limit}

    def settings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tokenizers.end_of_document(tokenizer)
        return decides

    def run(on: Subject, settings: Mapping[str, Any]) -> list[Score]:
        on.observer.phase(f"{on.where}: {name}", len(prompts))
        texts = continuations.write(
            on.model, on.tokenizer, prompts,
            new_tokens=translation.NEW_TOKENS, stop=translation.STOP,
            where=f"{on.where}: {name}", observer=on.observer,
        )  # fmt: skip
        written = [text for (text,) in texts]
        return [
            Score(
                name, metric, translation.score(measure, written, expected), len(pairs),
                interval=translation.interval(measure, written, expected),
            )
            for metric, measure in metrics.items()
        ]  # fmt: skip

    return Task(name, translation.VERSION, settings, run)


def _paper(name: str, options: Options) -> Task:
    """Prepare a task of the paper's protocol: answers drawn in several runs."""
    assert options.data_dir is not None
    asked = protocol.prepare(name, options.data_dir, options.limit)
    runs = protocol.RUNS if options.runs is None else options.runs
    decides = {"questions": asked.fingerprint, "limit": options.limit, "runs": runs, "seed": 0}

    def settings(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
        tokenizers.end_of_document(tokenizer)
        return decides

    def run(on: Subject, settings: Mapping[str, Any]) -> list[Score]:
        on.observer.phase(f"{on.where}: {name}", len(asked.prompts))
        return asked.score(
            continuations.write(
                on.model, on.tokenizer, asked.prompts,
                new_tokens=asked.new_tokens, stop=asked.stop, copies=settings["runs"],
                sample=True, seed=settings["seed"],
                where=f"{on.where}: {name}", observer=on.observer,
            )
        )  # fmt: skip

    return Task(name, protocol.VERSION, settings, run)


FAMILIES: dict[str, Family] = {
    "lm": Family(lambda options: ["lm"], _language_modelling, ("data", "context", "stride")),
    "probes": Family(lambda options: list(probes.PROBES), _probe, ()),
    "benchmarks": Family(
        _held(benchmarks.find), _benchmark, ("data_dir",),
        ("needs files of questions", "name their folder with --data-dir"),
    ),
    "translation": Family(
        _held(parallel.find), _translation, ("data_dir",),
        ("needs files of parallel text", "name their folder with --data-dir"), "translate-",
    ),
    "paper": Family(
        _held(protocol.names), _paper, ("data_dir", "protocol", "runs"),
        ("needs files of questions or parallel text", "name their folder with --data-dir"),
        "paper-",
    ),
}  # fmt: skip
"""A family's name stands for all of its tasks."""

PROTOCOLS = ("paper",)
"""Families that `--protocol` names."""


def prepare(asked: Sequence[str], options: Options) -> list[Task]:
    """Return the tasks that are asked for, each once.

    `asked` are names of tasks, families, and tasks of lm-eval, each perhaps several with commas
    between; without any, `lm` where there are texts and all of a folder of files but the paper's,
    else `probes`. Under a protocol its tasks are meant, and all of them without any names. Raises
    ConfigError for what is no task, a task that lacks an option, an option that no task reads and a
    missing package; DataError for files that cannot be read, and where there are none.
    """
    known = {task: family for family in FAMILIES.values() for task in family.names(options)}
    if options.data_dir is not None and not any("data_dir" in f.takes for f in known.values()):
        examples = "dev-v1.1.json, anatomy_test.csv, ARC-Easy-Test.jsonl, blimp/*.jsonl, en-ru.tsv"
        fix = f"keep the files' original names ({examples}; all are in docs/evaluation.md)"
        raise DataError(f"{options.data_dir}: holds no benchmark that nacre knows; {fix}")
    names = _names(asked, options)
    chosen: dict[str, Callable[[str, Options], Task]] = {}
    problems: list[Problem] = []
    for name in dict.fromkeys(names):
        if name in FAMILIES:
            family, tasks = FAMILIES[name], FAMILIES[name].names(options)
            chosen |= dict.fromkeys(tasks, family.prepare)
            if not tasks:
                problems.append(_lacking(name, family, options, known))
        elif name in known:
            chosen[name] = known[name].prepare
        elif owner := _owner(name, options):
            problems.append(_lacking(name, owner, options, known))
        elif registry.has(name):
            chosen[name] = _registered
        else:
            problems.append(Problem("--tasks", f"there is no task {name!r}", _hint(name, known)))
    if chosen:
        problems += _unread(names, [known[task] for task in chosen if task in known], options)
    for option, value in (("--limit", options.limit), ("--runs", options.runs)):
        if value is not None and value < 1:
            problems.append(Problem(option, f"{value} is not 1 or more", "leave it out"))
    if problems:
        raise ConfigError(problems)
    return [make(task, options) for task, make in chosen.items()]


def _names(asked: Sequence[str], options: Options) -> list[str]:
    """Return the names of tasks and families that are meant."""
    names = [name.strip() for item in asked for name in item.split(",") if name.strip()]
    if options.protocol is not None:
        if options.protocol not in PROTOCOLS:
            fix = nearest(options.protocol, PROTOCOLS) or f"there is: {', '.join(PROTOCOLS)}"
            problem = Problem("--protocol", f"there is no {options.protocol!r}", fix)
            raise ConfigError(problem)
        begins = f"{options.protocol}-"
        return [begins + name.removeprefix(begins) for name in names] or [options.protocol]
    files = [name for name in ("benchmarks", "translation") if FAMILIES[name].names(options)]
    return names or [*(["lm"] if options.data is not None else []), *files] or ["probes"]


def _owner(name: str, options: Options) -> Family | None:
    """Return the family that would have a name, were there files for it."""
    if options.data_dir is not None and name in benchmarks.NAMES:
        return FAMILIES["benchmarks"]
    families = [family for family in FAMILIES.values() if family.begins]
    return next((family for family in families if name.startswith(family.begins or "")), None)


def _lacking(name: str, family: Family, options: Options, known: Iterable[str]) -> Problem:
    """Return what is wrong with a name that a family has no files for."""
    if options.data_dir is None:
        return Problem(f"--tasks {name}", *family.lacks)
    fix = nearest(name, known) or (
        "leave --data-dir out to fetch what lm-eval knows" if family.begins is None
        else "docs/evaluation.md says which files it needs"
    )  # fmt: skip
    return Problem("--tasks", f"{options.data_dir} holds no {name}", fix)


def _hint(name: str, known: Iterable[str]) -> str:
    """Return the task nearest to what is none, else where the tasks are listed."""
    own = list(dict.fromkeys([*FAMILIES, *known]))
    others = registry.names()
    more = (
        "`lm-eval ls tasks` lists lm-eval's" if others
        else f"for lm-eval's own, {clone_install('eval')}"
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
