"""Benchmarks from files: what a folder holds, every format, every message, the real files."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from nacre.errors import DataError
from nacre.evaluate import benchmarks
from nacre.evaluate.benchmarks import EXPECTED, Item

REAL = Path(__file__).parents[2] / "shared" / "data" / "bench"

ARC = {
    "id": "x",
    "question": {
        "stem": "What melts?",
        "choices": [{"text": "ice", "label": "1"}, {"text": "fire", "label": "2"}],
    },
    "answerKey": "2",
}
HELLASWAG: dict[str, Any] = {
    "activity_label": "Baking",
    "ctx_a": "A man bakes.",
    "ctx_b": "he",
    "endings": ["eats. [title] Serve", "sits  down [step]", "sleeps"],
    "label": 1,
}
PAIR = {"sentence_good": "She sees him.", "sentence_bad": "She sees he.", "UID": "case"}


def squad(*questions: dict[str, Any]) -> dict[str, Any]:
    paragraph = {"context": "The sea is blue.", "qas": list(questions)}
    return {"version": "1.1", "data": [{"title": "Sea", "paragraphs": [paragraph]}]}


BLUE = {"question": "What is it?", "id": "1", "answers": [{"text": "blue"}, {"text": "is blue"}]}
NONE: dict[str, Any] = {"question": "Why?", "id": "2", "answers": [], "is_impossible": True}


def write(path: Path, *lines: Any) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    text = [line if isinstance(line, str) else json.dumps(line) for line in lines]
    path.write_text("\n".join(text) + "\n", encoding="utf-8")
    return path


def only(folder: Path) -> list[Item]:
    """Return the questions of the one benchmark in a folder."""
    (benchmark,) = benchmarks.find(folder).values()
    return benchmarks.read(benchmark)


def refused(call: Callable[[], object]) -> str:
    with pytest.raises(DataError) as caught:
        call()
    return str(caught.value)


# --- what a folder holds ---


def test_benchmarks_are_found_by_their_names_at_any_depth(tmp_path: Path) -> None:
    names = [
        "squad/dev-v1.1.json", "Dev-V2.0.json", "squad/train-v1.1.json",
        "mmlu/test/anatomy_test.csv", "astronomy_test.csv", "mmlu/dev/anatomy_dev.csv",
        "mmlu/val/anatomy_val.csv", "mmlu/test/cooking_test.csv",
        "ARC-V1/ARC-Easy/ARC-Easy-Test.jsonl", "ARC-V1/ARC-Easy/ARC-Easy-Dev.jsonl",
        "ARC-V1/ARC-Easy/ARC-Easy-Train.jsonl", "ARC-Challenge-Test.jsonl",
        "ARC-Challenge-Dev.jsonl", "csqa/dev_rand_split.jsonl",
        "csqa/test_rand_split_no_answers.jsonl", "hellaswag_val.jsonl", "hellaswag_train.jsonl",
        "lambada_test_plain_text.txt", "lambada_development_plain_text.txt", "lambada_test.jsonl",
        "blimp/data/adjunct_island.jsonl", "blimp/data/wh_island.jsonl",
        "langs/RuBLiMP/case.jsonl", "blimp/readme.txt", ".cache/dev-v1.1.json", "notes.jsonl",
    ]  # fmt: skip
    for name in names:
        write(tmp_path / name, "x")
    found = benchmarks.find(tmp_path)
    assert {name: len(benchmark.files) for name, benchmark in found.items()} == {
        "arc_challenge": 1, "arc_challenge_dev": 1, "arc_easy": 1, "arc_easy_dev": 1, "blimp": 2,
        "commonsense_qa": 1, "hellaswag": 1, "lambada_openai": 1, "lambada_standard": 1,
        "lambada_standard_dev": 1, "mmlu": 2, "mmlu_dev": 1, "mmlu_val": 1, "rublimp": 1,
        "squad_v1": 1, "squad_v2": 1,
    }  # fmt: skip
    assert list(found) == sorted(found)
    assert found["squad_v1"].files == (tmp_path / "squad" / "dev-v1.1.json",)


def test_minimal_pairs_are_told_by_the_folder_that_is_named_too(tmp_path: Path) -> None:
    write(tmp_path / "blimp" / "case.jsonl", "x")
    write(tmp_path / "my_blimp.jsonl", "x")
    assert list(benchmarks.find(tmp_path / "blimp")) == ["blimp"]
    assert len(benchmarks.find(tmp_path)["blimp"].files) == 2


def test_what_is_no_folder_is_refused(tmp_path: Path) -> None:
    fix = "name one that holds benchmarks in their original files"
    file, none = write(tmp_path / "a.txt", "x"), tmp_path / "none"
    assert refused(lambda: benchmarks.find(none)) == f"{none}: there is no such folder; {fix}"
    assert refused(lambda: benchmarks.find(str(file))) == f"{file}: is no folder; {fix}"


def test_two_files_of_one_part_are_refused(tmp_path: Path) -> None:
    first = write(tmp_path / "a" / "anatomy_test.csv", "x")
    second = write(tmp_path / "b" / "anatomy_test.csv", "x")
    expected = f"{second}: is the same part of mmlu as {first}; keep one of them"
    assert refused(lambda: benchmarks.find(tmp_path)) == expected
    first.unlink()
    first = write(tmp_path / "a" / "lambada_test.jsonl", "x")
    second = write(tmp_path / "b" / "lambada_test_en.jsonl", "x")
    assert refused(lambda: benchmarks.find(tmp_path)).endswith(f"as {first}; keep one of them")


def test_a_fingerprint_is_that_of_names_and_contents(tmp_path: Path) -> None:
    def made(folder: str, name: str, text: str) -> str:
        write(tmp_path / folder / name, text)
        return benchmarks.fingerprint(benchmarks.find(tmp_path / folder)["mmlu"])

    one = made("a", "anatomy_test.csv", "x")
    assert made("b/deep", "anatomy_test.csv", "x") == one, "folders do not count"
    assert len({one, made("c", "anatomy_test.csv", "y"), made("d", "virology_test.csv", "x")}) == 3


# --- formats ---


def test_squad(tmp_path: Path) -> None:
    path = write(tmp_path / "dev-v2.0.json", squad(BLUE, NONE))
    place = f"{path}, data[0].paragraphs[0].qas"
    assert only(tmp_path) == [
        Item("What is it?", ("blue", "is blue"), 0, f"{place}[0]", "Sea", "The sea is blue."),
        Item("Why?", (), 0, f"{place}[1]", "Sea", "The sea is blue."),
    ]


def test_mmlu(tmp_path: Path) -> None:
    path = write(tmp_path / "high_school_physics_test.csv", '"Which,', 'of ""these""?",1,2,3,4,D')
    assert only(tmp_path) == [
        Item(
            'Which,\nof "these"?', ("1", "2", "3", "4"), 3, f"{path}, line 2", "high_school_physics"
        )
    ]
    path.write_bytes(b"\xef\xbb\xbfWhy?,1,2,3,4,A\r\n\r\nWho?,1,2,3,4,B\r\n")
    assert [item.source for item in only(tmp_path)] == [f"{path}, line 1", f"{path}, line 3"]
    assert only(tmp_path)[0].question == "Why?"


def test_arc_and_commonsense_qa(tmp_path: Path) -> None:
    for name in ("ARC-Easy-Test.jsonl", "dev_rand_split.jsonl"):
        path = write(tmp_path / name / name, ARC, "", ARC | {"answerKey": "1"})
        assert only(tmp_path / name) == [
            Item("What melts?", ("ice", "fire"), 1, f"{path}, line 1"),
            Item("What melts?", ("ice", "fire"), 0, f"{path}, line 3"),
        ]


def test_hellaswag(tmp_path: Path) -> None:
    path = write(tmp_path / "hellaswag_val.jsonl", HELLASWAG, HELLASWAG | {"label": "2"})
    first, second = only(tmp_path)
    options = ("eats.. Serve", "sits down ", "sleeps")
    assert first == Item("Baking: A man bakes. He", options, 1, f"{path}, line 1")
    assert second.answer == 2


def test_lambada(tmp_path: Path) -> None:
    path = write(tmp_path / "a" / "lambada_test_plain_text.txt", "he took the hat", "", "a b")
    assert only(tmp_path / "a") == [
        Item("he took the", ("hat",), 0, f"{path}, line 1"), Item("a", ("b",), 0, f"{path}, line 3")
    ]  # fmt: skip
    write(tmp_path / "b" / "lambada_test.jsonl", {"text": "he\ntook the  hat"})
    assert [(i.question, i.options) for i in only(tmp_path / "b")] == [("he\ntook the ", ("hat",))]


def test_minimal_pairs(tmp_path: Path) -> None:
    unnamed = {key: value for key, value in PAIR.items() if key != "UID"}
    path = write(tmp_path / "blimp" / "island.jsonl", PAIR, unnamed)
    sentences = ("She sees him.", "She sees he.")
    assert only(tmp_path) == [
        Item("", sentences, 0, f"{path}, line 1", "case"),
        Item("", sentences, 0, f"{path}, line 2", "island"),
    ]


# --- what is wrong with a file ---

LINES = {
    "arc": "ARC-Easy-Test.jsonl",
    "commonsense_qa": "dev_rand_split.jsonl",
    "hellaswag": "hellaswag_val.jsonl",
    "lambada_jsonl": "lambada_test.jsonl",
    "lambada_text": "lambada_test_plain_text.txt",
    "mmlu": "anatomy_test.csv",
    "pairs": "blimp.jsonl",
    "squad": "dev-v1.1.json",
}


@pytest.mark.parametrize("form", LINES)
def test_empty_files_are_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / LINES[form]
    path.write_bytes(b"")
    assert refused(lambda: only(tmp_path)) == f"{path}: the file is empty"
    path.write_text('{"data": []}' if form == "squad" else "\n\n")
    expected = f"{path}: there is no question in it; {EXPECTED[form]}"
    assert refused(lambda: only(tmp_path)) == expected


@pytest.mark.parametrize("form", LINES)
def test_what_is_no_text_is_refused(form: str, tmp_path: Path) -> None:
    path = tmp_path / LINES[form]
    path.write_bytes(b"\n\xff\n")
    expected = f"{path}, line 2: invalid UTF-8 (0xFF); convert it to UTF-8"
    assert refused(lambda: only(tmp_path)) == expected
    path.unlink()
    path.symlink_to(tmp_path / "gone")
    assert benchmarks.find(tmp_path) == {}


def test_files_that_vanish_are_named(tmp_path: Path) -> None:
    path = write(tmp_path / "dev-v1.1.json", "x")
    found = benchmarks.find(tmp_path)["squad_v1"]
    path.unlink()
    expected = f"{path}: cannot be read (No such file or directory)"
    assert refused(lambda: benchmarks.read(found)) == expected
    assert refused(lambda: benchmarks.fingerprint(found)) == expected


@pytest.mark.parametrize("form", [form for form in LINES if form not in ("lambada_text", "mmlu")])
def test_what_is_no_json_is_refused(form: str, tmp_path: Path) -> None:
    path = write(tmp_path / LINES[form], "{", "{")
    where, expected = f"{path}, line 1", EXPECTED[form]
    if form == "squad":
        where, expected = str(path), f"expected {expected}"
    said = refused(lambda: only(tmp_path))
    assert said.startswith(f"{where}: it is no JSON (Expecting property name")
    assert said.endswith(f"; {expected}")


MALFORMED: list[tuple[str, Any, str]] = [
    ("arc", 3, 'it has no "answerKey" with text'),
    ("arc", ARC | {"answerKey": 2}, 'it has no "answerKey" with text'),
    ("arc", ARC | {"question": "Why?"}, 'it has no "stem" with text'),
    ("arc", ARC | {"question": {"stem": "Why?"}}, 'it has no "choices" with a list'),
    ("arc", ARC | {"answerKey": "C"}, "the answer 'C' is none of 1, 2"),
    (
        "arc",
        ARC | {"question": {"stem": "Why?", "choices": []}},
        "the answer '2' is none of no choices",
    ),
    (
        "commonsense_qa",
        ARC | {"question": {"stem": "Why?", "choices": [{"label": "2", "text": " "}]}},
        'it has no "text" with text',
    ),
    ("commonsense_qa", {"question": ARC["question"]}, 'it has no "answerKey" with text'),
    ("hellaswag", [], 'it has no "activity_label" with text'),
    ("hellaswag", HELLASWAG | {"ctx_a": None}, 'it has no "ctx_a" with text'),
    ("hellaswag", HELLASWAG | {"ctx_b": None}, 'it has no "ctx_b" with text'),
    ("hellaswag", HELLASWAG | {"endings": "x"}, 'it has no "endings" with a list'),
    ("hellaswag", HELLASWAG | {"endings": ["a", 2]}, 'not all "endings" are text'),
    ("hellaswag", HELLASWAG | {"label": 3}, "the label 3 is none of the 3 endings"),
    ("hellaswag", HELLASWAG | {"label": ""}, "the label  is none of the 3 endings"),
    ("lambada_jsonl", {"passage": "a b"}, 'it has no "text" with text'),
    ("lambada_jsonl", {"text": "word"}, "it is one word"),
    ("lambada_text", "word", "it is one word"),
    ("mmlu", "Why?,1,2,3,A", "it has 5 fields"),
    ("mmlu", "Why?,1,2,3,4,E", "the answer is 'E'"),
    ("mmlu", "Why?,1,2,3,4,", "the answer is ''"),
    ("mmlu", '"' + "x" * 140_000 + '",1,2,3,4,A', "field larger than field limit (131072)"),
    ("pairs", {"sentence_good": "a"}, 'it has no "sentence_bad" with text'),
    ("pairs", {"sentence_good": "", "sentence_bad": "a"}, 'it has no "sentence_good" with text'),
    ("pairs", "1" * 5000, "it is no JSON (a whole number of 5,000 digits"),
    ("arc", "[" * 100_000, "it is no JSON (nested more than 100 deep"),
]


@pytest.mark.parametrize(("form", "line", "message"), MALFORMED)
def test_malformed_lines_are_refused(form: str, line: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / LINES[form], line)
    said = refused(lambda: only(tmp_path))
    assert said.startswith(f"{path}, line 1: {message}")
    assert said.endswith(f"; {EXPECTED[form]}")


def test_the_line_of_a_later_mistake_is_named(tmp_path: Path) -> None:
    path = write(tmp_path / LINES["arc"], ARC, ARC, {})
    assert refused(lambda: only(tmp_path)).startswith(f"{path}, line 3: ")
    path.unlink()
    path = write(tmp_path / LINES["mmlu"], '"a', 'b",1,2,3,4,A', "b")
    assert refused(lambda: only(tmp_path)).startswith(f"{path}, line 3: it has 1 fields")


WHOLE = "data[0].paragraphs[0].qas[1]"
SQUAD: list[tuple[Any, str]] = [
    ([], 'the whole: it has no "data" with a list'),
    ({"data": [3]}, 'data[0]: it has no "title" with text'),
    ({"data": [{"title": "Sea"}]}, 'data[0]: it has no "paragraphs" with a list'),
    (
        {"data": [{"title": "Sea", "paragraphs": [{"context": ""}]}]},
        'data[0].paragraphs[0]: it has no "context" with text',
    ),
    (squad(BLUE, {}), f'{WHOLE}: it has no "question" with text'),
    (squad(BLUE, {"question": "Why?"}), f'{WHOLE}: it has no "answers" with a list'),
    (squad(BLUE, BLUE | {"answers": ["blue"]}), f'{WHOLE}: it has no "text" with text'),
    (
        squad(BLUE, NONE | {"is_impossible": False}),
        f'{WHOLE}: it has no answer, and no "is_impossible": true',
    ),
]


@pytest.mark.parametrize(("whole", "message"), SQUAD)
def test_malformed_squad_is_refused(whole: Any, message: str, tmp_path: Path) -> None:
    path = write(tmp_path / "dev-v1.1.json", whole)
    expected = f"{path}, {message}; expected {EXPECTED['squad']}"
    assert refused(lambda: only(tmp_path)) == expected


@pytest.mark.parametrize(
    ("form", "line", "where"),
    [
        ("pairs", PAIR | {"sentence_bad": "a\ud800"}, "line 1"),
        ("hellaswag", HELLASWAG | {"ctx_b": "a\ud800"}, "line 1"),
        ("hellaswag", HELLASWAG | {"endings": ["b", "a\ud800"]}, "line 1"),
        ("squad", squad(BLUE | {"question": "a\ud800"}), "data[0].paragraphs[0].qas[0]"),
    ],
)
def test_half_characters_are_refused(form: str, line: Any, where: str, tmp_path: Path) -> None:
    path = write(tmp_path / LINES[form], line)
    expected = f"{path}, {where}: lone surrogate U+D800 at character 1; "
    assert refused(lambda: only(tmp_path)).startswith(expected)


def test_reading_needs_no_model() -> None:
    code = (
        "import sys, nacre.evaluate.benchmarks; "
        "sys.exit(bool({'torch', 'transformers', 'lm_eval'} & set(sys.modules)))"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# --- the real files ---


@pytest.mark.skipif(
    not REAL.is_dir() and os.environ.get("CI") != "true", reason=f"needs the files of {REAL}"
)
def test_real_files() -> None:
    found = benchmarks.find(REAL)
    read = {name: benchmarks.read(benchmark) for name, benchmark in found.items()}
    assert {name: len(items) for name, items in read.items()} == {
        "arc_challenge": 1150, "arc_challenge_dev": 294, "commonsense_qa": 950,
        "lambada_standard_dev": 4869, "mmlu": 6384, "mmlu_dev": 285, "squad_v1": 10570,
        "squad_v2": 11873,
    }  # fmt: skip
    assert len(found["mmlu"].files) == 28
    assert {item.subject for item in read["mmlu_dev"]} == set(benchmarks.SUBJECTS)
    assert len(benchmarks.SUBJECTS) == 57
    assert sum(not item.options for item in read["squad_v2"]) == 5945
    assert {len(item.options) for item in read["arc_challenge"]} == {3, 4, 5}
    assert {len(item.options) for item in read["commonsense_qa"]} == {3}
    assert all(item.options[0] in item.context for item in read["squad_v1"])
    answers = [item.answer for item in read["mmlu"]]
    assert min(map(answers.count, range(4))) > 1000
