"""Benchmarks from local files in their original formats: plain questions, no model.

`find` tells by names of files and folders what a folder holds, at any depth:

    dev-v1.1.json, dev-v2.0.json                          squad_v1, squad_v2
    SUBJECT_test.csv (_val, _dev) of the 57 subjects      mmlu (mmlu_val, mmlu_dev)
    ARC-Challenge-Test.jsonl, ARC-Easy-Test.jsonl         arc_challenge, arc_easy (_dev of -Dev)
    dev_rand_split.jsonl                                  commonsense_qa
    hellaswag_val.jsonl                                   hellaswag
    lambada_test_plain_text.txt                           lambada_standard (_dev of development)
    lambada_test.jsonl                                    lambada_openai
    *blimp*/**/*.jsonl, *blimp*.jsonl                     the folder's name, or blimp

The names are lm-eval's where the text and the answers are; what lm-eval does not score has a
suffix or a name of its own. Files to train on are left out. Text must be UTF-8.
"""

from __future__ import annotations

import csv
import hashlib
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from nacre import untrusted
from nacre.errors import DataError
from nacre.tokenizer import check_text
from nacre.untrusted import parse_json

SUBJECTS = """
    abstract_algebra anatomy astronomy business_ethics clinical_knowledge college_biology
    college_chemistry college_computer_science college_mathematics college_medicine college_physics
    computer_security conceptual_physics econometrics electrical_engineering elementary_mathematics
    formal_logic global_facts high_school_biology high_school_chemistry
    high_school_computer_science high_school_european_history high_school_geography
    high_school_government_and_politics high_school_macroeconomics high_school_mathematics
    high_school_microeconomics high_school_physics high_school_psychology high_school_statistics
    high_school_us_history high_school_world_history human_aging human_sexuality international_law
    jurisprudence logical_fallacies machine_learning management marketing medical_genetics
    miscellaneous moral_disputes moral_scenarios nutrition philosophy prehistory
    professional_accounting professional_law professional_medicine professional_psychology
    public_relations security_studies sociology us_foreign_policy virology world_religions
""".split()  # noqa: SIM905
"""Of MMLU."""

FILES = {
    "dev-v1.1.json": ("squad_v1", "squad"),
    "dev-v2.0.json": ("squad_v2", "squad"),
    "arc-challenge-test.jsonl": ("arc_challenge", "arc"),
    "arc-challenge-dev.jsonl": ("arc_challenge_dev", "arc"),
    "arc-easy-test.jsonl": ("arc_easy", "arc"),
    "arc-easy-dev.jsonl": ("arc_easy_dev", "arc"),
    "dev_rand_split.jsonl": ("commonsense_qa", "commonsense_qa"),
    "hellaswag_val.jsonl": ("hellaswag", "hellaswag"),
    "lambada_test_plain_text.txt": ("lambada_standard", "lambada_text"),
    "lambada_development_plain_text.txt": ("lambada_standard_dev", "lambada_text"),
    "lambada_test.jsonl": ("lambada_openai", "lambada_jsonl"),
    "lambada_test_en.jsonl": ("lambada_openai", "lambada_jsonl"),
}
"""What a file of that name, in lower case, is: the benchmark and its format."""

SPLITS = {"test": "mmlu", "val": "mmlu_val", "dev": "mmlu_dev"}
"""What `SUBJECT_SPLIT.csv` is."""

NAMES = (*dict.fromkeys(name for name, _ in FILES.values()), *SPLITS.values())
"""Of benchmarks; minimal pairs are called after their folder."""

EXPECTED = {
    "squad": 'an object {"data": [{"title": ..., "paragraphs": [{"context": ..., "qas": '
    '[{"question": ..., "answers": [{"text": ...}, ...]}, ...]}, ...]}, ...]}',
    "mmlu": "each row is six fields: a question, four options, the right one as A, B, C or D",
    "arc": 'each line is {"question": {"stem": ..., "choices": [{"label": "A", "text": ...}, ...]},'
    ' "answerKey": "A"}',
    "hellaswag": 'each line is {"activity_label": ..., "ctx_a": ..., "ctx_b": ..., "endings": '
    '[..., ...], "label": 0}',
    "lambada_text": "each line is a passage, its last word the one to foretell",
    "lambada_jsonl": 'each line is {"text": ...}, a passage, its last word the one to foretell',
    "pairs": 'each line is {"sentence_good": ..., "sentence_bad": ...}',
}
EXPECTED["commonsense_qa"] = EXPECTED["arc"]


@dataclass(frozen=True)
class Item:
    """One question with its `options`, of which `answer` is right, and the place it came from.

    Of a passage to complete the question is its beginning and the one option its end; of minimal
    pairs the question is empty and the right sentence comes first; of SQuAD the options are the
    gold answers, none where the question has no answer, and `context` is the text to read.
    `subject` is that of MMLU, the paradigm of minimal pairs, the title of a SQuAD article.
    """

    question: str
    options: tuple[str, ...]
    answer: int
    source: str
    subject: str = ""
    context: str = ""


