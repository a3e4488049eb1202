"""Checkpoints: sharded by growth step, linked where nothing changed, stock, never half written."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WITHOUT_NACRE, Build
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from nacre.errors import CheckpointError
from nacre.growth import stage
from nacre.train import checkpoint, files

# --- stages: shards, links, index ---


def save(
    model: PreTrainedModel,
    folder: Path,
    growth: list[tuple[int, int]],
    unchanged: set[str] | None = None,
    previous: Path | None = None,
) -> list[str]:
    folder.mkdir()
    return checkpoint.save_weights(
        model, folder, growth, unchanged=unchanged or set(), previous=previous
    )


def frozen(model: PreTrainedModel, depth: int) -> set[str]:
    stage.freeze_below(model, depth)
    return set(model.state_dict()) - set(stage.trainable_names(model))


@pytest.fixture
def grown(tmp_path: Path, pico: Build) -> tuple[list[Path], PreTrainedModel]:
    """Three stages on disk of 1, 2 and 1 blocks, the head trained in each; and the model."""
    folders = [tmp_path / f"0{number}" for number in (1, 2, 3)]
    model = pico("llama", depth=1)
    assert save(model, folders[0], [(1, 1)]) == []
    for number, count in ((2, 2), (3, 1)):
        depth = len(model.model.layers)
        stage.add_blocks(model, count, "random", seed=number)
        unchanged = frozen(model, depth)
        model.lm_head.weight.data += 0.1
        growth = [(1, 1), (2, 2), (3, 1)][:number]
        linked = save(model, folders[number - 1], growth, unchanged, folders[number - 2])
        assert set(linked) == {"substrate.safetensors"} | {
            f"blocks-0{earlier}.safetensors" for earlier in range(1, number)
        }
    return folders, model


def test_a_stage_adds_its_blocks_and_head_and_links_the_rest(grown: tuple) -> None:
    folders, _ = grown
    inodes = [{p.name: p.stat().st_ino for p in f.glob("*.safetensors")} for f in folders]
    assert set(inodes[2]) == {
        "substrate.safetensors",
        "blocks-01.safetensors",
        "blocks-02.safetensors",
        "blocks-03.safetensors",
        "head.safetensors",
    }
    for earlier, later in ((0, 1), (1, 2)):
        for name in set(inodes[earlier]) - {"head.safetensors"}:
            assert inodes[earlier][name] == inodes[later][name]
        assert inodes[earlier]["head.safetensors"] != inodes[later]["head.safetensors"]
    assert (folders[2] / "substrate.safetensors").stat().st_nlink == 3


def test_the_index_names_every_tensor_once_and_where_it_is(grown: tuple) -> None:
    folders, model = grown
    index = json.loads((folders[2] / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == set(model.state_dict())
    held = {}
    for shard in folders[2].glob("*.safetensors"):
        with safe_open(shard, "pt") as file:
            held |= dict.fromkeys(file.keys(), shard.name)
            assert file.metadata() == {"format": "pt"}
    assert held == index["weight_map"]
    assert held["model.embed_tokens.weight"] == "substrate.safetensors"
    assert held["model.norm.weight"] == held["lm_head.weight"] == "head.safetensors"
    assert [held[f"model.layers.{i}.input_layernorm.weight"] for i in range(4)] == [
        "blocks-01.safetensors",
        "blocks-02.safetensors",
        "blocks-02.safetensors",
        "blocks-03.safetensors",
    ]
    assert index["metadata"]["total_size"] == 4 * sum(p.numel() for p in model.parameters())


def test_a_shard_with_one_changed_tensor_is_written_anew(
    tmp_path: Path, pico: Build, ids: torch.Tensor
) -> None:
    model = pico("llama", depth=2)
    save(model, tmp_path / "01", [(1, 2)])
    model.model.layers[1].mlp.up_proj.weight.data += 1
    unchanged = set(model.state_dict()) - {"model.layers.1.mlp.up_proj.weight"}
    linked = save(model, tmp_path / "02", [(1, 2)], unchanged, tmp_path / "01")
    assert set(linked) == {"substrate.safetensors", "head.safetensors"}
    assert_same(checkpoint.load_model(tmp_path / "02"), model, ids)


def assert_same(one: PreTrainedModel, other: PreTrainedModel, ids: torch.Tensor) -> None:
    with torch.no_grad():
        assert torch.equal(one(input_ids=ids).logits, other(input_ids=ids).logits)


def test_without_hard_links_a_shard_is_copied(
    tmp_path: Path, pico: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any) -> None:
        raise OSError("no hard links here")

    model = pico("llama")
    save(model, tmp_path / "01", [(1, 2)])
    monkeypatch.setattr(os, "link", refuse)
    save(model, tmp_path / "02", [(1, 2)], set(model.state_dict()), tmp_path / "01")
    one, two = (tmp_path / name / "substrate.safetensors" for name in ("01", "02"))
    assert one.stat().st_ino != two.stat().st_ino
    assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3", "gemma2", "gpt2", "opt"])
def test_a_stage_loads_as_it_was_saved(
    family: str, tmp_path: Path, pico: Build, ids: torch.Tensor
) -> None:
    model = pico(family)
    stage.add_blocks(model, 1, "random", seed=0)
    save(model, tmp_path / "01", [(0, 2), (1, 1)])
    loaded = checkpoint.load_model(tmp_path / "01")
    assert_same(loaded, model, ids)
    assert loaded.config.num_hidden_layers == 3
    assert checkpoint.load_config(tmp_path / "01").num_hidden_layers == 3
    shards = set(checkpoint.shard_of(model, [(0, 2), (1, 1)]).values())
    names = ["blocks-00", "blocks-01", "head", "substrate"]
    assert shards == {f"{name}.safetensors" for name in names}


PROGRAM = (
    WITHOUT_NACRE
    + """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([[int(n) for n in sys.argv[2].split(",")]])
