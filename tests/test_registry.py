"""lm-eval's own tasks: scores, parts, what is drawn again; what cannot be loaded."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
from lm_eval.tasks import TaskManager
from test_likelihood import END, letters, tiny

from nacre.errors import ConfigError
from nacre.evaluate import registry, tasks
from nacre.evaluate.scores import Score
from nacre.evaluate.tasks import Options

CHOICE = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
fewshot_split: test
output_type: multiple_choice
doc_to_text: "{{{{ask}}}}"
doc_to_choice: "{{{{options}}}}"
doc_to_target: answer
metric_list:
  - {{metric: acc, aggregation: mean, higher_is_better: true}}
"""
TEXTS = """
task: texts
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{{{ask}}}}"
metric_list:
  - {{metric: byte_perplexity, aggregation: weighted_perplexity, higher_is_better: false}}
"""

FOLDER = registry.folder


def test_a_name_that_stands_in_no_file_is_none_without_reading_the_tasks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def manager() -> None:
        raise AssertionError("it takes seconds")

    monkeypatch.setattr(registry, "manager", manager)
    monkeypatch.setattr(registry, "folder", FOLDER)
    assert not registry.has("hellaswak")
    assert {"hellaswag", "mmlu", "arc_easy"} <= set(registry.names())
    assert refused("hellaswak") == (
        "--tasks: there is no task 'hellaswak' (did you mean 'hellaswag'?)"
    )


@pytest.fixture(autouse=True)
def _local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Know tasks of local files, their group and tag, and some that cannot be run."""
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    folder = tmp_path / "tasks"
    folder.mkdir()
    for name, options in (("two", ["a", "b"]), ("four", ["a", "b", "c", "d"])):
        rows = [{"ask": f"Is it {i}?", "options": options, "answer": i % 2} for i in range(6)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
        text = CHOICE.format(name=name, file=tmp_path / f"{name}.jsonl")
        (folder / f"{name}.yaml").write_text(text + "tag: all_of_them\n")
    shots = CHOICE.format(name="shots", file=tmp_path / "two.jsonl") + "num_fewshot: 2\n"
    (folder / "shots.yaml").write_text(shots)
    (folder / "texts.yaml").write_text(TEXTS.format(file=tmp_path / "two.jsonl"))
    group = "group: both\ntask: [two, four]\naggregate_metric_list:\n  - {metric: acc}\n"
    (folder / "both.yaml").write_text(group)
    far = CHOICE.format(name="far", file="x").replace("path: json", "path: no/where")
    (folder / "far.yaml").write_text(far)
    unsafe = CHOICE.format(name="unsafe", file=tmp_path / "two.jsonl") + "unsafe_code: true\n"
    (folder / "unsafe.yaml").write_text(unsafe)
    known = TaskManager(include_path=str(folder), include_defaults=False)
    monkeypatch.setattr(registry, "manager", lambda: known)
    monkeypatch.setattr(registry, "folder", lambda: folder)


def scored(name: str, limit: int | None = None) -> list[Score]:
    loaded = registry.load(name)
    return registry.score(name, loaded, tiny(), letters(eos_token=END), limit=limit)


def refused(*names: str, **options: Any) -> str:
    with pytest.raises(ConfigError) as caught:
        tasks.prepare(names, Options(**options))
    return str(caught.value)


def test_a_group_has_scores_of_its_own_and_of_its_parts() -> None:
    scores = scored("both", limit=5)
    assert [(s.task, s.subset, s.metric, s.n, s.chance) for s in scores] == [
        ("both", "", "acc", 10, 0.375), ("both", "two", "acc", 5, 0.5),
        ("both", "four", "acc", 5, 0.25),
    ]  # fmt: skip
    assert scores[0].value == (scores[1].value + scores[2].value) / 2
    for score in scores:
        low, high = score.interval or (math.nan, math.nan)
        assert low <= score.value <= high
        bounds = [low * score.n, high * score.n]
        assert bounds == pytest.approx([*map(round, bounds)]), "means of questions drawn again"
    assert {(s.subset, s.n) for s in scored("all_of_them")} == {("two", 6), ("four", 6)}


def test_a_metric_that_is_no_mean_has_an_interval_too() -> None:
    (score,) = scored("texts")
    assert (score.metric, score.n, score.chance) == ("byte_perplexity", 6, None)
    assert score.value > 1
    low, high = score.interval or (math.nan, math.nan)
    assert low < score.value < high
    assert low > 1


def test_every_model_sees_the_same_examples() -> None:
    loaded = registry.load("shots")
    asked: list[list[str]] = []
    for _ in range(2):
        registry.score("shots", loaded, tiny(), letters(eos_token=END))
        (task,) = loaded["tasks"].values()
        asked.append([instance.args[0] for instance in task.instances])
    assert asked[0] == asked[1]
    assert asked[0][0].count("Is it") == 3


def test_settings_follow_the_questions_and_the_limit(tmp_path: Path) -> None:
    first = registry.settings(registry.load("both"), 5)
    assert registry.settings(registry.load("both"), 5) == first
    assert registry.settings(registry.load("both"), None)["limit"] is None
    path = tmp_path / "four.jsonl"
    path.write_text(path.read_text().replace("Is it 1?", "Is it 9?"))
    assert registry.settings(registry.load("both"), 5)["questions"] != first["questions"]


def test_names_of_lm_eval_are_tasks_and_their_data_is_fetched_first() -> None:
    (task,) = tasks.prepare(["both"], Options(limit=2))
    assert task.version.startswith("lm-eval 0.")
    assert task.settings(tiny().config, letters(eos_token=END))["limit"] == 2
    with pytest.raises(ConfigError, match="no eos, bos or sep token"):
        task.settings(tiny().config, letters())
    said = refused("far")
    assert said.startswith("far: lm-eval cannot load it (Couldn't reach 'no/where' on the Hub")
    assert said.endswith("(connect to the hub, or name a folder of its files with --data-dir)")
    assert refused("unsafe") == ("unsafe: unsafe runs code that the model writes (leave it out)")


def test_what_is_no_task_gets_the_nearest_one(monkeypatch: pytest.MonkeyPatch) -> None:
    assert refused("boht") == "--tasks: there is no task 'boht' (did you mean 'both'?)"
    assert refused("khop2") == "--tasks: there is no task 'khop2' (did you mean 'khop-2'?)"
    assert refused("squid").endswith("brackets, modular; `lm-eval ls tasks` lists lm-eval's)")
    monkeypatch.setattr(registry, "folder", FOLDER)
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    fix = "in a clone of nacre: pip install -e '.[eval]'"
    assert refused("squid").endswith("modular; for lm-eval's own, " + fix + ")")
