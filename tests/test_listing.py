"""The listing of a folder: what is found, in which state, how much of the disk it takes."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from conftest import Command

import nacre
from nacre.train import folder
from nacre.train.metrics import rewind_metrics


def copy(run: Path, target: Path) -> Path:
    """Copy a run; files of several names stay one file."""
    subprocess.run(["cp", "-a", str(run), str(target)], check=True)
    return target


@pytest.fixture
def runs(tiny_run: Path, tmp_path: Path) -> Path:
    (tmp_path / "runs").mkdir()
    copy(tiny_run, tmp_path / "runs" / "one")
    return tmp_path / "runs"


def test_a_finished_run(runs: Path) -> None:
    (run,) = nacre.list_folder(runs).runs
    records = [json.loads(p.read_text()) for p in sorted(runs.glob("one/stages/*/stage.json"))]
    assert (run.path, run.state) == (runs / "one", "finished")
    assert (run.stages, run.planned, run.depth) == (3, 3, 3)
    assert run.bits_per_byte == records[-1]["validation"]["bits_per_byte"]
    assert run.tokens == sum(record["tokens"] for record in records)


def test_hard_links_count_once(runs: Path) -> None:
    files = [path.lstat() for path in (runs / "one").rglob("*") if not path.is_dir()]
    once = {(each.st_dev, each.st_ino): each.st_blocks * 512 for each in files}
    assert len(once) < len(files), "stages share shards"
    shutil.copytree(runs / "one", runs / "two", copy_function=os.link)
    found = nacre.list_folder(runs)
    assert [run.bytes for run in found.runs] == [sum(once.values())] * 2
    assert found.bytes == sum(once.values())


def test_an_interrupted_run_and_its_tokens(runs: Path) -> None:
    before = nacre.list_folder(runs).runs[0].tokens
    shutil.rmtree(runs / "one" / "stages" / "03")
    rewind_metrics(runs / "one", 3, 1)
    (run,) = nacre.list_folder(runs).runs
    assert (run.state, run.stages, run.depth) == ("interrupted", 2, 2)
    done = [
        json.loads((runs / f"one/stages/0{n}/stage.json").read_text())["tokens"] for n in (1, 2)
    ]
    assert sum(done) < run.tokens < before
    with (runs / "one" / "metrics.jsonl").open("a") as file:
        file.write('{"stage": 3, "st')  # cut off
    assert nacre.list_folder(runs).runs[0].tokens == run.tokens


def test_a_run_that_is_written_to_is_running(runs: Path) -> None:
    shutil.rmtree(runs / "one" / "stages" / "03")
    with folder.held(runs / "one"):
        assert nacre.list_folder(runs).runs[0].state == "running"
    assert nacre.list_folder(runs).runs[0].state == "interrupted"


@pytest.mark.parametrize(
    ("file", "text", "reason"),
    [
        ("stages/02/stage.json", "{", "stage.json cannot be read"),
        ("stages/03/stage.json", "{}", "lacks 'depth'"),
        ("stages/02/stage.json", None, "stage 2 is missing below stage 3"),
        ("plan.yaml", "stages: [", "plan.yaml cannot be read"),
        ("plan.yaml", "name: x", "lacks 'stages'"),
        ("plan.yaml", "[" * 100_000, "plan.yaml cannot be read: is nested too deeply"),
        ("stages/02/stage.json", "[" * 100_000, "stage.json cannot be read: nested more than 100"),
    ],
)
def test_what_is_damaged_is_listed_with_the_reason(
    runs: Path, command: Command, file: str, text: str | None, reason: str
) -> None:
    path = runs / "one" / file
    path.unlink()
    if text is not None:
        path.write_text(text)
    code, out, err = command("ls", runs)
    assert code == 0
    assert "damaged" in out
    assert reason in err


def test_a_study_is_one_row_and_named_itself_all_its_runs(runs: Path, command: Command) -> None:
    study = {"seeds": [0, 1], "budgets": [1.0], "arms": {"a": {}, "b": {"budgets": [1.0, 2.0]}}}
    (runs / "study" / "a" / "x1").mkdir(parents=True)
    (runs / "study" / "study.yaml").write_text(yaml.safe_dump(study))
    (runs / "one").rename(runs / "study" / "a" / "x1" / "seed-0")
    found = nacre.list_folder(runs)
    assert found.runs == []
    (row,) = found.studies
    assert (row.state, row.finished, row.planned) == ("interrupted", 1, 6)
    assert row.bytes > row.runs[0].bytes
    code, out, _ = command("ls", runs / "study")
    assert code == 0
    assert "a/x1/seed-0" in out
    (runs / "study" / "study.yaml").write_text("arms: {a: null}")
    assert nacre.list_folder(runs).studies[0].state == "damaged"


def test_a_composition(runs: Path, command: Command) -> None:
    stages = [runs / "one" / "stages" / number for number in ("01", "02")]
    record = nacre.compose(stages, runs / "both", names=["low", "high"], bundle=True)
    found = nacre.list_folder(runs)
    assert [run.path.name for run in found.runs] == ["one"], "a bundle's experts are no runs"
    (row,) = found.compositions
    assert (row.experts, row.rule) == (("low", "high"), "fixed-share")
    assert row.parameters == record["parameters"]
    code, out, _ = command("ls", runs)
    assert code == 0
    assert "low, high" in out
    (runs / "both" / "composition.json").write_text("{}")
    _, out, err = command("ls", runs)
    assert "lacks 'experts'" in " ".join(err.split())


def test_json_has_everything(runs: Path, command: Command) -> None:
    code, out, _ = command("ls", runs, "--json")
    assert code == 0
    found = json.loads(out)
    assert found == nacre.list_folder(runs).record()
    (run,) = found["runs"]
    assert run["path"] == str(runs / "one")
    assert found["bytes"] == run["bytes"] > 0
    assert run["changed"].startswith("20")


def test_nothing_there(command: Command, tmp_path: Path) -> None:
    code, _, err = command("ls", tmp_path)
    assert code == 0
    assert "no runs in" in err
    code, _, err = command("ls", tmp_path / "lost")
    assert code == 2
    assert "there is no folder" in err


def test_a_listing_loads_no_torch(runs: Path) -> None:
    check = (
        "import sys; from nacre.cli import main\n"
        f"try: main(['ls', {str(runs)!r}])\n"
        "except SystemExit: pass\n"
        "sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", check], stdout=subprocess.DEVNULL).returncode == 0
