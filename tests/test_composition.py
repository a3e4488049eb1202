"""Compositions on disk: refusals, sharing, both ways of saving, growing and shrinking, traces."""

from __future__ import annotations

import errno
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WITHOUT_NACRE, Build, Command
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GPT2Config

import nacre
from nacre import composition, generation
from nacre import tokenizer as tokenizers
from nacre.composition.card import FORMULAS
from nacre.composition.expert import Expert, read_experts
from nacre.errors import CheckpointError, ConfigError, FingerprintError, NacreError
from nacre.growth import ledger
from nacre.growth import plan as plans
from nacre.models import stock
from nacre.models.composed import ComposedForCausalLM
from nacre.models.rules import RULES, TRAINED
from nacre.train import checkpoint, files
from nacre.train.grow import grow

IDS = torch.arange(40, 52)[None]


@dataclass
class Place:
    """Experts to compose: `a` and `b` branch above one block; `other` has no ledger."""

    root: Path
    a: Path
    b: Path
    other: Path


@pytest.fixture(scope="module")
def grown(tmp_path_factory: pytest.TempPathFactory) -> Place:
    root = tmp_path_factory.mktemp("experts")
    text = "It was the best of times, it was the worst of times; and so on.\n\n" * 300
    (root / "text.txt").write_text(text)
    settings = [
        "training={batch_tokens: 256, validation_tokens: 256, precision: fp32}",
        f"data.sources=[{root / 'text.txt'}]",
        "stages=[{add_blocks: 1, tokens: 512}, {add_blocks: 1, tokens: 512}]",
    ]
    grow(plans.load("tiny", settings), root / "a")
    branch = [
        f"from={root / 'a' / 'stages' / '01'}",
        "seed=5",
        "stages=[{add_blocks: 1, tokens: 512}]",
    ]
    grow(plans.load("tiny", [*settings, *branch]), root / "b")
    tokenizer = tokenizers.load(root / "a" / "stages" / "02")
    config = stock.gpt_neox_config(len(tokenizer), 48, 2, 64, 24, 1)
    torch.manual_seed(3)
    stock.build(config).save_pretrained(root / "other")
    tokenizer.save_pretrained(root / "other")
    return Place(root, root / "a" / "stages" / "02", root / "b", root / "other")


@pytest.fixture
def place(grown: Place, tmp_path: Path) -> Place:
    """A copy of the experts that a test may change."""
    shutil.copytree(grown.root, tmp_path / "experts")
    moved = {name: tmp_path / "experts" / getattr(grown, name).relative_to(grown.root)
             for name in ("a", "b", "other")}  # fmt: skip
    return Place(tmp_path / "experts", **moved)


