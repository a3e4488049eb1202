"""Every block of the documents runs, from top to bottom of a page; what they name exists.

A block says by its language what becomes of it. `sh`: each line is a `nacre` command, which runs as
written. `python`: it runs, in one namespace for the page. `yaml`: it is read as a plan, study or
fleet; a plan is written to the file that its first line names. `text` and blocks without a language
are shown only; where such a block is a command, a comment below says why it is not run.

Commands run in one folder for a page, with small texts under the names that the pages use. Only
sizes are changed: a model is grown by the sizes below, a text continued by 4 tokens, 4 examples are
evaluated. A language must not fall to bytes on the way: `grow` would warn of it.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
import zstandard

import nacre
from nacre import study
from nacre.cli import main
from nacre.fleet import design as fleet
from nacre.growth import plan as plans
from nacre.study import page

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"
DOCUMENTS = [README, *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*DOCUMENTS, *(ROOT / f"{name}.md" for name in ("CONTRIBUTING", "CHANGELOG", "SECURITY"))]
SIZES: dict[str, Any] = {
    "tokenizer": {"size": 512},
    "model": {"width": 32, "heads": 2, "context": 32},
    "training": {"batch_tokens": 256, "validation_tokens": 512},
}
STAGE = {"add_blocks": 1, "tokens": 512}
SMALL = [f"{name}={json.dumps(sizes)}" for name, sizes in SIZES.items()]
STAGES = f"stages={json.dumps([STAGE, STAGE])}"
ELSEWHERE = {"make demo", "make test"}
"""Lines of an `sh` block that are no commands of nacre; their targets are tested below."""
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```(?=\n*([^\n]*))", re.MULTILINE | re.DOTALL)
LOOKS_RUN = re.compile(r"^(nacre|python|torchrun|accelerate|pip|make|hf|git) ", re.MULTILINE)


def blocks(document: Path) -> Iterator[tuple[str, str, str]]:
    """Yield the language of every block, its text, and the line below it."""
    for match in BLOCK.finditer(document.read_text(encoding="utf-8")):
        yield match[1], match[2], match[3]


def commands(shell: str) -> Iterator[list[str]]:
    """Yield the words of every `nacre` command of a shell block; refuse what is none."""
    for line in shell.replace("\\\n", " ").splitlines():
        words = shlex.split(line, comments=True)
        if words[:1] == ["nacre"]:
            yield words
        else:
            assert not words or " ".join(words) in ELSEWHERE, f"not run: {line}"


def shrunk(command: list[str]) -> list[str]:
    """Return the command with settings that make it quick."""
    if command[1] == "grow":
        own = "--resume" in command or any(word.endswith(".yaml") for word in command)
        settings = [] if own else [*SMALL, STAGES]
        if "--tokenizer" in command:
            settings = [s for s in settings if not s.startswith("tokenizer=")]
        return [*command, "--track", "none", *(w for s in settings for w in ("--set", s))]
    if command[1] == "study":
        arm = {"stages": [STAGE, STAGE]}
        arms = f"arms={json.dumps({'random': arm, 'copy': arm})}"
        small = [arms, "seeds=[0]", "claims=[]", *(f"plan.{part}" for part in SMALL)]
        return [*command, *(w for s in small for w in ("--set", s))]
    if command[1] == "generate":
        return [*command, "--max-new-tokens", "4"]
    if command[1] == "bench":
        return [*command, "--quick"]
    if command[1] == "eval":
        return [*command, "--limit", "4"]
    return command


def run_command(command: list[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(shrunk(command)[1:])
    assert not stop.value.code, " ".join(command)


def read_yaml(text: str) -> None:
    """Read a plan or a study; write one that has a name to its file, made small."""
    given = yaml.safe_load(text)
    if "jobs" in given:
        assert fleet.problems(fleet.parse(given)) == []
        return
    if "arms" in given:
        study.parse(given)
        return
    plans.parse(given)
    if name := re.match(r"# (\S+\.yaml)\n", text):
        kept = ("training",) if "from" in given else ("training", "model", "tokenizer")
        context = {"model": {"context": SIZES["model"]["context"]}}
        stages = [stage | {"tokens": STAGE["tokens"]} for stage in given["stages"]]
        small = given | context | {key: SIZES[key] for key in kept} | {"stages": stages}
        Path(name[1]).write_text(yaml.safe_dump(small))


def run(document: Path) -> None:
    """Run every block of a document, in order."""
    names: dict[str, Any] = {}
    for language, text, _ in blocks(document):
        if language == "sh":
            for command in commands(text):
                run_command(command)
        elif language == "python":
            exec(compile(text, document.name, "exec"), names)
        elif language == "yaml":
            read_yaml(text)


def write_texts(folder: Path) -> None:
    """Write the texts that the pages name: to learn from, and held out."""
    lines = {
        "novels": "It was the best of times, it was the worst of times.",
        "english": "It was the season of light, it was the season of darkness.",
        "russian": "Это было лучшее изо всех времён, это было худшее изо всех времён.",
        "chinese": "那是最美好的时代，那是最糟糕的时代。",
        "heldout/en": "It was the age of wisdom.",
        "heldout/ru": "Это был век мудрости.",
    }
    for name, line in lines.items():
        (folder / name).mkdir(parents=True)
        times = 5 if name.startswith("heldout") else 1000
        (folder / name / "text.txt").write_text(f"{line}\n\n" * times, "utf-8")


def prepare(document: Path, tiny_run: Path) -> None:
    """Make in the current folder what a page takes for granted."""
    if document.name == "data.md":
        Path("tokenizer").symlink_to(tiny_run / "tokenizer")
        Path("more.jsonl.zst").write_bytes(zstandard.compress(b'{"text": "the best of times"}\n'))
    if document.name == "runs.md":
        Path("runs").mkdir()
        Path("runs/demo").symlink_to(tiny_run)
    if document.name == "evaluation.md":
        Path("bench").mkdir()
        Path("bench/anatomy_test.csv").write_text("Where is it?,here,there,in,out,A\n" * 4)
        plan = plans.load("tiny", [*SMALL, STAGES, "model.context=128", "data.sources=[novels/]"])
        for name in ("novels", "whole"):
            nacre.grow(plan, f"runs/{name}")
        nacre.compose([f"runs/novels/stages/{stage}" for stage in ("01", "02")], "runs/two")


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_every_block_runs(
    document: Path,
    tmp_path: Path,
    tiny_run: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path)
    prepare(document, tiny_run)
    run(document)
    assert "tokens a byte" not in capsys.readouterr().err


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_blocks_that_do_not_run_say_why(document: Path) -> None:
    for language, text, below in blocks(document):
        assert language in ("sh", "python", "yaml", "text", ""), language
        if language in ("text", "") and LOOKS_RUN.search(text):
            assert below.startswith("<!-- not run: because "), text


def test_a_shell_line_that_is_no_command_of_nacre_is_refused() -> None:
    assert list(commands("# why\nnacre grow \\\n  --out runs/a  # here\n")) == [
        ["nacre", "grow", "--out", "runs/a"]
    ]
    with pytest.raises(AssertionError, match="not run: torchrun"):
        list(commands("torchrun -m nacre grow\n"))


def test_readme_shows_the_two_commands() -> None:
    text = README.read_text()
    assert text.index("make demo") < text.index("make test") < 2000
    makefile = (ROOT / "Makefile").read_text()
    assert re.search(r"^demo:", makefile, re.MULTILINE)
    assert re.search(r"^test:", makefile, re.MULTILINE)


def test_readme_commands_are_there() -> None:
    verbs = {c[1] for kind, text, _ in blocks(README) if kind == "sh" for c in commands(text)}
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


def test_measurements_shown_are_those_on_record() -> None:
    """The README's table, the results and the experiments are what their files say."""
    maker = runpy.run_path(str(ROOT / "benchmarks" / "results_page.py"))
    files = sorted((ROOT / "docs" / "results").glob("*.json"))
    found = {path.stem: json.loads(path.read_text("utf-8")) for path in files}
    studies = {name: each for name, each in found.items() if "comparisons" in each}
    assert maker["with_headlines"](README.read_text("utf-8"), studies) == README.read_text("utf-8")
    results = (ROOT / "docs" / "results.md").read_text("utf-8")
    experiments = (ROOT / "docs" / "experiments.md").read_text("utf-8")
    for name, each in studies.items():
        if name in maker["RESULTS"]:
            assert all(part in results for part in page.sections(each)), name
        else:
            assert maker["search"](name, each) in experiments, name


@pytest.mark.parametrize("document", PAGES, ids=lambda path: path.name)
def test_links_and_pictures_exist(document: Path) -> None:
    for target in re.findall(r"\]\(([^)#]+)\)", document.read_text("utf-8")):
        if "://" not in target:
            assert (document.parent / target).exists(), target


def test_the_plan_of_the_documents_is_a_plan() -> None:
    (text,) = (t for kind, t, _ in blocks(ROOT / "docs" / "plans.md") if kind == "yaml")
    plan = plans.parse(yaml.safe_load(text))
    shown = yaml.safe_load(text)
    for section in ("substrate", "tokenizer", "data", "model", "training", "trunk"):
        fields = type(getattr(plan, section)).model_fields
        assert shown[section].keys() == fields.keys(), section
        for name, value in shown[section].items():
            default = getattr(getattr(plans.Plan(stages=()), section), name)
            assert getattr(getattr(plan, section), name) == default, (section, name, value)
