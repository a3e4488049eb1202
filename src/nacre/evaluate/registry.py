"""lm-eval's own tasks, by its names, on data that it fetches from the hub.

Needs lm_eval, an extra. What it loads and reports is without types.

N questions, R resamples.
"""

from __future__ import annotations

import functools
import hashlib
import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nacre.errors import ConfigError, Problem
from nacre.evaluate.scores import Score, mean_interval
from nacre.train.observer import Observer

RESAMPLES = 200
"""Of a metric that is no mean: some take seconds to compute."""

_NAME = re.compile(rb"""^(?:task|group|tag):[ ]*['"]?([\w.:/+-]+)['"]?[ ]*(?:#.*)?\r?$""", re.M)

SEED = 1234
"""What lm-eval draws the examples before a question by, unless it is told otherwise."""


@functools.cache
def manager() -> Any:
    """Return what knows lm-eval's tasks; it takes seconds to read them."""
    from lm_eval.tasks import TaskManager

    return TaskManager()


def folder() -> Path | None:
    """Return where the files of lm-eval's tasks are, None where it is not installed."""
    found = importlib.util.find_spec("lm_eval")
    places = None if found is None else found.submodule_search_locations
    return Path(places[0]) / "tasks" if places else None


@functools.cache
def _files(place: Path) -> bytes:
    """Return all that the files of tasks say, as it stands there; some include one without suffix.

    It takes half a second, reading them as YAML ten and more.
    """
    paths = [path for path in sorted(place.rglob("*")) if path.suffix in ("", ".yaml")]
    return b"\n".join(path.read_bytes() for path in paths if path.is_file())


def has(name: str) -> bool:
    """Tell whether lm-eval has a task, group or tag of that name.

    A name that stands in no file is none: that is known without reading them as YAML.
    """
    place = folder()
    if place is None or name.encode() not in _files(place):
        return False
    return name in manager().all_tasks


def names() -> list[str]:
    """Return the names that lm-eval's files give to tasks, groups and tags, but for tags in lists.

    There are none where it is not installed.
    """
    place = folder()
    return [] if place is None else sorted({n.decode() for n in _NAME.findall(_files(place))})


def load(name: str) -> Any:
    """Load a task or group with its data; raise ConfigError where it cannot be had or run."""
    try:
        loaded = manager().load([name])
    except (ImportError, OSError, RuntimeError, ValueError) as error:  # datasets raises any of them
        message = f"lm-eval cannot load it ({' '.join(str(error).split())})"
        fix = "connect to the hub, or name a folder of its files with --data-dir"
        raise ConfigError(Problem(name, message, fix)) from None
    for task in loaded["tasks"].values():
        for mark, what in (("UNSAFE_CODE", "runs code that the model writes"),
                           ("MULTIMODAL", "shows more than text")):  # fmt: skip
            if getattr(task, mark, False):
                raise ConfigError(Problem(name, f"{task.task_name} {what}", "leave it out"))
        if task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=0)
    return loaded


def version() -> str:
    """Return the version of all tasks: lm-eval's."""
    return f"lm-eval {metadata.version('lm_eval')}"


def settings(loaded: Any, limit: int | None) -> dict[str, Any]:
    """Return what decides the scores besides the model."""
    total = hashlib.sha256()
    for name, task in sorted(loaded["tasks"].items()):
        about = [name, task.VERSION, task.get_config("num_fewshot")]
        for record in (about, *task.eval_docs):
            total.update(json.dumps(record, sort_keys=True, default=repr).encode() + b"\n")
    return {"questions": total.hexdigest(), "limit": limit}


def score(
    name: str,
    loaded: Any,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    *,
    limit: int | None = None,
    where: str = "the model",
    observer: Observer | None = None,
) -> list[Score]:
    """Score what `load` returned, of every task the first `limit` questions; parts are subsets.

    Intervals are bootstrapped over questions; of a group there is one where its metric is their
    mean. Raises CheckpointError for a model without finite likelihoods and ConfigError for an
    answer longer than the context.
    """
    from lm_eval import evaluator

    from nacre.evaluate.likelihood import Likelihood

    for task in loaded["tasks"].values():
        task.set_fewshot_seed(seed=SEED)  # every model sees the same examples
    scorer = Likelihood(model, tokenizer, name=where)
    evaluate: Any = evaluator.evaluate  # a decorator without types hides what it takes
    found = evaluate(scorer, loaded, limit=limit, bootstrap_iters=0)
    requests = sum(len(task.instances) for task in loaded["tasks"].values())
    scorer.warn_of_cuts(name, requests, observer or Observer())
    return list(_reported(name, loaded["tasks"], found))


def _reported(asked: str, tasks: Mapping[str, Any], found: Mapping[str, Any]) -> Iterator[Score]:
    """Yield the scores in what lm-eval reports: first those of all that was asked for."""
    for name, results in sorted(found["results"].items(), key=lambda result: result[0] != asked):
        for key, value in results.items():
            metric, _, kind = key.partition(",")
            if not kind or metric.endswith("_stderr") or not isinstance(value, int | float):
                continue
            samples = [s for s in _samples(found, name) if s["filter"] == kind]
            values = [sample[metric] for sample in samples if metric in sample]
            aggregate = tasks[name].aggregation()[metric] if name in tasks else None
            yield Score(
                asked,
                metric if kind == "none" else key,
                float(value),
                results["sample_len"],
                "" if name == asked else name,
                _interval(value, values, aggregate),
                _chance(samples) if metric in ("acc", "acc_norm") else None,
            )


def _interval(
    value: float, values: Sequence[Any], aggregate: Callable[[list[Any]], float] | None
) -> tuple[float, float] | None:
    """Return the interval of what `aggregate` makes of the values; without it only of a mean."""
    if len(values) < 2:
        return None
    numbers = all(isinstance(v, int | float) for v in values)
    if numbers and math.isclose(math.fsum(values) / len(values), value, abs_tol=1e-9):
        return mean_interval(values)
    if aggregate is None:
        return None
    drawn_RN = np.random.default_rng(0).integers(len(values), size=(RESAMPLES, len(values)))
    found = [aggregate([values[index] for index in row_N]) for row_N in drawn_RN.tolist()]
    low, high = np.percentile(found, [2.5, 97.5])
    return float(low), float(high)


def _chance(samples: list[dict[str, Any]]) -> float | None:
    """Return what guessing gives where every question has several options."""
    options = [len(sample["arguments"]) for sample in samples if "acc_mutual_info" not in sample]
    if len(options) < len(samples) or min(options, default=1) < 2:
        return None
    return math.fsum(1 / count for count in options) / len(options)


def _samples(found: Mapping[str, Any], name: str) -> list[dict[str, Any]]:
    parts = found["group_subtasks"].get(name, [])
    return found["samples"].get(name, []) + [s for part in parts for s in _samples(found, part)]
