"""Results on disk: what identifies a checkpoint, what is kept where, damaged files."""

from __future__ import annotations

import json
import shutil
import subprocess
import threading
from pathlib import Path
from typing import Any

import pytest
from conftest import Build
from safetensors.torch import load_file, save_file

import nacre
from nacre import composition
from nacre.errors import CheckpointError, FingerprintError
from nacre.evaluate import results
from nacre.evaluate.scores import Score
from nacre.train import files

IDENTITY = {"fingerprint": "f", "task": "copy", "version": "1", "settings": {"seed": 0}}


def record(value: float = 0.5, **changes: Any) -> dict[str, Any]:
    score = Score("copy", "accuracy", value, 10, interval=(0.4, 0.6), chance=0.1)
    return results.records([score], Path("ckpt"), IDENTITY)[0] | changes


# --- records ---


def test_a_record_says_what_was_scored_on_what_by_which_version() -> None:
    found = record()
    assert found.keys() == set(results.KEYS)
    assert found.pop("date").endswith("+00:00")
    assert found == {
        "checkpoint": "ckpt", **IDENTITY, "metric": "accuracy", "subset": "", "value": 0.5, "n": 10,
        "interval": [0.4, 0.6], "chance": 0.1, "corrected": pytest.approx(0.4 / 0.9),
        "nacre": nacre.__version__, "commit": results.commit(),
    }  # fmt: skip


