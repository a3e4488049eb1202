"""Benchmarks by likelihood: lm-eval's own tasks give the same; scores, messages."""

from __future__ import annotations

import csv
import json
import math
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import lm_eval
import pytest
import torch
from conftest import VOCABULARY, Build
from lm_eval.api.task import ConfigurableTask
from lm_eval.tasks._yaml_loader import load_yaml
from test_likelihood import END, RULES, answers, compose, letters, plain, tiny
from transformers import PreTrainedTokenizerFast

from nacre.errors import ConfigError, DataError
from nacre.evaluate import benchmarks, harness
from nacre.evaluate.scores import Score, mean_interval
from nacre.train.observer import Observer

REAL = Path(__file__).parents[2] / "shared" / "data" / "bench"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return letters(eos_token=END)


def write(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def arc(stem: str, answer: str, *options: str) -> dict[str, Any]:
    choices = [{"text": o, "label": label} for o, label in zip(options, "ABCDE", strict=False)]
    return {"question": {"stem": stem, "choices": choices}, "answerKey": answer}


def swag(first: str, second: str, label: int, *endings: str) -> dict[str, Any]:
    context = {"activity_label": "Cooking", "ctx_a": first, "ctx_b": second}
    return {**context, "endings": list(endings), "label": label}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A few questions of every kind."""
    for subject, right in (("anatomy", "ADC"), ("high_school_physics", "BC")):
        rows = [f" Is it {i}?,an arm,a leg,the sea,{i},{a}" for i, a in enumerate(right)]
        write(tmp_path / "mmlu" / f"{subject}_test.csv", *rows)
    write(
        tmp_path / "ARC-Challenge-Test.jsonl",
        arc("What melts?", "C", "ice", "a rock", "the sun and the sea", "fire"),
        arc("What runs?", "A", "a dog", "a stone", "nothing"),
        arc("Who sees?", "E", "a", "be", "see", "deed", "an eye"),
        arc("Who eats it?", "B", "all of them", "I"),
    )
    write(
        tmp_path / "dev_rand_split.jsonl",
        arc("Where is it? ", "B", "here", "there", "at the end", "in it", "no"),
        arc("Why is it?", "E", "so", "because", "it is", "no", "not"),
    )
    write(
        tmp_path / "hellaswag_val.jsonl",
        swag("A man cooks.", "he", 1, "eats [title] it.", "is seen  in a hat", "sleeps"),
        swag("A man sits.", "", 0, "He [step] stands", "Again", "A dog sits on the man"),
    )
    write(tmp_path / "lambada_test_plain_text.txt", "he took the hat", "a dog and a dog", "no no")
    write(tmp_path / "lambada_test.jsonl", {"text": "He took\nit, the hat"}, {"text": "Ask a dog"})
    pairs = [("the dogs sit", "the dogs sits"), ("I sat.", "I sit sat."), ("so it is", "so it are")]
    lines = [{"sentence_good": good, "sentence_bad": bad} for good, bad in pairs]
    write(tmp_path / "blimp" / "agreement.jsonl", *lines)
    write(tmp_path / "blimp" / "order.jsonl", {"sentence_good": "it is", "sentence_bad": "is it"})
    questions = [
        {"question": "What is it?", "answers": [{"text": "the sea"}, {"text": "sea"}]},
        {"question": "Who is it?", "answers": [], "is_impossible": True},
        {"question": "Where is it?", "answers": [{"text": "here"}]},
    ]
    paragraph = {"context": "It is the sea. It is here.", "qas": questions}
    write(tmp_path / "dev-v2.0.json", {"data": [{"title": "A sea", "paragraphs": [paragraph]}]})
    return tmp_path


def asked(folder: Path, name: str) -> list[tuple[str, str]]:
    """Return the requests of a benchmark, question by question."""
    found = benchmarks.find(folder)[name]
    form = harness.FORMS[found.format]
    prompts = [form.prompt(item) for item in harness.questions(found)]
    return [(context, option) for context, options in prompts for option in options]


# --- against lm-eval's own tasks ---


def hub(found: benchmarks.Benchmark) -> list[dict[str, Any]]:
    """Return a benchmark's questions as lm-eval's data sets have them."""
    (path,) = found.files[:1]
    text = path.read_text()
    if found.format == "mmlu":
        rows = csv.reader(text.splitlines())
        return [{"question": r[0], "choices": r[1:5], "answer": "ABCD".index(r[5])} for r in rows]
    if found.format == "lambada_text":
        return [{"text": line} for line in text.splitlines()]
    lines = [json.loads(line) for line in text.splitlines()]
    if found.format not in ("arc", "commonsense_qa"):
        return lines
    return [
        {
            "question": line["question"]["stem"],
            "choices": {
                key: [choice[key] for choice in line["question"]["choices"]]
                for key in ("text", "label")
            },
            "answerKey": line["answerKey"],
        }
        for line in lines
    ]


TASKS = {
    "mmlu": "mmlu/default/mmlu_anatomy.yaml",
    "arc_challenge": "arc/arc_challenge.yaml",
    "commonsense_qa": "commonsense_qa/default.yaml",
    "hellaswag": "hellaswag/hellaswag.yaml",
    "lambada_standard": "lambada/lambada_standard.yaml",
    "lambada_openai": "lambada/lambada_openai.yaml",
    "blimp": "blimp/adjunct_island.yaml",
}


@pytest.mark.parametrize("name", TASKS)
def test_prompts_and_scores_are_those_of_lm_evals_tasks(
    name: str, folder: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    found = benchmarks.find(folder)[name]
    splits = dict.fromkeys(("train", "validation", "test", "dev"), hub(found))
    data = datasets.DatasetDict(
        {split: datasets.Dataset.from_list(rows) for split, rows in splits.items()}
    )
    config = load_yaml(Path(lm_eval.__file__).parent / "tasks" / TASKS[name])
    task = ConfigurableTask(config={**config, "custom_dataset": lambda **options: data})
    task.build_all_requests()
    requests = [instance.args for instance in task.instances]
    assert requests == asked(folder, name)[: len(requests)]
    model = tiny()
    by_question: dict[int, list[tuple[float, bool]]] = {}
    for instance, answer in zip(
        task.instances, answers(plain(model, tokenizer), requests), strict=True
    ):
        by_question.setdefault(instance.doc_id or 0, []).append(answer)
    docs = list(task.eval_docs)
    results = [task.process_results(docs[i], given) for i, given in by_question.items()]
    scores = harness.score(found, harness.questions(found), model, tokenizer)
    part = {"mmlu": "anatomy", "blimp": "agreement"}.get(name, "")
    mine = {score.metric: score for score in scores if score.subset == part}
    assert set(mine) == set(task.aggregation())
    for metric, aggregate in task.aggregation().items():
        assert mine[metric].value == pytest.approx(aggregate([r[metric] for r in results]), 1e-4)
        assert mine[metric].n == len(docs)


def test_squad_is_asked_as_lm_eval_asks_it(folder: Path) -> None:
    from lm_eval.tasks.squadv2.task import SQuAD2

    doc = {
        "title": "A sea", "context": "It is the sea. It is here.", "question": "What is it?",
        "answers": {"text": ["the sea", "sea"]},
    }  # fmt: skip
    task: Any = object.__new__(SQuAD2)
    requests = asked(folder, "squad_v2")
    assert requests[0] == (task.doc_to_text(doc), task.doc_to_target(doc))
    assert len(requests) == 2, "the question without an answer is left out"


# --- scores ---


class Watch(Observer):
    """Remembers warnings and counts questions."""

    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.counted: list[int] = []

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def advance(self, units: int) -> None:
        self.counted.append(units)


def run(
    folder: Path, *names: str, model: Any = None, limit: int | None = None, **options: Any
) -> dict[tuple[str, str, str], Score]:
    """Score benchmarks of a folder, all without names."""
    model, tokenizer, found = model or tiny(), letters(eos_token=END), benchmarks.find(folder)
    return {
        (score.task, score.subset, score.metric): score
        for name in names or found
        for score in harness.score(
            found[name], harness.questions(found[name], limit), model, tokenizer, **options
        )
    }


def test_chance_lines_and_numbers_of_questions_are_exact(folder: Path) -> None:
    scores = run(folder)
    assert {key: (score.n, score.chance) for key, score in scores.items()} == {
        ("arc_challenge", "", "acc"): (4, (1 / 4 + 1 / 3 + 1 / 5 + 1 / 2) / 4),
        ("arc_challenge", "", "acc_norm"): (4, (1 / 4 + 1 / 3 + 1 / 5 + 1 / 2) / 4),
        ("blimp", "", "acc"): (4, 0.5),
        ("blimp", "agreement", "acc"): (3, 0.5),
        ("blimp", "order", "acc"): (1, 0.5),
        ("commonsense_qa", "", "acc"): (2, 0.2),
        ("hellaswag", "", "acc"): (2, 1 / 3),
        ("hellaswag", "", "acc_norm"): (2, 1 / 3),
        ("lambada_openai", "", "acc"): (2, None),
        ("lambada_openai", "", "perplexity"): (2, None),
        ("lambada_standard", "", "acc"): (3, None),
        ("lambada_standard", "", "perplexity"): (3, None),
        ("mmlu", "", "acc"): (5, 0.25),
        ("mmlu", "anatomy", "acc"): (3, 0.25),
        ("mmlu", "high_school_physics", "acc"): (2, 0.25),
        ("squad_v2", "", "bits_per_byte"): (2, None),
    }
    parts = [scores["mmlu", part, "acc"] for part in ("anatomy", "high_school_physics")]
    assert scores["mmlu", "", "acc"].value == sum(part.value * part.n for part in parts) / 5


def test_intervals_are_bootstrapped(folder: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny()
    scores = run(folder, "lambada_standard", "squad_v2", "blimp", model=model)
    given = answers(plain(model, tokenizer), asked(folder, "lambada_standard"))
    low, high = mean_interval([nats for nats, _ in given]) or (math.nan, math.nan)
    found = scores["lambada_standard", "", "perplexity"]
    assert found.value == pytest.approx(math.exp(-sum(nats for nats, _ in given) / 3))
    assert found.interval == pytest.approx((math.exp(-high), math.exp(-low)))
    bits = [
        -nats / math.log(2)
        for nats, _ in answers(plain(model, tokenizer), asked(folder, "squad_v2"))
    ]
    found = scores["squad_v2", "", "bits_per_byte"]
    assert found.value == pytest.approx(sum(bits) / len(" the sea here"))
    ends = sorted([bits[0] / len(" the sea"), bits[1] / len(" here")])
    assert found.interval == pytest.approx(tuple(ends))
    assert scores["blimp", "order", "acc"].interval is None


def test_a_model_that_knows_the_answers_is_right(folder: Path) -> None:
    """A head that always says the same letter: the greedy last word, and which option."""
    model: Any = tiny()
    torch.nn.init.zeros_(model.lm_head.weight)
    said = letters().convert_tokens_to_ids("o")
    model.lm_head.bias = torch.nn.Parameter(5.0 * torch.eye(VOCABULARY)[said])
    write(folder / "lambada_test_plain_text.txt", "he took oooo", "he took ooxo")
    write(
        folder / "ARC-Challenge-Test.jsonl",
        arc("Who?", "A", "ooo", "a"),
        arc("Who?", "B", "oooo", "oo"),
    )
    scores = run(folder, "lambada_standard", "arc_challenge", model=model)
    values = {key[::2]: score.value for key, score in scores.items()}
    assert values["lambada_standard", "acc"] == 0.0, "a space comes before the word"
    assert values["arc_challenge", "acc"] == 1.0
    assert values["arc_challenge", "acc_norm"] == 0.5, "a character of oooo costs less"


def test_limit_is_of_each_subject(folder: Path) -> None:
    watch = Watch()
    scores = run(folder, "mmlu", "arc_challenge", "squad_v2", limit=2, observer=watch)
    assert scores["mmlu", "", "acc"].n == 4
    assert scores["arc_challenge", "", "acc"].n == 2
    assert scores["squad_v2", "", "bits_per_byte"].n == 2, "of those with an answer"
    assert sum(watch.counted) == 8
    assert run(folder, "mmlu", limit=1)["mmlu", "", "acc"].n == 2


def test_scores_do_not_depend_on_the_batch(folder: Path) -> None:
    whole = run(folder)
    for batch_size in (1, 5):
        for key, score in run(folder, batch_size=batch_size).items():
            assert score.value == pytest.approx(whole[key].value, rel=1e-4)


@pytest.mark.parametrize("rule", RULES[1:3])
def test_a_composition_is_scored(
    rule: str, folder: Path, pico: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = compose(pico, rule)
    scores = run(folder, "blimp", "lambada_standard", model=model)
    given = answers(plain(model, tokenizer), asked(folder, "blimp"))
    right = [good[0] > bad[0] for good, bad in zip(given[::2], given[1::2], strict=True)]
    assert scores["blimp", "", "acc"].value == sum(right) / 4
    assert scores["lambada_standard", "", "perplexity"].value > 1


# --- messages ---


def test_requests_that_do_not_fit_are_cut_and_said_once(
    folder: Path, caplog: pytest.LogCaptureFixture, tokenizer: PreTrainedTokenizerFast
) -> None:
    model, watch = tiny(context=24), Watch()
    options = {"model": model, "where": "mine", "observer": watch}
    scores = run(folder, "arc_challenge", "blimp", "squad_v2", **options)
    said = "are longer than the context of 24 tokens: their beginning was cut off"
    assert watch.warnings == [
        f"mine: 14 of 14 requests of arc_challenge {said}",
        f"mine: 2 of 2 requests of squad_v2 {said}",
    ]
    assert not caplog.records
    given = answers(plain(model, tokenizer), asked(folder, "squad_v2"))
    bits = -sum(nats for nats, _ in given) / math.log(2) / len(" the sea here")
    assert scores["squad_v2", "", "bits_per_byte"].value == pytest.approx(bits)
    assert "exceeds model's maximum length (24)" in caplog.text, "what HFLM says each time"


def refused(error: type[Exception], call: Callable[[], object]) -> str:
    with pytest.raises(error) as caught:
        call()
    return str(caught.value)


def test_models_that_cannot_be_asked_are_refused_without_weights(folder: Path) -> None:
    found = benchmarks.find(folder)["arc_challenge"]
    items = harness.questions(found)

    def check(context: int, tokenizer: PreTrainedTokenizerFast) -> None:
        harness.check(found, items, tiny(context).config, tokenizer)

    check(20, letters(eos_token=END))
    check(20, letters(bos_token=END))
    assert refused(ConfigError, lambda: check(16, letters(eos_token=END))) == (
        f"arc_challenge: an answer in {found.files[0]}, line 1 is 20 tokens, the model reads 16 "
        "(leave the task out)"
    )
    assert "no eos, bos or sep token" in refused(ConfigError, lambda: check(20, letters()))


def test_files_without_an_answer_are_refused(folder: Path) -> None:
    questions = [{"question": "Who?", "answers": [], "is_impossible": True}]
    paragraph = {"context": "It is here.", "qas": questions}
    path = folder / "dev-v2.0.json"
    write(path, {"data": [{"title": "A sea", "paragraphs": [paragraph]}]})
    said = refused(DataError, lambda: harness.questions(benchmarks.find(folder)["squad_v2"]))
    assert said == f"{path}: none of its questions has an answer"


def test_without_lm_eval_there_is_one_message(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    message = "benchmarks: need the package lm_eval (in a clone of nacre: pip install -e '.[eval]')"
    assert refused(ConfigError, lambda: run(folder, "blimp")) == message


# --- the real files ---


@pytest.mark.skipif(
    not REAL.is_dir() and os.environ.get("CI") != "true", reason=f"needs the files of {REAL}"
)
def test_real_questions_get_the_picks_of_hflm(tokenizer: PreTrainedTokenizerFast) -> None:
    model = tiny(context=128)
    scores = run(REAL, "mmlu", "commonsense_qa", model=model, limit=4)
    for name in ("mmlu", "commonsense_qa"):
        found = benchmarks.find(REAL)[name]
        items, form = harness.questions(found, 4), harness.FORMS[found.format]
        right = 0
        scorer = plain(model, tokenizer)
        requests = [(c, o) for c, options in map(form.prompt, items) for o in options]
        given = iter(answers(scorer, requests))
        for item in items:
            nats = [next(given)[0] for _ in item.options]
            right += nats.index(max(nats)) == item.answer
        assert scores[name, "", "acc"].value == right / len(items)
        assert scores[name, "", "acc"].n == {"mmlu": 112, "commonsense_qa": 4}[name]
