"""The paper's protocol: prompts, what counts as right, means over runs, a model that knows."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import VOCABULARY
from test_likelihood import END, letters, tiny

from nacre.errors import ConfigError, DataError, NacreError
from nacre.evaluate import continuations, protocol, tasks
from nacre.evaluate.scores import Score, mean_interval
from nacre.evaluate.tasks import Options, Subject
from nacre.train.observer import Observer


def write(path: Path, *lines: Any) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")


def choice(stem: str, answer: str, *options: str) -> dict[str, Any]:
    choices = [{"text": o, "label": label} for o, label in zip(options, "12345", strict=False)]
    return {"question": {"stem": stem, "choices": choices}, "answerKey": answer}


def asked(question: str, *answers: str) -> dict[str, Any]:
    return {"question": question, "answers": [{"text": text} for text in answers],
            "is_impossible": not answers}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write(tmp_path / "anatomy_test.csv", " Is it? ,an arm,a leg,a hat,no,A", "Who?,a,b,c,d,B")
    write(tmp_path / "high_school_physics_test.csv", "What?,a,b,c,d,A")
    write(tmp_path / "ARC-Easy-Dev.jsonl", choice("What melts?", "2", "a rock", "ice", "fire"))
    write(tmp_path / "ARC-Challenge-Dev.jsonl", choice("Why?", "1", "so", "no", "it is", "not"))
    write(tmp_path / "dev_rand_split.jsonl", choice("Where?", "5", "a", "b", "c", "d", "e"))
    questions = [asked("What is it?", "the sea", "sea"), asked("Who?"), asked("Long?", "a " * 9)]
    paragraph = {"context": "It is the sea.", "qas": [*questions, asked("Is it?", "it")]}
    write(tmp_path / "dev-v2.0.json", {"data": [{"title": "Sea", "paragraphs": [paragraph]}]})
    write(tmp_path / "en-ru.tsv", "en\tru", "the sea\tморе", "a dog\tсобака")
    return tmp_path


def texts(name: str, folder: Path, *written: list[str]) -> dict[tuple[str, str], Score]:
    """Return a task's scores of texts, a list for every question with a text for every run."""
    scores = protocol.prepare(name, folder).score(written)
    return {(score.subset, score.metric): score for score in scores}


# --- what is asked ---


def test_what_is_asked_is_what_the_paper_asked(folder: Path) -> None:
    assert protocol.names(folder) == [
        *protocol.BENCHMARKS, "paper-translate-en-ru", "paper-translate-ru-en",
    ]  # fmt: skip
    first = {name: protocol.prepare(name, folder) for name in protocol.names(folder)}
    assert {name: (asked.prompts[0], asked.new_tokens) for name, asked in first.items()} == {
        "paper-mmlu": (
            "Question: Is it?\nOptions: A) an arm B) a leg C) a hat D) no\nAnswer:", 1
        ),
        "paper-arc_easy": ("Question: What melts?\nOptions: A) a rock B) ice C) fire\nAnswer:", 2),
        "paper-arc_challenge": (
            "Question: Why?\nOptions: A) so B) no C) it is D) not\nAnswer:", 2
        ),
        "paper-commonsense_qa": ("Question: Where?\nOptions: A) a B) b C) c D) d E) e\nAnswer:", 2),
        "paper-squad_v2": ("Context: It is the sea.\nQuestion: What is it?\nAnswer:", 16),
        "paper-translate-en-ru": ("Translate from English to Russian:\nthe sea\nAnswer:", 128),
        "paper-translate-ru-en": ("Translate from Russian to English:\nморе\nAnswer:", 128),
    }  # fmt: skip
    (folder / "ARC-Easy-Dev.jsonl").rename(folder / "ARC-Easy-Test.jsonl")
    assert "paper-arc_easy" not in protocol.names(folder), "the validation split counts"


def test_of_squad_256_questions_with_short_answers_are_asked(folder: Path) -> None:
    assert len(protocol.prepare("paper-squad_v2", folder).prompts) == 2
    questions = [asked(f"Is it {number}?", "x" * (6 + number % 4)) for number in range(1600)]
    paragraph = {"context": "It is.", "qas": questions}
    write(folder / "dev-v2.0.json", {"data": [{"title": "Sea", "paragraphs": [paragraph]}]})
    prompts = protocol.prepare("paper-squad_v2", folder).prompts
    assert len(prompts) == len(set(prompts)) == 256
    numbers = [int(prompt.split("Is it ")[1].split("?")[0]) for prompt in prompts]
    assert numbers == sorted(numbers)
    assert numbers[0] == 0
    assert numbers[-1] > 1590, "from all of the file"
    assert {number % 4 for number in numbers} == {0, 1, 2}
    assert protocol.prepare("paper-squad_v2", folder, 3).prompts == prompts[:3]