def test_the_commit_is_that_of_the_sources_checkout(tmp_path: Path) -> None:
    def git(*arguments: str) -> str:
        who = ("-c", "user.name=a", "-c", "user.email=a@b.c")
        command = ["git", "-C", str(tmp_path), *who, *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    source = tmp_path / "nacre" / "results.py"
    source.parent.mkdir()
    for path in (source, tmp_path / "mine.txt"):
        path.write_text("x")
    assert results.commit(source) is None
    git("init", "-q")
    git("add", "mine.txt")
    git("commit", "-q", "-m", "mine")
    assert results.commit(source) is None, "what lies untracked in another's checkout"
    git("add", "nacre")
    git("commit", "-q", "-m", "nacre")
    assert results.commit(source) == git("rev-parse", "HEAD")
    source.write_text("y")
    assert results.commit(source) == git("rev-parse", "HEAD") + "-dirty"


def test_records_are_appended_and_read(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    assert results.read(path) == []
    one, other = record(0.5), record(0.7, checkpoint="水")
    results.append(path, [one])
    results.append(path, [other, one])
    assert results.read(path) == [one, other, one]
    assert len(path.read_text(encoding="utf-8").splitlines()) == 3
    assert not list(tmp_path.glob("*.partial"))


def test_records_from_before_there_was_a_commit_are_read(tmp_path: Path) -> None:
    path, old = tmp_path / "evaluations.jsonl", record()
    del old["commit"]
    results.append(path, [old])
    assert results.read(path) == [old | {"commit": None}]


def test_a_line_without_its_end_is_not_joined_to_the_next(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    path.write_text(json.dumps(record(0.1)))
    results.append(path, [record(0.2)])
    assert [found["value"] for found in results.read(path)] == [0.1, 0.2]


def test_nobody_reads_half_a_line_and_no_record_is_lost(tmp_path: Path) -> None:
    path = tmp_path / "evaluations.jsonl"
    writers = [
        threading.Thread(
            target=lambda n=n: [results.append(path, [record(n)] * 2) for _ in range(20)]
        )
        for n in range(3)
    ]
    for writer in writers:
        writer.start()
    while any(writer.is_alive() for writer in writers):
        assert len(results.read(path)) % 2 == 0
    assert len(results.read(path)) == 3 * 20 * 2


@pytest.mark.parametrize("line", ["{", '{"task": "copy"}', "5", "[]", '"text"', "", "\xff"])
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "evaluations.jsonl"
    results.append(path, [record()])
    with path.open("ab") as file:
        file.write(line.encode("latin-1") + b"\n")
    with pytest.raises(CheckpointError) as caught:
        results.read(path)
    assert str(caught.value).startswith(f"{path}, line 2: damaged: lacks ")
    assert str(caught.value).endswith("; remove the line; what it said can be evaluated again")


def test_what_was_done_is_found_and_the_newest_counts() -> None:
    known = [
        record(0.1),
        record(0.2, subset="en"),
        record(0.3),
        record(0.4, fingerprint="other"),
        record(0.4, task="khop-1"),
        record(0.4, version="2"),
        record(0.4, settings={"seed": 1}),
    ]
    assert [found["value"] for found in results.done(known, IDENTITY)] == [0.3, 0.2]
    assert results.done(known, {**IDENTITY, "version": "3"}) == []


# --- where they are kept ---


def test_results_are_the_runs_or_stand_beside_the_checkpoint(tmp_path: Path, run: Path) -> None:
    (stage, *_) = files.stages(run)
    assert results.home(stage) == run.resolve() / "evaluations.jsonl"
    (tmp_path / "link").symlink_to(stage)
    assert results.home(tmp_path / "link") == run.resolve() / "evaluations.jsonl"
    assert results.home(tmp_path) == tmp_path / "evaluations.jsonl"
    (tmp_path / "stages" / "01").mkdir(parents=True)
    alone = tmp_path / "stages" / "01"
    assert results.home(alone) == alone / "evaluations.jsonl", "no run is around it"


# --- fingerprints ---


def test_a_stages_fingerprint_is_that_of_its_tensors_and_configuration(
    run: Path, tmp_path: Path
) -> None:
    stages = files.stages(run)
    assert len({results.fingerprint(stage) for stage in stages}) == 3
    copy = shutil.copytree(stages[0], tmp_path / "copy")
    first = results.fingerprint(stages[0])
    assert results.fingerprint(copy) == first, "where it is does not count"
    record = files.read_record(copy)
    files.write_json(copy / "stage.json", record | {"seconds": 0})
    assert results.fingerprint(copy) == first, "what does not compute does not count"
    config = files.read_json(copy / "config.json")
    config["rope_parameters"] = config["rope_parameters"] | {"rope_theta": 500.0}
    files.write_json(copy / "config.json", config)
    turned = results.fingerprint(copy)
    files.write_json(copy / "stage.json", record | {"fingerprint": "0" * 64})
    assert len({first, turned, results.fingerprint(copy)}) == 3
    composition.compose([stages[0], stages[1]], tmp_path / "both")
    both = results.fingerprint(tmp_path / "both")
    composition.compose([tmp_path / "copy", stages[1]], tmp_path / "other")
    assert results.fingerprint(tmp_path / "other") != both


def test_a_foreign_folders_fingerprint_is_that_of_its_files(tmp_path: Path, pico: Build) -> None:
    one, two, other = (tmp_path / name for name in ("one", "two", "other"))
    pico("llama").save_pretrained(one)
    shutil.copytree(one, two)
    first = results.fingerprint(one)
    assert results.fingerprint(two) == first, "where it is does not count"
    (two / "README.md").write_text("A card.")
    (two / "evaluations.jsonl").write_text("{}\n")
    assert results.fingerprint(two) == first, "what does not compute does not count"
    pico("llama", seed=1).save_pretrained(other)
    assert results.fingerprint(other) != first, "the same shapes with other weights"
    (two / "config.json").write_text((two / "config.json").read_text() + " ")
    assert results.fingerprint(two) != first
    (one / "tokenizer.json").write_text("{}")
    assert results.fingerprint(one) != first


def test_a_compositions_fingerprint_is_that_of_experts_rule_and_what_was_trained(
    tmp_path: Path, run: Path
) -> None:
    stages = files.stages(run)[:2]
    one, two, other, bundle = (tmp_path / name for name in ("one", "two", "other", "bundle"))
    composition.compose(stages, one, "posterior", names=["a", "b"])
    composition.compose(stages, two, "posterior", names=["c", "d"])
    composition.compose(stages, other, "posterior", decay=0.5)
    composition.compose(stages, bundle, "posterior", bundle=True)
    first = results.fingerprint(one)
    assert results.fingerprint(two) == results.fingerprint(bundle) == first
    assert results.fingerprint(other) != first
    for name in ("config.json", "composition.json"):
        data = files.read_json(two / name)
        data["experts"].reverse()
        files.write_json(two / name, data)
    assert results.fingerprint(two) != first, "rules may have a number for each"


def test_a_composition_of_foreign_experts_follows_their_files(tmp_path: Path, run: Path) -> None:
    stage = files.stages(run)[0]
    for name in ("a", "b"):
        shutil.copytree(stage, tmp_path / name)
        (tmp_path / name / "stage.json").unlink()
    composition.compose([tmp_path / "a", tmp_path / "b"], tmp_path / "both", "mean-logits")
    before = results.fingerprint(tmp_path / "both")
    shard = tmp_path / "b" / "head.safetensors"
    tensors = {name: tensor + 1 for name, tensor in load_file(shard).items()}
    shard.unlink()  # a copy may be a link
    save_file(tensors, shard, {"format": "pt"})
    assert results.fingerprint(tmp_path / "both") != before


def test_a_composition_whose_expert_changed_has_none(tmp_path: Path, run: Path) -> None:
    shutil.copytree(files.stages(run)[0], tmp_path / "a")
    composition.compose([tmp_path / "a", files.stages(run)[1]], tmp_path / "both")
    record = files.read_json(tmp_path / "a" / "stage.json")
    files.write_json(tmp_path / "a" / "stage.json", record | {"fingerprint": "0" * 64})
    with pytest.raises(FingerprintError, match="it was changed after composing"):
        results.fingerprint(tmp_path / "both")