generated = model.generate(ids, max_new_tokens=5, do_sample=False)
with torch.no_grad():
    save_file({"logits": model(input_ids=ids).logits, "generated": generated}, sys.argv[3])
assert not any(name.partition(".")[0] == "nacre" for name in sys.modules)
"""
)


@pytest.mark.slow
def test_a_stage_loads_where_nacre_cannot_be_imported(grown: tuple, tmp_path: Path) -> None:
    folders, model = grown
    ids = torch.arange(12)[None]
    written = ",".join(map(str, ids[0].tolist()))
    out = tmp_path / "out.safetensors"
    command = [sys.executable, "-c", PROGRAM, str(folders[2]), written, str(out)]
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    found = load_file(out)
    with torch.no_grad():
        assert torch.equal(found["logits"], model(input_ids=ids).logits)
    expected = model.generate(ids, max_new_tokens=5, do_sample=False)
    assert torch.equal(found["generated"], expected)


# --- what cannot be loaded ---


def refused(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        checkpoint.load_model(path)
    text = str(caught.value)
    assert text.startswith(f"{path}: ")
    assert "\n" not in text
    return text.removeprefix(f"{path}: ")


def test_a_folder_that_is_no_checkpoint(tmp_path: Path) -> None:
    assert refused(tmp_path / "none") == "no such folder"
    assert refused(tmp_path) == "holds no model (config.json is missing)"
    with pytest.raises(CheckpointError, match=r"holds no model \(config\.json is missing\)$"):
        checkpoint.load_config(str(tmp_path))


@pytest.mark.parametrize(
    "text",
    ["{", "[]", '{"model_type": "no such type"}', '{"architectures": 3}', "\xff"],
)
def test_a_damaged_configuration(text: str, grown: tuple) -> None:
    (folder, *_), _ = grown
    (folder / "config.json").write_bytes(text.encode("latin-1"))
    assert refused(folder).startswith("cannot be loaded: ")
    with pytest.raises(CheckpointError, match="cannot be loaded: "):
        checkpoint.load_config(folder)


def test_a_missing_shard(grown: tuple) -> None:
    (*_, folder), _ = grown
    (folder / "head.safetensors").unlink()
    assert "head.safetensors" in refused(folder)


def test_a_truncated_shard(grown: tuple) -> None:
    (*_, folder), _ = grown
    shard = folder / "head.safetensors"
    data = shard.read_bytes()
    shard.unlink()
    shard.write_bytes(data[: len(data) // 2])
    refused(folder)


@pytest.mark.parametrize(
    "shard",
    [
        "../x.safetensors", "/x.safetensors", "a\\b.safetensors", "", 3, "x\0.safetensors",
        f"{'x' * 300}.safetensors",
    ],
)  # fmt: skip
def test_an_index_that_leaves_its_folder_is_refused(
    shard: object, run: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "stage"
    shutil.copytree(run / "stages" / "01", folder)
    index = json.loads((folder / checkpoint.INDEX).read_text())
    index["weight_map"] = dict.fromkeys(index["weight_map"], shard)
    (folder / checkpoint.INDEX).write_text(json.dumps(index))
    for load in (checkpoint.load_model, checkpoint.load_config):
        with pytest.raises(CheckpointError, match="is no file of the folder"):
            load(folder)


def test_a_missing_tensor_is_not_made_up(grown: tuple) -> None:
    (*_, folder), _ = grown
    index = folder / "model.safetensors.index.json"
    data = json.loads(index.read_text())
    del data["weight_map"]["lm_head.weight"]
    index.write_text(json.dumps(data))
    save_file({"model.norm.weight": torch.ones(32)}, folder / "head.safetensors")
    assert "lm_head.weight" in refused(folder)


def test_no_weights_at_all(grown: tuple) -> None:
    (folder, *_), _ = grown
    for path in folder.glob("*.safetensors*"):
        path.unlink()
    refused(folder)


# --- folders and JSON files ---


def test_a_new_folder_appears_whole(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "a" / "b") as partial:
        (partial / "file").write_text("1")
        assert not (tmp_path / "a" / "b").exists()
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["b"]
    assert (tmp_path / "a" / "b" / "file").read_text() == "1"


def test_a_new_folder_that_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    def fail(target: Path) -> None:
        with files.new_folder(target) as partial:
            (partial / "file").write_text("1")
            raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        fail(tmp_path / "a")
    assert list(tmp_path.iterdir()) == []


def test_a_new_folder_that_fails_leaves_the_old_one(tmp_path: Path) -> None:
    with files.new_folder(tmp_path / "a") as partial:
        (partial / "old").write_text("1")
    with pytest.raises(RuntimeError), files.new_folder(tmp_path / "a"):
        raise RuntimeError
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["old"]
    with files.new_folder(tmp_path / "a") as partial:
        (partial / "new").write_text("1")
    assert [path.name for path in (tmp_path / "a").iterdir()] == ["new"]
    assert [path.name for path in tmp_path.iterdir()] == ["a"]


def test_leftovers_of_a_crash_are_swept_away(tmp_path: Path) -> None:
    (tmp_path / ".a.partial").mkdir()
    (tmp_path / ".a.partial" / "half").write_text("1")
    with files.new_folder(tmp_path / "a") as partial:
        assert list(partial.iterdir()) == []


def test_json_is_replaced_not_rewritten(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    files.write_json(path, {"name": "日本", "n": 1})
    assert files.read_json(path) == {"name": "日本", "n": 1}
    with pytest.raises(TypeError):
        files.write_json(path, {"n": object()})
    assert files.read_json(path) == {"name": "日本", "n": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "no such file"),
        (b"{", "cannot be read: "),
        (b"\xff", "cannot be read: "),
        (b"[1]", "expected a JSON object, found list"),
    ],
)
def test_bad_json(content: bytes | None, message: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(CheckpointError) as caught:
        files.read_json(path)
    assert str(caught.value).startswith(f"{path}: {message}")


# --- runs ---


def test_a_run_means_its_newest_finished_stage(tmp_path: Path) -> None:
    assert checkpoint.newest(tmp_path) == tmp_path  # not a run: taken as it is
    (tmp_path / "plan.yaml").write_text("")
    with pytest.raises(CheckpointError, match=r"no finished stage yet.*nacre grow --resume --out"):
        checkpoint.newest(tmp_path)
    for name in ("01", "02", "03"):
        (tmp_path / "stages" / name).mkdir(parents=True)
    for name in ("01", "02"):
        (tmp_path / "stages" / name / "stage.json").write_text("{}")
    assert checkpoint.newest(tmp_path) == tmp_path / "stages" / "02"
    assert files.stages(tmp_path) == [tmp_path / "stages" / name for name in ("01", "02")]