@dataclass(frozen=True)
class Benchmark:
    """A benchmark that a folder holds: its name, the format of its files, and the files."""

    name: str
    format: str
    files: tuple[Path, ...]


def find(folder: str | Path) -> dict[str, Benchmark]:
    """Return the benchmarks in a folder by name; hidden files are left out.

    Raises DataError for a missing folder, and two files that are the same part of one.
    """
    found: dict[str, dict[str, Path]] = {}
    formats: dict[str, str] = {}
    root = Path(folder)
    for path in files(root):
        if (known := _recognise(path.relative_to(root), root.absolute().name)) is None:
            continue
        name, formats[name], part = known
        if other := found.setdefault(name, {}).get(part):
            raise DataError(f"{path}: is the same part of {name} as {other}; keep one of them")
        found[name][part] = path
    return {
        name: Benchmark(name, formats[name], tuple(parts.values()))
        for name, parts in sorted(found.items())
    }


def files(folder: Path) -> list[Path]:
    """Return the files in a folder, at any depth, less hidden ones; DataError where it is none."""
    if not folder.is_dir():
        what = "is no folder" if folder.exists() else "there is no such folder"
        raise DataError(f"{folder}: {what}; name one that holds benchmarks in their original files")
    return [
        path
        for path in sorted(folder.rglob("*"))
        if not any(part.startswith(".") for part in path.relative_to(folder).parts)
        and path.is_file()
    ]


def _recognise(path: Path, root: str) -> tuple[str, str, str] | None:
    """Return the benchmark, its format and the part of it that a file is, by its name."""
    file = path.name.lower()
    if file in FILES:
        return (*FILES[file], "")
    subject, _, split = path.stem.lower().rpartition("_")
    if path.suffix.lower() == ".csv" and subject in SUBJECTS and split in SPLITS:
        return SPLITS[split], "mmlu", subject
    if path.suffix.lower() == ".jsonl":
        for part in reversed([root, *path.parts[:-1]]):
            if "blimp" in part.lower():
                return part.lower(), "pairs", file
        if "blimp" in file:
            return "blimp", "pairs", file
    return None


def fingerprint(benchmark: Benchmark) -> str:
    """Return the SHA-256 (hex) of the names and contents of a benchmark's files."""
    total = hashlib.sha256()
    for path in benchmark.files:
        for part in (path.name.lower().encode(), read_bytes(path)):
            total.update(hashlib.sha256(part).digest())
    return total.hexdigest()


def read(benchmark: Benchmark) -> list[Item]:
    """Read and check all of a benchmark's questions.

    Raises DataError, with file and place, for one that is empty
    or not in its format.
    """
    items: list[Item] = []
    for path in benchmark.files:
        found = list(_READERS[benchmark.format](path))
        if not found:
            raise DataError(f"{path}: there is no question in it; {EXPECTED[benchmark.format]}")
        if benchmark.format == "pairs":
            found = [replace(item, subject=item.subject or path.stem) for item in found]
        items += found
    return items


class _Malformed(ValueError):
    """What is wrong with a record; the reader adds where it stands and what was expected."""


def read_bytes(path: Path) -> bytes:
    """Return what a file holds; raise DataError where it cannot be read."""
    try:
        return untrusted.read_bytes(path)
    except OSError as error:
        raise DataError(f"{path}: cannot be read ({error.strerror})") from None


def read_text(path: Path) -> str:
    """Return a file's text; raise DataError where it is empty or no UTF-8."""
    data = read_bytes(path)
    if not data:
        raise DataError(f"{path}: the file is empty")
    try:
        return data.decode().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        byte = f"0x{data[error.start]:02X}"
        raise DataError(
            f"{path}, line {line}: invalid UTF-8 ({byte}); convert it to UTF-8"
        ) from None


def _string(record: Any, key: str, where: str) -> str:
    """Return the text under a key of a JSON object."""
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, str) or not value.strip():
        raise _Malformed(f'it has no "{key}" with text')
    check_text(value, where)
    return value


def _list(record: Any, key: str) -> list[Any]:
    value = record.get(key) if isinstance(record, dict) else None
    if not isinstance(value, list):
        raise _Malformed(f'it has no "{key}" with a list')
    return value


def _mmlu(path: Path) -> Iterator[Item]:
    subject = path.stem.rpartition("_")[0].lower()
    rows = csv.reader(io.StringIO(read_text(path), newline=""))
    try:
        for row in rows:
            where = f"{path}, line {rows.line_num}"
            if len(row) not in (0, 6):
                raise DataError(f"{where}: it has {len(row)} fields; {EXPECTED['mmlu']}")
            if row and row[5] not in ("A", "B", "C", "D"):
                raise DataError(f"{where}: the answer is {row[5]!r}; {EXPECTED['mmlu']}")
            if row:
                yield Item(row[0], tuple(row[1:5]), "ABCD".index(row[5]), where, subject)
    except csv.Error as error:
        raise DataError(f"{path}, line {rows.line_num}: {error}; {EXPECTED['mmlu']}") from None