# --- what counts ---


def test_the_first_letter_is_compared_in_every_run(folder: Path) -> None:
    scores = texts("paper-mmlu", folder, [" A", "A", "B", ""], ["B", "\nB", "b", "B)"],
                   ["D", "C", "A", "x"])  # fmt: skip
    runs = [2 / 3, 2 / 3, 1 / 3, 1 / 3]
    whole = scores["", "accuracy"]
    assert (whole.task, whole.n, whole.chance) == ("paper-mmlu", 3, 0.25)
    assert whole.value == pytest.approx(0.5)
    assert whole.interval == pytest.approx(mean_interval(runs))
    assert whole.corrected == pytest.approx((0.5 - 0.25) / 0.75)
    parts = {part: (s.value, s.n) for (part, _), s in scores.items()}
    assert parts == {
        "": (pytest.approx(0.5), 3), "anatomy": (0.625, 2), "high_school_physics": (0.25, 1),
    }  # fmt: skip
    chances = {
        name: texts(f"paper-{name}", folder, ["A"])["", "accuracy"].chance
        for name in ("arc_easy", "arc_challenge", "commonsense_qa")
    }
    assert chances == {"arc_easy": 1 / 3, "arc_challenge": 0.25, "commonsense_qa": 0.2}


def test_an_answer_to_squad_may_stand_anywhere(folder: Path) -> None:
    scores = texts("paper-squad_v2", folder, [" I see the sea.", "The Sea"], ["it", "It is"])
    found = scores["", "match"]
    assert (found.value, found.n, found.chance) == (0.5, 2, None)


def test_translations_are_scored_run_by_run(folder: Path) -> None:
    scores = texts("paper-translate-ru-en", folder, ["the sea", "x"], ["a dog", "y"])
    assert scores["", "chrf"].value == pytest.approx(50.0)
    assert scores["", "chrf"].interval == (0.0, 100.0)
    assert scores["", "bleu"].n == 2


# --- a model ---


def say(letter: str) -> Any:
    model: Any = tiny(context=128)
    torch.nn.init.zeros_(model.lm_head.weight)
    said = letters().convert_tokens_to_ids(letter)
    model.lm_head.bias = torch.nn.Parameter(50.0 * torch.eye(VOCABULARY)[said])
    return model


def test_a_model_that_says_one_letter_is_right_where_it_is_the_answer(folder: Path) -> None:
    (task,) = tasks.prepare(["mmlu"], Options(data_dir=folder, protocol="paper", runs=3))
    assert task.name == "paper-mmlu"
    model, tokenizer = say("A"), letters(eos_token=END)
    settings = task.settings(model.config, tokenizer)
    assert settings.keys() == {"questions", "limit", "runs", "seed"}
    assert settings["runs"] == 3
    scores = task.run(Subject(model, tokenizer, "mine", Observer()), settings)
    values = {score.subset: (score.value, score.interval) for score in scores}
    assert values[""] == (pytest.approx(2 / 3), pytest.approx((2 / 3, 2 / 3)))
    assert values["anatomy"] == (0.5, (0.5, 0.5))
    assert values["high_school_physics"] == (1.0, (1.0, 1.0))


