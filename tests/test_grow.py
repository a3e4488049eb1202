"""The main job, whole: a tiny growth on real text, and what it must leave behind."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import WITHOUT_NACRE
from safetensors import safe_open

from nacre import tokenizer as tokenizers
from nacre.data import corpus
from nacre.errors import CheckpointError, ConfigError, FingerprintError
from nacre.folders import METRICS
from nacre.growth import budget, ledger
from nacre.growth import plan as plans
from nacre.train import checkpoint, files
from nacre.train.grow import grow
from nacre.train.hooks import gains
from nacre.train.metrics import read_metrics
from nacre.train.observer import Observer
from nacre.train.parts import make_parts

MEASURED = ("tokens_per_second", "peak_memory_bytes")  # of a step: another value every time
PROGRAM = (
    WITHOUT_NACRE
    + """
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1]).eval()
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
ids = tokenizer("def f(x): 水😀", return_tensors="pt")
assert tokenizer.decode(ids.input_ids[0]) == "def f(x): 水😀"
print(repr(model(**ids).logits.double().sum().item()))
"""
)


def records(run: Path) -> list[dict]:
    return [files.read_json(path / files.RECORD) for path in files.stages(run)]


def weights(stage: Path) -> dict[str, torch.Tensor]:
    return checkpoint.load_model(stage).state_dict()


def test_every_stage_lowers_held_out_bits_per_byte(run: Path) -> None:
    bits = [record["validation"]["bits_per_byte"] for record in records(run)]
    assert bits == sorted(bits, reverse=True)
    assert len(set(bits)) == 3
    start = read_metrics(run)[0]["validation"]["bits_per_byte"]
    assert bits[0] < start


def test_record_has_the_promised_names(run: Path) -> None:
    promised = {
        "stage", "depth", "new_blocks", "active_parameters", "total_parameters", "tokens",
        "seconds",
        "tokens_per_second", "peak_memory_bytes", "trunk_mode", "validation", "trainable", "frozen",
        "lora", "parent", "substrate", "tokenizer", "corpus",
    }  # fmt: skip
    for record in records(run):
        assert promised <= record.keys()
        assert record["validation"].keys() == {"loss", "perplexity", "bits_per_byte"}
        assert record["tokens"] == 5120
    assert [record["depth"] for record in records(run)] == [1, 2, 3]


def test_trainable_set_of_each_stage(run: Path) -> None:
    block = [
        "input_layernorm.weight", "mlp.down_proj.weight", "mlp.gate_proj.weight",
        "mlp.up_proj.weight", "post_attention_layernorm.weight", "self_attn.k_proj.weight",
        "self_attn.o_proj.weight", "self_attn.q_proj.weight", "self_attn.v_proj.weight",
    ]  # fmt: skip
    crown = ["lm_head.weight", "model.norm.weight"]
    linear = [name.removesuffix(".weight") for name in block if "norm" not in name]
    adapters = [
        f"model.layers.{index}.{name}.lora_{side}.default.weight"
        for index in range(2)
        for name in linear
        for side in "AB"
    ]
    found = [record["trainable"] for record in records(run)]
    assert found[0] == sorted(crown + [f"model.layers.0.{name}" for name in block])
    assert found[1] == sorted(crown + [f"model.layers.1.{name}" for name in block])
    assert found[2] == sorted(crown + [f"model.layers.2.{name}" for name in block] + adapters)


def test_ledger_names_every_tensor_with_its_hash(run: Path) -> None:
    for path, record in zip(files.stages(run), records(run), strict=True):
        stated = record["frozen"] | record["weights"]
        assert not record["frozen"].keys() & record["weights"].keys()
        assert stated == {n: ledger.tensor_hash(t) for n, t in weights(path).items()}
        assert record["fingerprint"] == ledger.fingerprint(stated)


def test_frozen_tensors_are_bit_identical_across_stages(run: Path) -> None:
    first, second, third = (weights(path) for path in files.stages(run))
    for name in first:
        frozen = name.startswith(("model.layers.0.", "model.embed_tokens."))
        assert torch.equal(first[name], second[name]) == frozen, name
    assert torch.equal(first["model.embed_tokens.weight"], third["model.embed_tokens.weight"])
    assert not torch.equal(
        second["model.layers.0.mlp.up_proj.weight"], third["model.layers.0.mlp.up_proj.weight"]
    ), "the LoRA stage readjusts the trunk"


def test_frozen_shards_are_the_same_file(run: Path) -> None:
    one, two, three = files.stages(run)

    def same(shard: str, a: Path, b: Path) -> bool:
        return (a / shard).samefile(b / shard)

    assert same("substrate.safetensors", one, two)
    assert same("substrate.safetensors", one, three)
    assert same("blocks-01.safetensors", one, two)
    assert not same("blocks-01.safetensors", two, three), "LoRA was merged into it"
    assert not same("head.safetensors", one, two)
    with safe_open(two / "blocks-02.safetensors", "pt") as shard:
        assert all(name.startswith("model.layers.1.") for name in shard.keys())  # noqa: SIM118, not a dict


def test_embedding_is_the_substrate(run: Path) -> None:
    from nacre.substrate import Substrate

    substrate = Substrate.load(run / "substrate")
    rows = weights(files.stages(run)[-1])["model.embed_tokens.weight"]
    assert torch.equal(rows, torch.tensor(substrate.rows))
    assert records(run)[0]["substrate"] == substrate.fingerprint


def test_lora_is_merged_with_a_certificate(run: Path) -> None:
    lora = records(run)[2]["lora"]
    assert lora["rank"] == 4
    assert lora["merge"]["adapters"] == 14
    assert lora["merge"]["largest_logit_difference"] < 1e-4
    assert abs(lora["merge"]["loss_difference"]) < 1e-5
    assert records(run)[0]["lora"] is None


def test_text_that_falls_to_bytes_is_said_once_with_the_fix(tmp_path: Path) -> None:
    class Watch(Observer):
        def __init__(self) -> None:
            self.warnings: list[str] = []

        def warn(self, text: str) -> None:
            self.warnings.append(text)

    english, russian = tmp_path / "en.txt", tmp_path / "ru.txt"
    english.write_text("It was the best of times, it was the worst of times.\n" * 200, "utf-8")
    russian.write_text("Это было лучшее изо всех времён, худшее из времён.\n" * 200, "utf-8")
    for name, texts in {"narrow": [english], "both": [english, russian]}.items():
        read = (document.text for document in corpus.read([str(text) for text in texts]))
        tokenizers.build(read, 512).save_pretrained(tmp_path / name)
    said = {}
    for name in ("narrow", "both"):
        data = {
            "tokenizer": {"path": str(tmp_path / name)},
            "model": {"width": 32, "heads": 2, "context": 32},
            "training": {"batch_tokens": 256},
            "stages": [
                {"add_blocks": 1, "tokens": 512, "sources": [str(english)]},
                {"add_blocks": 1, "tokens": 512, "sources": [str(russian)]},
            ],
        }
        watch = Watch()
        make_parts(plans.parse(data), tmp_path / f"run-{name}", watch)
        said[name] = watch.warnings
    assert said["both"] == []
    (warning,) = said["narrow"]
    assert warning.startswith(f"{russian} takes 1.00 tokens a byte: ")
    assert "nacre tokenizer build --data ONE --data OTHER" in warning
    assert "--tokenizer tokenizer" in warning


def test_lineage(run: Path) -> None:
    one, two, three = records(run)
    assert one["parent"] is None
    assert two["parent"] == one["fingerprint"]
    assert three["parent"] == two["fingerprint"]


def test_stage_loads_where_nacre_is_not_installed(run: Path) -> None:
    stage = files.stages(run)[-1]
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, str(stage)], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    model = checkpoint.load_model(stage).eval()
    ids = tokenizers.load(stage)("def f(x): 水😀", return_tensors="pt")
    with torch.no_grad():
        expected = model(**ids).logits.double().sum().item()
    assert float(done.stdout) == expected


def test_metrics_have_each_step_once(run: Path) -> None:
    lines = read_metrics(run)
    steps = [(line["stage"], line["step"]) for line in lines if "loss" in line]
    assert steps == [(stage, step) for stage in (1, 2, 3) for step in range(1, 21)]
    evaluated = [(line["stage"], line["step"]) for line in lines if "validation" in line]
    assert evaluated == [(stage, step) for stage in (1, 2, 3) for step in (0, 10)]


def test_the_same_plan_gives_the_same_model(plan: plans.Plan, run: Path, tmp_path: Path) -> None:
    grow(plan, tmp_path / "again")
    again = [record["fingerprint"] for record in records(tmp_path / "again")]
    assert again == [record["fingerprint"] for record in records(run)]


class Interrupted(Exception):
    pass


class Interrupt(Observer):
    def __init__(self, stage: int, step: int) -> None:
        self.stage, self.step = stage, step

    def trained(self, step: dict) -> None:
        if (step["stage"], step["step"]) == (self.stage, self.step):
            raise Interrupted


def lines_without_times(out: Path) -> list[dict[str, Any]]:
    return [
        {key: value for key, value in line.items() if key not in MEASURED}
        for line in read_metrics(out)
    ]


@pytest.mark.parametrize(("stage", "step"), [(1, 5), (1, 15), (2, 1), (3, 19)])
def test_an_interrupted_run_resumes_to_the_same_model(
    plan: plans.Plan, run: Path, tmp_path: Path, stage: int, step: int
) -> None:
    with pytest.raises(Interrupted):
        grow(plan, tmp_path / "run", observer=Interrupt(stage, step))
    grow(None, tmp_path / "run", resume=True)
    resumed = [record["fingerprint"] for record in records(tmp_path / "run")]
    assert resumed == [record["fingerprint"] for record in records(run)]
    assert lines_without_times(tmp_path / "run") == lines_without_times(run)
    assert not (tmp_path / "run" / "state").exists()


def test_a_run_that_took_too_much_memory_goes_on_with_less(run: Path, tmp_path: Path) -> None:
    """What the advice says: fewer tokens at once and checkpointing, from the saved state."""
    settings = ["training.precision=fp32"]
    with pytest.raises(Interrupted):
        grow(plans.load("tiny", settings), tmp_path / "run", observer=Interrupt(2, 12))
    settings += ["training.micro_batch_tokens=64", "training.gradient_checkpointing=true"]
    grow(plans.load("tiny", settings), tmp_path / "run", resume=True)
    losses = [
        [line["loss"] for line in read_metrics(out) if "loss" in line]
        for out in (tmp_path / "run", run)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=1e-4)


def test_a_longer_plan_adds_its_stages(plan: plans.Plan, run: Path, tmp_path: Path) -> None:
    shorter = plan.model_copy(update={"stages": plan.stages[:2]})
    grow(shorter, tmp_path / "run")
    grow(plan, tmp_path / "run", resume=True)
    assert [r["fingerprint"] for r in records(tmp_path / "run")] == [
        r["fingerprint"] for r in records(run)
    ]


def test_resuming_with_another_plan_is_refused(plan: plans.Plan, run: Path) -> None:
    other = plans.load("tiny", ["training.precision=fp32", "seed=7"])
    with pytest.raises(FingerprintError, match="first difference: seed was 0, now 7"):
        grow(other, run, resume=True)


def test_the_difference_named_is_one_that_matters(plan: plans.Plan, run: Path) -> None:
    stages = [stage.model_dump() for stage in plan.stages]
    stages[2]["tokens"] = 2560
    other = plans.parse(plan.model_dump() | {"name": "another", "stages": stages})
    with pytest.raises(FingerprintError, match=r"first difference: stages\[2\].tokens was"):
        grow(other, run, resume=True)


def test_damaged_metrics_do_not_stop_a_run(plan: plans.Plan, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        grow(plan, tmp_path / "run", observer=Interrupt(1, 15))
    with (tmp_path / "run" / METRICS).open("ab") as file:
        file.write(b'5\n{"stage": \xff\n')
    grow(None, tmp_path / "run", resume=True)
    assert read_metrics(tmp_path / "run")[-1]["stage"] == 3


def test_growing_from_a_stage_keeps_its_files(plan: plans.Plan, run: Path, tmp_path: Path) -> None:
    base = files.stages(run)[1]
    branch = plans.parse(
        {
            "from": str(base),
            "model": {"context": 32},
            "training": plan.training.model_dump(),
            "stages": [{"add_blocks": 1, "tokens": 512, "init": "zero"}],
        }
    )
    (record,) = grow(branch, tmp_path / "branch")
    stage = files.stages(tmp_path / "branch")[0]
    assert record["depth"] == 3
    assert record["growth"] == [[1, 1], [2, 1], [3, 1]]
    assert record["parent"] == records(run)[1]["fingerprint"]
    assert record["substrate"] == records(run)[1]["substrate"]
    for shard in ("substrate.safetensors", "blocks-01.safetensors", "blocks-02.safetensors"):
        assert (stage / shard).samefile(base / shard)
    assert checkpoint.load_model(stage).config.num_hidden_layers == 3


def test_a_damaged_frozen_tensor_is_noticed(plan: plans.Plan, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    grow(plan.model_copy(update={"stages": plan.stages[:1]}), tmp_path / "run")
    shard = tmp_path / "run" / "stages" / "01" / "blocks-01.safetensors"
    tensors = load_file(shard)
    tensors["model.layers.0.mlp.up_proj.weight"][0, 0] += 1e-6
    save_file(tensors, shard, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="not what its ledger recorded"):
        grow(plan, tmp_path / "run", resume=True)


def test_patience_ends_a_stage(plan: plans.Plan, tmp_path: Path) -> None:
    data = plan.model_dump(mode="json", by_alias=True)
    data["training"] |= {"lr": 1e-9, "evaluate_every": 2}
    data["stages"] = [{"add_blocks": 1, "tokens": 25600, "patience": 1, "lr": 10.0}]
    (record,) = grow(plans.parse(data), tmp_path / "run")
    assert record["tokens"] < 25600


def test_what_new_blocks_lose_at_first_is_no_gain() -> None:
    record = {
        "parent": "x", "plain_flops_per_token": 2.0, "loss_below": 4.0,
        "history": [(0, 5.0), (10, 3.9)],
    }  # fmt: skip
    assert gains(record) == [(0.0, 4.0), (20.0, 3.9)]
    assert gains(record | {"parent": None}) == []
    foreign = record | {"loss_below": None}  # on a checkpoint that nacre did not grow
    assert gains(foreign) == [(0.0, 5.0), (20.0, 3.9)]


def test_blocks_that_a_checkpoint_lacks_are_named_before_any_work(
    plan: plans.Plan, run: Path, tmp_path: Path
) -> None:
    data = plan.model_dump(mode="json", by_alias=True) | {"from": str(run)}
    data["stages"] = [{"add_blocks": 1, "tokens": 512}, {"tokens": 512, "train": {"blocks": "7"}}]
    with pytest.raises(ConfigError) as error:
        grow(plans.parse(data), tmp_path / "out")
    message = "stages[1].train: blocks 7, but those below are 0 to 3 (new blocks train anyway)"
    assert str(error.value) == message
    assert not (tmp_path / "out").exists()


def test_a_stage_follows_its_own_schedule(plan: plans.Plan, tmp_path: Path) -> None:
    data = plan.model_dump(mode="json", by_alias=True)
    data["stages"] = [
        {"add_blocks": 1, "tokens": 2560, "schedule": "constant", "warmup": 0.0, "lr": 1e-3},
        {"add_blocks": 1, "tokens": 2560},
    ]
    grow(plans.parse(data), tmp_path / "run")
    lines = read_metrics(tmp_path / "run")
    rates = [[m["lr"] for m in lines if m["stage"] == n and "lr" in m] for n in (1, 2)]
    assert rates[0] == [1e-3] * 10
    assert rates[1][-1] < max(rates[1]) == plan.training.lr


def test_a_stage_of_budget_auto_ends_itself(plan: plans.Plan, tmp_path: Path) -> None:
    data = plan.model_dump(mode="json", by_alias=True)
    data["training"] |= {"evaluate_every": 5, "save_every": 5}
    data["stages"] = [{"add_blocks": 1, "tokens": 256 * 80, "budget": "auto"}] * 2
    first, second = grow(plans.parse(data), tmp_path / "run")
    for number, record in enumerate((first, second), 1):
        steps = record["tokens"] // 256
        assert 20 * 1.25 <= steps < 80
        trained = [m for m in read_metrics(tmp_path / "run") if "lr" in m]
        assert max(m["step"] for m in trained if m["stage"] == number) == steps
        last = [m["lr"] for m in trained if m["stage"] == number][-steps // 5 :]
        assert last == sorted(last, reverse=True)
        assert last[-1] < 0.3 * last[0], "it still decays"
        assert record["history"][0][0] == 0
    assert second["cursor"]["position"] * 32 == (first["tokens"] + second["tokens"])


@pytest.mark.parametrize("kind", ["code", "random", "trained"])
def test_other_substrates(plan: plans.Plan, tmp_path: Path, kind: str) -> None:
    data = plan.model_dump(mode="json", by_alias=True)
    data["substrate"] = {"kind": kind}
    data["stages"] = [{"add_blocks": 1, "tokens": 512}, {"add_blocks": 1, "tokens": 512}]
    one, two = grow(plans.parse(data), tmp_path / "run")
    assert ("model.embed_tokens.weight" in one["trainable"]) == (kind == "trained")
    assert "model.embed_tokens.weight" in two["frozen"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_stages_that_reopen_blocks_or_grow_in_the_middle(precision: str, tmp_path: Path) -> None:
    stages = [
        {"add_blocks": 2, "tokens": 512},
        {"add_blocks": 1, "under": 1, "tokens": 512, "init": "zero"},
        {"tokens": 512, "train": {"blocks": "2"}},
        {"tokens": 512, "train": "all"},
    ]
    out = tmp_path / "run"
    grow(
        plans.load("tiny", [f"stages={json.dumps(stages)}", f"training.precision={precision}"]), out
    )
    found = records(out)
    assert [record["depth"] for record in found] == [2, 3, 3, 3]
    assert [record["growth"] for record in found] == [[[1, 2]], *[[[1, 1], [2, 2]]] * 3]
    assert [record["train"] for record in found] == ["crown", "crown", "2", "all"]
    moved = [
        {name.split(".")[2] for name in record["trainable"] if ".layers." in name}
        for record in found
    ]
    assert moved == [{"0", "1"}, {"1", "2"}, {"2"}, {"0", "1", "2"}]
    before = weights(out / "stages" / "02")
    after = weights(out / "stages" / "03")
    changed = {name for name in after if not torch.equal(before[name], after[name])}
    assert changed == set(found[2]["trainable"])
    assert all(
        ledger.tensor_hash(tensor) == (record["frozen"] | record["weights"])[name]
        for path, record in zip(files.stages(out), found, strict=True)
        for name, tensor in weights(path).items()
    )
    assert (
        budget.estimate(plans.load(out / "plan.yaml"))[1].active_parameters
        == (found[1]["active_parameters"])
    )


def test_monolithic_training_is_one_stage(tmp_path: Path) -> None:
    mono = plans.parse(
        {
            "tokenizer": {"size": 512},
            "model": {"family": "gpt_neox", "width": 32, "heads": 2, "context": 32},
            "training": {
                "batch_tokens": 256, "micro_batch_tokens": 128, "validation_tokens": 512,
                "gradient_checkpointing": True, "schedule": "cosine",
            },
            "stages": [{"add_blocks": 2, "tokens": 1024}],
        }
    )  # fmt: skip
    (record,) = grow(mono, tmp_path / "run")
    assert record["depth"] == 2
    assert list(record["frozen"]) == ["gpt_neox.embed_in.weight"]