def _squad(path: Path) -> Iterator[Item]:
    try:
        whole = parse_json(read_text(path))
    except ValueError as error:
        raise DataError(f"{path}: it is no JSON ({error}); expected {EXPECTED['squad']}") from None
    place = "the whole"
    try:
        for a, article in enumerate(_list(whole, "data")):
            place = f"data[{a}]"
            title = _string(article, "title", f"{path}, {place}")
            for p, paragraph in enumerate(_list(article, "paragraphs")):
                place = f"data[{a}].paragraphs[{p}]"
                context = _string(paragraph, "context", f"{path}, {place}")
                for q, asked in enumerate(_list(paragraph, "qas")):
                    place = f"data[{a}].paragraphs[{p}].qas[{q}]"
                    where = f"{path}, {place}"
                    question = _string(asked, "question", where)
                    answers = [_string(a, "text", where) for a in _list(asked, "answers")]
                    if not answers and asked.get("is_impossible") is not True:
                        raise _Malformed('it has no answer, and no "is_impossible": true')
                    yield Item(question, tuple(answers), 0, where, title, context)
    except _Malformed as error:
        raise DataError(f"{path}, {place}: {error}; expected {EXPECTED['squad']}") from None


def _lambada_text(path: Path) -> Iterator[Item]:
    for number, line in enumerate(read_text(path).split("\n"), 1):
        if line.strip():
            where = f"{path}, line {number}"
            try:
                yield _passage(line, where)
            except _Malformed as error:
                raise DataError(f"{where}: {error}; {EXPECTED['lambada_text']}") from None


def _passage(text: str, where: str) -> Item:
    beginning, _, word = text.strip().rpartition(" ")
    if not beginning:
        raise _Malformed("it is one word")
    return Item(beginning, (word,), 0, where)


def _jsonl(form: str, item: Callable[[Any, str], Item]) -> Callable[[Path], Iterator[Item]]:
    """Return the reader of files with a JSON object a line."""

    def read_lines(path: Path) -> Iterator[Item]:
        for number, line in enumerate(read_text(path).split("\n"), 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                yield item(parse_json(line), where)
            except _Malformed as error:
                raise DataError(f"{where}: {error}; {EXPECTED[form]}") from None
            except ValueError as error:
                raise DataError(f"{where}: it is no JSON ({error}); {EXPECTED[form]}") from None

    return read_lines


def _choice(record: Any, where: str) -> Item:
    """Read a line of ARC or CommonsenseQA."""
    key = _string(record, "answerKey", where)
    asked = record.get("question")
    stem, choices = _string(asked, "stem", where), _list(asked, "choices")
    labels = [_string(choice, "label", where) for choice in choices]
    if key not in labels:
        raise _Malformed(f"the answer {key!r} is none of {', '.join(labels) or 'no choices'}")
    options = tuple(_string(choice, "text", where) for choice in choices)
    return Item(stem, options, labels.index(key), where)


def _hellaswag(record: Any, where: str) -> Item:
    """Read a line as lm-eval does: the activity and the context, without WikiHow's brackets."""
    activity, first = _string(record, "activity_label", where), _string(record, "ctx_a", where)
    second = record.get("ctx_b")
    if not isinstance(second, str):
        raise _Malformed('it has no "ctx_b" with text')
    endings = _list(record, "endings")
    if not all(isinstance(ending, str) and ending.strip() for ending in endings):
        raise _Malformed('not all "endings" are text')
    label = str(record.get("label"))
    if label not in map(str, range(len(endings))):
        raise _Malformed(f"the label {label} is none of the {len(endings)} endings")
    for text in (second, *endings):
        check_text(text, where)
    question = _clean(f"{activity}: {first} {second.capitalize()}")
    return Item(question, tuple(map(_clean, endings)), int(label), where)


def _clean(text: str) -> str:
    lines = text.strip().replace(" [title]", ". ").split("\n")
    return "\n".join(map(_without_brackets, lines)).replace("  ", " ")


def _without_brackets(line: str) -> str:
    """Leave out what stands in brackets; each search ends at a closing one, so in linear time."""
    closed, bracket, rest = line.rpartition("]")
    return re.sub(r"\[.*?\]", "", closed + bracket) + rest


def _pair(record: Any, where: str) -> Item:
    good, bad = (_string(record, f"sentence_{which}", where) for which in ("good", "bad"))
    subject = record["UID"] if isinstance(record.get("UID"), str) else ""
    return Item("", (good, bad), 0, where, subject)


_READERS: dict[str, Callable[[Path], Iterator[Item]]] = {
    "squad": _squad,
    "mmlu": _mmlu,
    "arc": _jsonl("arc", _choice),
    "commonsense_qa": _jsonl("commonsense_qa", _choice),
    "hellaswag": _jsonl("hellaswag", _hellaswag),
    "lambada_text": _lambada_text,
    "lambada_jsonl": _jsonl("lambada_jsonl", lambda r, w: _passage(_string(r, "text", w), w)),
    "pairs": _jsonl("pairs", _pair),
}