def edit_json(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def spoil_weights(place: Place) -> None:
    for shard in place.root.rglob("*.safetensors"):
        shard.unlink()
        shard.write_bytes(b"no weights")


# --- refusals ---


def refused(error: type[NacreError], *arguments: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        nacre.compose(*arguments, **options)
    assert not Path(arguments[1]).exists() or not (Path(arguments[1]) / "config.json").exists()
    return str(caught.value)


def test_a_rule_and_its_options_are_refused_in_one_message(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = refused(ConfigError, [place.a, place.b], out, "posterio")
    assert text == "--mix: 'posterio' is no rule (did you mean 'posterior'?)"
    text = refused(ConfigError, [place.a, place.b], out, "posterior", decya=0.5, floor=2, prior=[1])
    assert "--set decya: is no option of posterior (did you mean 'decay'?)" in text
    assert "--set floor: 2 (allowed: a number from 0, under 1)" in text
    assert "--set prior: (1,) (allowed: 2 numbers" in text
    text = refused(ConfigError, [place.a, place.b], out, "mean-logits", decay=0.9)
    assert text == "--set decay: is no option of mean-logits (it has: no options)"
    text = refused(ConfigError, [place.a], out)
    assert text == ("experts: 1 is too few (name two or more stages, runs or Hugging Face folders)")


def test_the_folder_must_be_new_or_empty(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    out.mkdir()
    (out / "mine.txt").write_text("keep")
    text = refused(ConfigError, [place.a, place.b], out)
    assert text == f"--out: {out} is not empty (name a new folder)"
    (out / "mine.txt").unlink()
    nacre.compose([place.a, place.b], out)
    assert (out / "config.json").exists()


def test_an_expert_is_named_once(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    text = refused(ConfigError, [place.other, place.root / "b" / ".." / "other"], out)
    assert text == (
        f"experts: {place.other} and {place.other} are the same expert (name each expert once)"
    )
    shutil.copytree(place.a, tmp_path / "copy")
    text = refused(ConfigError, [place.a, tmp_path / "copy"], out)
    assert f"{place.a} and {tmp_path / 'copy'} are the same expert" in text
    text = refused(ConfigError, [place.a, place.b], out, names=["x", "x"])
    assert text == "--name: 'x' is there twice (names must differ)"
    text = refused(ConfigError, [place.a, place.b], out, names=["../x"])
    assert "--name: 1 names for 2 experts (give one for each, in order, or none)" in text
    assert "--name: '../x' cannot be the name of a folder (use letters, digits, - and _)" in text
    text = refused(ConfigError, [place.a, place.b], out, names=["x" * 256, "y"])
    assert "cannot be the name of a folder" in text


def test_folders_that_are_no_experts(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    assert refused(CheckpointError, [place.a, tmp_path / "none"], out).endswith("no such folder")
    nacre.compose([place.a, place.other], tmp_path / "two")
    text = refused(ConfigError, [place.b, tmp_path / "two"], out)
    assert text == (
        f"experts: {tmp_path / 'two'} is a composition itself "
        "(name its experts instead, or use --add)"
    )
    (place.other / "model.safetensors").unlink()
    text = refused(CheckpointError, [place.a, place.other], out)
    assert text == (
        f"{place.other}: holds no weights in safetensors; save it again with safe serialization"
    )


def test_tokenizers_without_a_definition_must_agree_too(tmp_path: Path) -> None:
    for name in ("a", "b"):
        config = GPT2Config(
            vocab_size=4, n_embd=8, n_head=2, n_layer=1, bos_token_id=0, eos_token_id=0
        )
        config.save_pretrained(tmp_path / name)
        (tmp_path / name / "model.safetensors").touch()
        ids = {"<|endoftext|>": 0, name: 1, "c": 2, f"{name}c": 3}
        (tmp_path / name / "vocab.json").write_text(json.dumps(ids))
        (tmp_path / name / "merges.txt").write_text(f"#version: 0.2\n{name} c\n")
    a, b = tmp_path / "a", tmp_path / "b"
    with pytest.raises(FingerprintError) as caught:
        nacre.compose([a, b], tmp_path / "out")
    assert f"the tokenizer of {b} does not match" in str(caught.value)
    shutil.copy(a / "vocab.json", b)
    shutil.copy(a / "merges.txt", b)
    first, second = read_experts([a, b], None)
    assert first.tokenizer == second.tokenizer == tokenizers.fingerprint(tokenizers.load(a))


def test_tokenizers_must_agree_with_each_other_and_with_the_record(
    place: Place, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    tokenizer = tokenizers.load(place.other)
    tokenizer.eos_token = "a"
    tokenizer.save_pretrained(place.other)
    mine, theirs = (tokenizers.fingerprint(tokenizers.load(p)) for p in (place.a, place.other))
    spoil_weights(place)
    text = refused(FingerprintError, [place.a, place.other], out)
    assert text == (
        f"the tokenizer of {place.other} does not match: expected {mine[:12]} ({place.a}), found "
        f"{theirs[:12]} (experts need one vocabulary in one order: grow both with "
        f"--tokenizer {place.a})"
    )
    tokenizer.save_pretrained(place.a)
    text = refused(FingerprintError, [place.a, place.other], out)
    assert text == (
        f"the tokenizer in {place.a} does not match: expected {mine[:12]} (stage.json), found "
        f"{theirs[:12]} (restore the tokenizer's files in {place.a})"
    )


def test_sizes_and_special_tokens_must_agree(place: Place, tmp_path: Path) -> None:
    config = AutoConfig.from_pretrained(place.a)
    edit_json(place.other / "config.json", vocab_size=600, eos_token_id=7)
    spoil_weights(place)
    text = refused(ConfigError, [place.a, place.other], tmp_path / "out")
    fix = "(experts need one vocabulary: mend the config.json that is wrong)"
    assert f"vocab_size: {config.vocab_size} in {place.a}, 600 in {place.other} {fix}" in text
    assert f"eos_token_id: {config.eos_token_id} in {place.a}, 7 in {place.other} {fix}" in text


def test_a_config_without_a_context(place: Place, tmp_path: Path) -> None:
    agreed = AutoConfig.from_pretrained(place.a)
    same = {key: getattr(agreed, key) for key in ("vocab_size", "eos_token_id", "pad_token_id")}
    text = json.dumps({"model_type": "bloom", "hidden_size": 32, "n_layer": 1, **same})
    (place.other / "config.json").write_text(text)
    text = refused(ConfigError, [place.a, place.other], tmp_path / "out")
    assert text == (
        f"max_position_embeddings: the config.json of {place.other} does not say it (add it there)"
    )


def test_a_refusal_is_quick_and_reads_no_weights(place: Place, tmp_path: Path) -> None:
    spoil_weights(place)
    nacre.compose([place.a, place.b, place.other], tmp_path / "fits")
    edit_json(place.other / "config.json", vocab_size=600)
    refused(ConfigError, [place.a, place.other], tmp_path / "out")
    begin = time.process_time()
    refused(ConfigError, [place.a, place.other], tmp_path / "out")
    assert time.process_time() - begin < 1


# --- by reference ---


def experts_alone(paths: list[Path]) -> list[torch.Tensor]:
    models = [checkpoint.load_model(checkpoint.newest(path)).eval() for path in paths]
    with torch.no_grad():
        return [model(input_ids=IDS).logits for model in models]


def test_a_composition_by_reference_loads_and_mixes(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "deep" / "out"
    record = nacre.compose([place.a, place.b, place.other], out, "mean-logits")
    model = nacre.load_composition(out)
    alone = experts_alone([place.a, place.b, place.other])
    torch.testing.assert_close(model(IDS).logits, sum(alone) / 3, rtol=0, atol=1e-6)
    assert model.expert_names == ["a", "b", "other"]
    assert not list(out.rglob("*.safetensors")), "weights stay where they are"
    assert [expert["path"] for expert in model.config.experts] == [
        "../../experts/a/stages/02", "../../experts/b/stages/01", "../../experts/other",
    ]  # fmt: skip
    assert record["experts"][2]["fingerprint"] is None
    assert record == json.loads((out / "composition.json").read_text())
    known = tokenizers.fingerprint(tokenizers.load(out))
    assert known == record["tokenizer"] == tokenizers.fingerprint(tokenizers.load(place.a))
    eos = AutoConfig.from_pretrained(place.a).eos_token_id
    assert model.generation_config.eos_token_id == model.config.eos_token_id == eos
    shutil.move(tmp_path, moved := tmp_path.with_name(f"{tmp_path.name}-moved"))
    auto = AutoModelForCausalLM.from_pretrained(moved / "deep" / "out")
    assert isinstance(auto, ComposedForCausalLM)
    assert torch.equal(auto(IDS).logits, model(IDS).logits)
    shutil.move(moved, tmp_path)


def test_contexts_and_substrates_may_differ_and_are_said(place: Place, tmp_path: Path) -> None:
    record = nacre.compose([place.a, place.other], tmp_path / "out")
    assert record["context"] == 24
    contexts, substrates = record["notes"]
    assert contexts == "contexts differ (a 32, other 24); the smallest one holds"
    assert substrates.startswith("substrates differ (a ")
    assert record["mix"] == {"name": "fixed-share", "switch": 0.005}


def test_shared_blocks_are_counted_and_held_once(place: Place, tmp_path: Path) -> None:
    record = nacre.compose([place.a, place.b, place.other], tmp_path / "out")
    model = nacre.load_composition(tmp_path / "out")
    (shared,) = record["shared"]
    assert shared["experts"] == ["a", "b"]
    assert shared["blocks"] == [0, 1]
    counts = stock.count_parameters(checkpoint.load_config(place.a))
    assert shared["parameters_saved"] == counts.block + counts.embedding
    assert record["parameters"] == sum(p.numel() for p in model.parameters())
    assert model.parts[0].blocks[0] is model.parts[1].blocks[0]
    assert model.parts[0].blocks[1] is not model.parts[1].blocks[1]
    said = f"block 0 shared by a, b: run once, {shared['parameters_saved']:,} parameters fewer"
    assert said in composition.summary(record)
    assert f"- {said}\n" in (tmp_path / "out" / "README.md").read_text()


def test_blocks_of_equal_weights_that_compute_differently_are_not_shared(
    place: Place, tmp_path: Path
) -> None:
    edit_json(place.a / "config.json", rms_norm_eps=0.5)
    assert nacre.compose([place.a, place.b], tmp_path / "out")["shared"] == []


def test_parts_are_those_of_decoders_that_are_blocks_on_a_table(pico: Build) -> None:
    parts = {}
    for family in ("llama", "gpt_neox", "gpt2"):
        model = pico(family)
        hashes = {name: ledger.tensor_hash(tensor) for name, tensor in model.state_dict().items()}
        record = {"frozen": {}, "weights": hashes}
        parts[family] = Expert("x", Path("x"), model.config, record, "").layout.parts
        some = {"frozen": {}, "weights": dict(list(hashes.items())[:-4])}
        assert Expert("x", Path("x"), model.config, some, "").layout.parts == ()
    assert len(set(parts["llama"])) == 3
    assert len(set(parts["gpt_neox"])) == 3
    assert not set(parts["llama"]) & set(parts["gpt_neox"])
    assert parts["gpt2"] == (), "learned positions"


def test_an_expert_that_changed_or_went_is_refused_before_its_weights(
    place: Place, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    nacre.compose([place.a, place.b], out)
    spoil_weights(place)
    with pytest.raises(CheckpointError, match="cannot be loaded"):
        nacre.load_composition(out)
    recorded = files.read_record(place.a)["fingerprint"]
    edit_json(place.a / "stage.json", fingerprint="f" * 64)
    for load in (nacre.load_composition, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(FingerprintError) as caught:
            load(out)
        assert str(caught.value) == (
            f"expert 'a' of {out} does not match: expected {recorded[:12]}, found ffffffffffff "
            f"(it was changed after composing: restore {out / '../experts/a/stages/02'}, "
            "or compose again)"
        )
    shutil.rmtree(place.a)
    with pytest.raises(CheckpointError, match=r"expert 'a' is not in .*; move it back, or compose"):
        nacre.load_composition(out)
    with pytest.raises(CheckpointError, match=r"holds no composition \(composition\.json is miss"):
        nacre.load_composition(place.b)


def test_a_composition_without_its_record_is_refused(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([place.a, place.b], out)
    (out / "composition.json").unlink()
    for load in (nacre.load_composition, AutoModelForCausalLM.from_pretrained):
        with pytest.raises(CheckpointError, match=r"composition\.json is missing"):
            load(out)


@pytest.mark.parametrize("rule", RULES)
def test_every_rule_is_saved_loaded_and_described(rule: str, grown: Place, tmp_path: Path) -> None:
    options: dict[str, Any] = {"weights": [1, 3]} if rule == "weighted" else {}
    if rule in TRAINED:
        sources = (str(grown.root / "text.txt"),)
        options["tuning"] = composition.Tuning(
            sources=sources, tokens=512, batch_tokens=256, validation_tokens=256
        )
    nacre.compose([grown.a, grown.other], tmp_path / "out", rule, **options)
    config = AutoConfig.from_pretrained(tmp_path / "out")
    assert config.mix["name"] == rule
    card = (tmp_path / "out" / "README.md").read_text()
    assert FORMULAS[rule] in card
    assert files.read_record(grown.a)["parent"][:16] in card


def test_names_are_those_of_the_runs(place: Place, tmp_path: Path) -> None:
    shutil.copytree(place.other, tmp_path / "else" / "other")
    record = nacre.compose([place.other, place.b, tmp_path / "else" / "other"], tmp_path / "out")
    names = [expert["name"] for expert in record["experts"]]
    assert names == ["other-1", "b", "other-2"]


# --- bundles ---

PROGRAM = (
    WITHOUT_NACRE
    + """
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)("Once").input_ids
ids = torch.arange(40, 52)[None]
generated = model.generate(ids, max_new_tokens=5, do_sample=False)
save_file({"logits": model(ids).logits, "generated": generated}, sys.argv[2])
assert not any(name.partition(".")[0] == "nacre" for name in sys.modules)
"""
)


def test_a_bundle_loads_where_nacre_is_not_installed(place: Place, tmp_path: Path) -> None:
    out, found = tmp_path / "out", tmp_path / "found.safetensors"
    nacre.compose([place.a, place.b, place.other], out, bundle=True)
    expected = nacre.load_composition(out)
    shutil.rmtree(place.root)
    code = tmp_path / "modules"
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "HF_MODULES_CACHE": str(code)}
    command = [sys.executable, "-c", PROGRAM, str(out), str(found)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    assert done.returncode == 0, done.stderr
    tensors = load_file(found)
    torch.testing.assert_close(tensors["logits"], expected(IDS).logits, rtol=0, atol=1e-5)
    generated = expected.generate(IDS, max_new_tokens=5, do_sample=False)
    assert torch.equal(tensors["generated"], generated)


def test_a_bundle_links_weights_and_holds_shared_shards_once(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([place.a, place.b], out, bundle=True)
    a, b = out / "experts" / "a", out / "experts" / "b"
    assert (a / "head.safetensors").samefile(place.a / "head.safetensors")
    assert not (place.b / "stages/01/blocks-01.safetensors").samefile(a / "blocks-01.safetensors")
    for shared in ("substrate.safetensors", "blocks-01.safetensors"):
        assert (a / shared).samefile(b / shared)
    assert not (a / "head.safetensors").samefile(b / "head.safetensors")
    assert not (a / "config.json").samefile(place.a / "config.json")


def test_on_another_file_system_shared_shards_are_copied_once(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    link = os.link

    def link_here(source: Path, target: Path) -> None:
        if not Path(source).is_relative_to(tmp_path / ".out.partial"):
            raise OSError(errno.EXDEV, "another file system")
        link(source, target)

    monkeypatch.setattr(os, "link", link_here)
    nacre.compose([place.a, place.b], out := tmp_path / "out", bundle=True)
    a, b = out / "experts" / "a", out / "experts" / "b"
    assert (a / "blocks-01.safetensors").samefile(b / "blocks-01.safetensors")
    assert not (a / "blocks-01.safetensors").samefile(place.a / "blocks-01.safetensors")


def test_what_fails_half_way_leaves_nothing_behind(
    place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nacre.compose([place.a, place.b], tmp_path / "old", bundle=True)
    before = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
    link = os.link

    def full(source: Path, target: Path) -> None:
        if Path(target).parent.name == "other":
            raise OSError(errno.ENOSPC, "No space left on device")
        link(source, target)

    def no_copy(source: Path, target: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "link", full)
    monkeypatch.setattr(shutil, "copy2", no_copy)
    with pytest.raises(OSError, match="No space left"):
        nacre.compose([place.a, place.other], tmp_path / "new", bundle=True)
    with pytest.raises(OSError, match="No space left"):
        nacre.add_expert(place.other, tmp_path / "old")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts", "old"]
    after = {path: path.read_bytes() for path in (tmp_path / "old").rglob("*") if path.is_file()}
    assert after == before


# --- adding and removing ---


@pytest.mark.parametrize("bundle", [False, True])
def test_an_added_expert_can_be_removed_again(bundle: bool, place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    before = nacre.compose([place.a, place.b], out, "posterior", bundle=bundle, decay=0.5)
    logits = nacre.load_composition(out)(IDS).logits
    record = nacre.add_expert(place.other, out, "third")
    assert [expert["name"] for expert in record["experts"]] == ["a", "b", "third"]
    assert record["mix"]["decay"] == 0.5
    assert record["bundled"] == bundle
    assert (out / "experts" / "third").exists() == bundle
    three = nacre.load_composition(out)
    assert three.expert_names == ["a", "b", "third"]
    assert not torch.equal(three(IDS).logits, logits)
    assert nacre.remove_expert("third", out) == before
    assert torch.equal(nacre.load_composition(out)(IDS).logits, logits)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["experts", "out"]


def test_an_expert_that_is_gone_can_be_removed(place: Place, tmp_path: Path) -> None:
    nacre.compose([place.a, place.b, place.other], tmp_path / "out")
    shutil.rmtree(place.b)
    nacre.remove_expert("b", tmp_path / "out")
    assert nacre.load_composition(tmp_path / "out").expert_names == ["a", "other"]


def test_numbers_for_each_expert_are_dropped_with_a_note(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([place.a, place.b], out, "weighted", weights=[1, 3])
    record = nacre.add_expert(place.other, out)
    assert record["mix"]["weights"] == [1.0, 1.0, 1.0]
    assert "weights had a number for each expert; now all count alike" in record["notes"]
    nacre.compose([place.a, place.b, place.other], tmp_path / "k", "top-k", k=3, prior=[1, 2, 3])
    record = nacre.remove_expert("a", tmp_path / "k")
    assert record["mix"]["k"] == 2
    assert "prior" not in record["mix"]
    assert "k was 3; there are 2 experts" in record["notes"]


def test_a_record_may_say_that_nothing_was_trained(place: Place, tmp_path: Path) -> None:
    nacre.compose([place.a, place.b], tmp_path / "out")
    edit_json(tmp_path / "out" / "composition.json", trained=None)
    record = nacre.add_expert(place.other, tmp_path / "out")
    assert [expert["name"] for expert in record["experts"]] == ["a", "b", "other"]


def test_a_refused_change_leaves_the_composition_as_it_was(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([place.a, place.b], out)
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    with pytest.raises(ConfigError, match="would be left with one expert"):
        nacre.remove_expert("a", out)
    with pytest.raises(ConfigError, match=r"has no expert 'aa' \(did you mean 'a'\?\)"):
        nacre.remove_expert("aa", out)
    with pytest.raises(ConfigError, match="are the same expert"):
        nacre.add_expert(place.a, out, "again")
    with pytest.raises(ConfigError, match="'a' is there twice"):
        nacre.add_expert(place.other, out, "a")
    edit_json(place.other / "config.json", vocab_size=600)
    with pytest.raises(ConfigError, match="vocab_size: "):
        nacre.add_expert(place.other, out)
    with pytest.raises(CheckpointError, match=r"holds no composition .*; name the folder"):
        nacre.add_expert(place.other, place.a)
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    (out / "composition.json").write_text("{}")
    with pytest.raises(CheckpointError, match=r"composition\.json: damaged: lacks 'mix'"):
        nacre.add_expert(place.other, out)


# --- the command line and traces ---


def test_compose_add_and_remove_from_the_command_line(
    command: Command, place: Place, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    code, printed, said = command(
        "compose", place.a, place.b, "--out", out, "--mix", "top-k", "--set", "k=2",
        "--name", "left", "--name", "right",
    )  # fmt: skip
    assert code == 0, said
    assert printed == ""
    assert "left, right: mixed by top-k (decay 0.9, floor 0.0, k 2)" in said
    assert "block 0 shared by left, right: run once" in said
    code, printed, _ = command("compose", "--add", place.other, out, "--json")
    assert code == 0
    record = json.loads(printed)
    assert [expert["name"] for expert in record["experts"]] == ["left", "right", "other"]
    assert command("compose", "--remove", "left", out)[0] == 0
    assert nacre.load_composition(out).expert_names == ["right", "other"]


def test_options_of_the_command_that_do_not_go_together(
    command: Command, place: Place, tmp_path: Path
) -> None:
    code, _, said = command("compose", place.a, place.b, "--add", place.other, "--mix", "entropy")
    assert code == 2
    assert "--mix: does not go with --add or --remove (compose anew for that)" in said
    assert "--add, --remove: name one composition (its folder)" in said
    code, _, said = command("compose", place.a, place.b)
    assert code == 2
    assert "--out: where to? (name a new folder)" in said
    code, _, said = command("compose", place.a, place.b, "--out", tmp_path / "o", "--set", "out=3")
    assert code == 2
    assert "--set out: is no option of fixed-share" in said


def test_a_composition_generates_as_any_model(place: Place, tmp_path: Path) -> None:
    out = tmp_path / "out"
    nacre.compose([place.a, place.b], out)
    greedy = generation.Sampling(max_new_tokens=6, temperature=0)
    text = "".join(generation.generate(out, "Once", greedy))
    tokenizer = AutoTokenizer.from_pretrained(out)
    ids = tokenizer("Once", return_tensors="pt").input_ids
    with torch.no_grad():
        model = nacre.load_composition(out)
        for _ in range(6):
            ids = torch.cat([ids, model(ids).logits[:, -1:].argmax(-1)], 1)
    assert tokenizer.decode(ids[0], skip_special_tokens=True) == "Once" + text


def test_a_trace_says_who_carried_each_token(
    command: Command, place: Place, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    nacre.compose([place.a, place.other], out, "weighted", weights=[1, 3])
    code, printed, _ = command(
        "generate", out, "Once", "--weights-trace", "--max-new-tokens", "5", "--json"
    )
    assert code == 0
    shown = json.loads(printed)
    assert len(shown["trace"]) == 5
    assert "".join(entry["text"] for entry in shown["trace"]) == shown["text"]
    for entry in shown["trace"]:
        assert entry["weights"] == pytest.approx({"a": 0.25, "other": 0.75})
    again = ("generate", out, "Once", "--weights-trace", "--max-new-tokens", "5")
    assert json.loads(command(*again)[1]) == shown, "a pipe gets JSON"
    monkeypatch.setenv("FORCE_COLOR", "1")
    code, printed, _ = command(*again)
    assert code == 0
    assert printed.startswith("Once\x1b[")
    assert "\x1b[36ma 25%" in printed
    assert "\x1b[35mother 75%" in printed
    monkeypatch.delenv("FORCE_COLOR")
    painted = generation.painted("Once", shown["trace"])
    assert {str(span.style) for span in painted.spans[:-2]} == {generation.COLORS[1]}
    code, _, said = command("generate", place.a, "Once", "--weights-trace")
    assert code == 2
    assert "is no composition (make one with `nacre compose`)" in said
    code, _, said = command("generate", out, "Once", "--weights-trace", "--depths")
    assert code == 2
    assert "--weights-trace: does not go with --depths (leave one of them out)" in said


def test_a_trace_follows_the_posterior(place: Place, tmp_path: Path) -> None:
    nacre.compose([place.a, place.other], tmp_path / "out", "posterior", decay=1.0)
    sampling = generation.Sampling(max_new_tokens=4, seed=2)
    traced = generation.trace(tmp_path / "out", "It was the best", sampling)
    tokenizer = tokenizers.load(tmp_path / "out")
    prompt = tokenizer("It was the best").input_ids
    new = tokenizer.convert_tokens_to_ids([entry["token"] for entry in traced])
    ids = torch.tensor([[*prompt, *new]])
    scores = []
    for path in (place.a, place.other):
        with torch.no_grad():
            log_p = checkpoint.load_model(path).eval()(input_ids=ids).logits.log_softmax(-1)
        scores.append(log_p[:, :-1].gather(-1, ids[:, 1:, None])[0, :, 0].double().cumsum(0))
    for index, entry in enumerate(traced):
        read = len(prompt) + index - 2
        shares = torch.stack([scores[0][read], scores[1][read]]).softmax(0)
        assert entry["weights"]["a"] == pytest.approx(shares[0].item(), abs=1e-5)


def test_an_abandoned_generation_ends(grown: Place, monkeypatch: pytest.MonkeyPatch) -> None:
    load: Any = composition.load_on_device
    steps: list[float] = []

    def wait(*_: Any) -> None:
        steps.append(time.time())
        time.sleep(0.1)

    def slow(folder: Path) -> Any:
        model = load(folder)
        model.register_forward_pre_hook(wait)
        return model

    monkeypatch.setattr(composition, "load_on_device", slow)
    before = threading.active_count()
    stream: Any = nacre.generate(grown.a, "Once", nacre.Sampling(max_new_tokens=20))
    next(stream)
    assert threading.active_count() == before + 1
    stream.close()
    assert threading.active_count() == before
    assert len(steps) < 20


def test_text_of_a_character_in_several_tokens_comes_with_its_last(grown: Place) -> None:
    tokenizer = tokenizers.load(grown.a)
    ids = tokenizer("a龍b").input_ids
    pieces = list(generation.pieces(tokenizer, ids))
    assert "".join(pieces) == "a龍b"
    assert pieces == ["a", "", "", "龍", "b"]
    known: list[str] = []
    for end in range(1, len(ids) + 1):  # as it is drawn, token by token
        known = [*known[:-1], *generation.pieces(tokenizer, ids[:end], known[:-1])]
        assert known == list(generation.pieces(tokenizer, ids[:end]))