def learned(pairs: dict[str, str]) -> Any:
    """Train a tiny model until it continues every prompt with its answer."""
    tokenizer, model = letters(eos_token=END), tiny(context=128)
    rows = [[*tokenizer(prompt + answer).input_ids, 0] for prompt, answer in pairs.items()]
    longest = max(map(len, rows))
    ids = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
    labels = torch.full_like(ids, -100)
    for label, row, prompt in zip(labels, rows, pairs, strict=True):
        begin = len(tokenizer(prompt).input_ids)
        label[begin : len(row)] = torch.tensor(row[begin:])
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for _ in range(150):
        loss: Any = model(input_ids=ids, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if loss < 0.003:
            break
    return model


def test_a_model_that_has_learned_the_answers_is_right(folder: Path) -> None:
    """Answers that differ by question, in batches of prompts of other lengths."""
    chosen = ["paper-mmlu", "paper-arc_easy", "paper-commonsense_qa"]
    prompts = [p for name in chosen for p in protocol.prepare(name, folder).prompts]
    model, tokenizer = (
        learned(dict(zip(prompts, [" A", " B", " A", " B", " E"], strict=True))),
        (letters(eos_token=END)),
    )
    for name in chosen[1:]:
        asked = protocol.prepare(name, folder)
        found = continuations.write(
            model, tokenizer, asked.prompts, new_tokens=asked.new_tokens, copies=5, sample=True
        )
        assert asked.score(found)[0].value == 1.0
    asked = protocol.prepare("paper-mmlu", folder)
    found = continuations.write(model, tokenizer, asked.prompts, new_tokens=2, copies=5)
    assert asked.score(found)[0].value == 1.0
    one = continuations.write(model, tokenizer, asked.prompts, new_tokens=1)
    assert asked.score(one)[0].value == 0.0, "a space is a token of its own here"


# --- which tasks, and messages ---


def named(*names: str, **options: Any) -> list[str]:
    return [task.name for task in tasks.prepare(names, Options(**options))]


def refused(*names: str, **options: Any) -> str:
    with pytest.raises(NacreError) as caught:
        tasks.prepare(names, Options(**options))
    assert isinstance(caught.value, ConfigError | DataError)
    return str(caught.value)


def test_the_protocol_means_its_tasks(folder: Path) -> None:
    every = protocol.names(folder)
    assert named(protocol="paper", data_dir=folder) == every
    assert named("paper", data_dir=folder) == every
    assert named("mmlu", "translate-en-ru", protocol="paper", data_dir=folder) == [
        "paper-mmlu", "paper-translate-en-ru",
    ]  # fmt: skip
    assert named("paper-mmlu,mmlu", data_dir=folder, runs=2) == ["paper-mmlu", "mmlu"]


def test_what_is_wrong_is_said(folder: Path) -> None:
    needs = "needs files of questions or parallel text (name their folder with --data-dir)"
    assert refused(protocol="paper") == f"--tasks paper: {needs}"
    assert refused("mmlu", protocol="paper") == f"--tasks paper-mmlu: {needs}"
    assert refused("translate-en-ru") == (
        "--tasks translate-en-ru: needs files of parallel text (name their folder with --data-dir)"
    )
    assert refused("mmul", protocol="paper", data_dir=folder) == (
        f"--tasks: {folder} holds no paper-mmul (did you mean 'paper-mmlu'?)"
    )
    assert refused("translate-xx-yyyyyy", data_dir=folder).startswith(
        f"--tasks: {folder} holds no translate-xx-yyyyyy ("
    )
    assert refused(protocol="papers", data_dir=folder) == (
        "--protocol: there is no 'papers' (did you mean 'paper'?)"
    )
    assert refused(protocol="x") == "--protocol: there is no 'x' (there is: paper)"
    assert refused(protocol="paper", data_dir=folder, runs=0) == (
        "--runs: 0 is not 1 or more (leave it out)"
    )
    assert refused("copy", runs=3) == "--runs: no task of copy reads it (add paper to --tasks)"
    (folder / "en-ru.tsv").write_text("en\tru\nsea\n")
    assert refused(protocol="paper", data_dir=folder) == (
        f"{folder}/en-ru.tsv, line 2: has 1 columns; the first line names 2: en, ru"
    )


def test_a_tokenizer_without_an_end_is_refused(folder: Path) -> None:
    for name, options in (("mmlu", {"protocol": "paper"}), ("translate-en-ru", {})):
        (task,) = tasks.prepare([name], Options(data_dir=folder, **options))
        with pytest.raises(ConfigError, match="no eos, bos or sep token"):
            task.settings(tiny().config, letters())


def test_a_direction_is_a_task_of_its_own_with_the_likeliest_words(folder: Path) -> None:
    (task,) = tasks.prepare(["translate-ru-en"], Options(data_dir=folder))
    model, tokenizer = say("a"), letters(eos_token=END)
    settings = task.settings(model.config, tokenizer)
    bleu, chrf = task.run(Subject(model, tokenizer, "mine", Observer()), settings)
    assert (bleu.task, bleu.metric, bleu.value) == ("translate-ru-en", "bleu", 0.0)
    assert (chrf.metric, chrf.n, chrf.chance) == ("chrf", 2, None)
    assert 0 < chrf.value < 10, "an `a` occurs"
    assert chrf.interval is not None
    assert chrf.interval[0] < chrf.interval[1]
    assert not math.isnan(chrf.value)
