"""Every `nacre` command and Python block of the README runs; what the documents name exists.

Commands run as written, in order, in one folder with small texts under the names that the README
uses. Only their size is changed: a model is grown by the sizes below, a text continued by 4 tokens,
4 examples are evaluated.
"""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
import yaml

import nacre
from nacre.cli import main
from nacre.growth import plan as plans

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
SMALL = [
    "tokenizer={size: 512}",
    "model={width: 32, heads: 2, context: 32}",
    "training={batch_tokens: 256, validation_tokens: 512}",
    "stages=[{add_blocks: 1, tokens: 512}, {add_blocks: 1, tokens: 512}]",
]


def blocks(document: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", document.read_text(), re.MULTILINE | re.DOTALL)


def commands(document: Path) -> list[list[str]]:
    lines = [line for block in blocks(document, "sh") for line in block.splitlines()]
    return [shlex.split(line, comments=True) for line in lines if line.startswith("nacre ")]


def shrunk(command: list[str]) -> list[str]:
    """Return the command with settings that make it quick."""
    if command[1] == "grow":
        return [*command, "--track", "none", *(w for s in SMALL for w in ("--set", s))]
    if command[1] == "study":
        stages = SMALL[-1].partition("=")[2]
        arms = f"arms={{random: {{stages: {stages}}}, copy: {{stages: {stages}}}}}"
        small = [arms, "seeds=[0]", "claims=[]", *(f"plan.{part}" for part in SMALL[:-1])]
        return [*command, *(w for s in small for w in ("--set", s))]
    if command[1] == "generate":
        return [*command, "--max-new-tokens", "4"]
    if command[1] == "bench":
        return [*command, "--quick"]
    if command[1] == "eval":
        return [*command, "--limit", "4"]
    return command


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("documents")
    text = "It was the best of times, it was the worst of times.\n\n" * 300
    for name in ("novels/en.txt", "russian/ru.txt", "heldout/en/text.txt", "heldout/ru/text.txt"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(text[:500] if "heldout" in name else text)
    return folder


def run_commands(document: Path) -> None:
    """Run every `nacre` command of a document as it is written, but small."""
    for command in commands(document):
        with pytest.raises(SystemExit) as stop:
            main(shrunk(command)[1:])
        assert not stop.value.code, " ".join(command)


def run_python(document: Path) -> None:
    """Run every Python block of a document."""
    for block in blocks(document, "python"):
        exec(compile(block, document.name, "exec"), {})


def test_readme_commands_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    run_commands(README)


def test_composition_commands_and_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("english", "russian", "chinese"):
        (tmp_path / name).mkdir()
        text = f"It was the best of times in {name}, it was the worst of times.\n\n" * 100
        (tmp_path / name / "text.txt").write_text(text)
    for name in ("en", "ru"):
        (tmp_path / "heldout" / name).mkdir(parents=True)
        (tmp_path / "heldout" / name / "text.txt").write_text("It was the age of wisdom.\n")
    monkeypatch.chdir(tmp_path)
    document = ROOT / "docs" / "composition.md"
    run_commands(document)
    run_python(document)


def test_evaluation_commands_and_python_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, times in {"novels/en.txt": 200, "heldout/en/a.txt": 5, "heldout/ru/b.txt": 5}.items():
        (tmp_path / name).parent.mkdir(parents=True)
        (tmp_path / name).write_text(
            "It was the best of times, it was the worst of times.\n" * times
        )
    (tmp_path / "bench").mkdir()
    (tmp_path / "bench" / "anatomy_test.csv").write_text("Where is it?,here,there,in,out,A\n" * 4)
    monkeypatch.chdir(tmp_path)
    plan = plans.load("tiny", [*SMALL, "model.context=128", "data.sources=[novels/]"])
    for name in ("novels", "whole"):
        nacre.grow(plan, f"runs/{name}")
    nacre.compose([f"runs/novels/stages/{stage}" for stage in ("01", "02")], "runs/two")
    document = ROOT / "docs" / "evaluation.md"
    run_commands(document)
    run_python(document)


def test_readme_python_runs(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)
    run_python(README)


def test_readme_shows_the_two_commands() -> None:
    text = README.read_text()
    assert text.index("make demo") < text.index("make test") < 2000
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE)
    assert re.search(r"^test:", makefile, re.MULTILINE)


def test_readme_commands_are_there() -> None:
    verbs = {command[1] for command in commands(README)}
    assert verbs >= {
        "grow",
        "plan",
        "generate",
        "compose",
        "eval",
        "report",
        "substrate",
        "tokenizer",
        "doctor",
    }


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: path.name)
def test_links_and_pictures_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text()):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_plan_of_the_documents_is_a_plan() -> None:
    (text,) = blocks(ROOT / "docs" / "plans.md", "yaml")
    plan = plans.parse(yaml.safe_load(text))
    shown = yaml.safe_load(text)
    for section in ("substrate", "tokenizer", "data", "model", "training", "trunk"):
        fields = type(getattr(plan, section)).model_fields
        assert shown[section].keys() == fields.keys(), section
        for name, value in shown[section].items():
            default = getattr(getattr(plans.Plan(stages=()), section), name)
            assert getattr(getattr(plan, section), name) == default, (section, name, value)
