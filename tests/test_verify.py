"""Verifying a run: whole ones pass, and each kind of damage is found and named."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import Command

from nacre.errors import CheckpointError
from nacre.growth.cache import CacheBuilder, Identity
from nacre.train.verify import verify


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    """A run of its own, without links to the shared one."""
    shutil.copytree(run, tmp_path / "run")
    return tmp_path / "run"


def wrong(run: Path) -> dict[str, str]:
    return {finding.what: finding.wrong for finding in verify(run) if finding.wrong}


def test_a_finished_run_is_whole(run: Path) -> None:
    found = verify(run)
    assert [finding.wrong for finding in found] == [None] * len(found)
    assert [finding.what for finding in found] == [
        "plan", "run record", "tokenizer", "substrate", "tokens 01",
        "stage 01", "lineage of 01", "stage 02", "lineage of 02", "stage 03", "lineage of 03",
        "metrics",
    ]  # fmt: skip


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[-3] ^= 1
    path.write_bytes(data)


def edit(path: Path, change: Callable[[dict], None]) -> None:
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def another_parent(run: Path) -> None:
    edit(run / "stages/02/stage.json", lambda record: record.update(parent="0" * 64))


def another_frozen(run: Path) -> None:
    edit(
        run / "stages/02/stage.json",
        lambda record: record["frozen"].update({next(iter(record["frozen"])): "0" * 64}),
    )


def outside(run: Path) -> None:
    def change(index: dict) -> None:
        index["weight_map"] = dict.fromkeys(index["weight_map"], "../../x.safetensors")

    edit(run / "stages/01/model.safetensors.index.json", change)


def step_twice(run: Path) -> None:
    path = run / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*lines[:3], lines[2], *lines[3:]]))


def damaged_cache(run: Path) -> None:
    identity = Identity("a" * 64, 1, "b" * 64, "c" * 64, 2, 4, 8, "fp32")
    with CacheBuilder(run / "cache/02/train", identity, batch_windows=2) as builder:
        for records in builder.missing():
            builder.write(records, [torch.zeros(len(records), 4, 8)])
        builder.finish()
    flip(run / "cache/02/train/segment-00000.bin")


@pytest.mark.parametrize(
    ("damage", "what", "message"),
    [
        (damaged_cache, "cache 02/train", "resume the run, which makes it again"),
        (lambda run: flip(run / "stages/02/head.safetensors"), "stage 02", "the ledger recorded"),
        (lambda run: (run / "stages/02/head.safetensors").unlink(), "stage 02", "No such file"),
        (outside, "stage 01", "is no file of the folder"),
        (another_parent, "lineage of 02", "another parent is recorded"),
        (another_frozen, "lineage of 02", "1 frozen tensors differ"),
        (lambda run: flip(run / "data/01/train.tokens"), "tokens 01", "are not what was written"),
        (step_twice, "metrics", "follows step"),
        (lambda run: shutil.rmtree(run / "stages/02"), "stages", "stage 2 is missing"),
        (lambda run: (run / "plan.yaml").write_text("stages: 3"), "plan", "stages"),
    ],
)
def test_damage_is_found(
    damage: Callable[[Path], None], what: str, message: str, copy: Path
) -> None:
    damage(copy)
    found = wrong(copy)
    assert message in found[what]


def test_a_folder_that_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no run"):
        verify(tmp_path)


def test_the_command(copy: Path, command: Command) -> None:
    code, out, _ = command("verify", copy)
    assert code == 0
    assert "stage 03: whole" in out
    flip(copy / "stages/03/head.safetensors")
    code, out, err = command("verify", copy, "--json")
    assert code == 2
    assert not json.loads(out)["whole"]
    assert "1 of 12 parts are damaged" in err
