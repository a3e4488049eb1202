"""Plans on other machines: what an estimate must add up to, and what it must react to."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from conftest import Command

from nacre.errors import ConfigError
from nacre.growth import budget, scaling
from nacre.growth import plan as plans
from nacre.growth.devices import DEVICES, Cluster
from nacre.growth.estimates import Efficiency, Estimate
from nacre.growth.plan import Plan

HALF = Efficiency.of(0.5)
H100 = DEVICES["H100"]


def growth(stages: int = 3, order: str = "continue", **training: Any) -> Plan:
    return plans.parse(
        {
            "tokenizer": {"size": 4096},
            "data": {"order": order},
            "model": {"width": 1024, "context": 256},
            "training": {"batch_tokens": 65_536, "precision": "bf16"} | training,
            "stages": [{"add_blocks": 2, "tokens": "10M"}] * stages,
        }
    )


def estimated(plan: Plan, count: int = 1, **device: float) -> Estimate:
    return scaling.estimate(plan, Cluster(replace(H100, **device), count), HALF)


# --- tokens and end-to-end training ---


def test_tokens_are_shared_out_as_in_the_plan() -> None:
    stages = [{"add_blocks": 1, "tokens": "1M"}, {"add_blocks": 1, "tokens": "2M"}]
    plan = plans.parse({"stages": stages})
    scaled = scaling.scaled(plan, 1_000_000_000_000)
    assert [stage.tokens for stage in scaled.stages] == [333_333_333_333, 666_666_666_667]
    with pytest.raises(ConfigError) as raised:
        scaling.scaled(plan, 12_287)
    assert str(raised.value) == (
        "--tokens: 12,287 leave stage 1 4,095, less than a batch of 4,096 (at least 12,288)"
    )
    scaling.scaled(plan, 12_288)


def test_the_least_number_of_tokens_is_exact() -> None:
    stages = [{"add_blocks": 1, "tokens": n} for n in (4096, 10**18 - 5001)]
    plan = plans.parse({"training": {"batch_tokens": 4096}, "stages": stages})
    least = 10**18 - 905
    assert scaling.scaled(plan, least).stages[0].tokens == 4096
    with pytest.raises(ConfigError, match=f"at least {least:,}"):
        scaling.scaled(plan, least - 1)


@pytest.mark.parametrize(("text", "tokens"), [("1e12", 10**12), ("20B", 2 * 10**10), ("7", 7)])
def test_token_numbers(text: str, tokens: int) -> None:
    assert scaling.parse_tokens(text) == tokens


@pytest.mark.parametrize("text", ["-1", "0", "many", "1e19", ""])
def test_no_token_numbers(text: str) -> None:
    with pytest.raises(ConfigError, match=r"--tokens: .* is no number of tokens"):
        scaling.parse_tokens(text)


def test_end_to_end_is_the_same_model_on_as_many_tokens() -> None:
    plan = growth()
    whole = scaling.end_to_end(plan)
    assert [(s.add_blocks, s.tokens) for s in whole.stages] == [(6, 30_000_000)]
    assert budget.estimate(whole)[0].total_parameters == budget.estimate(plan)[-1].total_parameters


# --- time ---


def test_a_single_device_computes_and_moves_its_optimizer() -> None:
    plan = growth()
    found = estimated(plan)
    run = found.growth["data_parallel"]
    assert list(found.growth) == ["data_parallel"]
    for stage, cost in zip(run.stages, budget.estimate(plan), strict=True):
        compute = cost.flops_per_token * 65_536 / (0.5 * H100.flops)
        moved = 40 * cost.active_parameters / H100.bandwidth
        assert stage.step_seconds == pytest.approx(compute + moved)
        assert stage.seconds == pytest.approx(153 * (compute + moved))
        assert stage.seconds_low == stage.seconds == stage.seconds_high
        assert (stage.sent_bytes, stage.link_seconds, stage.share) == (0, 0, 0)
    assert run.seconds == sum(stage.seconds for stage in run.stages)


def test_many_devices_share_a_batch() -> None:
    plan = growth()
    alone, many = estimated(plan), estimated(plan, 8)
    assert many.device_tokens == alone.device_tokens // 8 == 8192
    ratio = alone.growth["data_parallel"].seconds / many.growth["data_parallel"].seconds
    assert 6 < ratio < 8, "the optimizer is not shared"


@pytest.mark.parametrize(
    ("count", "message"),
    [(512, "not to be shared by 512xH100 (--set training.batch_tokens=131072,"),
     (100, "not to be shared by 100xH100 (--set training.batch_tokens=76800,")],
)  # fmt: skip
def test_devices_that_cannot_share_a_batch_are_refused(count: int, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        estimated(growth(), count)
    assert str(raised.value).startswith("training.batch_tokens: 256 windows of 256 tokens, ")
    assert message in str(raised.value)


def test_micro_batches_are_equal() -> None:
    found = estimated(growth(batch_tokens=96 * 256, micro_batch_tokens=4 * 256), 16)
    assert (found.device_tokens, found.micro_tokens) == (6 * 256, 3 * 256)


def test_the_range_is_that_of_the_efficiency_and_of_overlapping() -> None:
    cluster = Cluster(H100, 16)
    (stage, *_) = scaling.estimate(growth(), cluster, Efficiency.of(None)).growth["fsdp2"].stages
    assert stage.seconds_low < stage.seconds < stage.seconds_high
    (stage, *_) = scaling.estimate(growth(), cluster, HALF).growth["fsdp2"].stages
    assert stage.seconds_low == stage.seconds < stage.seconds_high


@pytest.mark.parametrize("mfu", [0, -0.1, 2, float("nan")])
def test_no_efficiency(mfu: float) -> None:
    with pytest.raises(ConfigError, match=r"--mfu: .* cannot be"):
        Efficiency.of(mfu)


# --- traffic ---


def test_growth_sends_the_gradients_of_its_crown_only() -> None:
    plan = growth()
    found = estimated(plan, 16)
    ring = 2 * 15 / 16 * 4
    active = [cost.active_parameters for cost in budget.estimate(plan)]
    assert len(set(active)) == 1
    sent = [stage.sent_bytes for stage in found.growth["data_parallel"].stages]
    assert sent == pytest.approx([ring * active[0]] * 3), "whatever the depth"
    (whole,) = found.end_to_end["data_parallel"].stages
    assert whole.sent_bytes == pytest.approx(
        ring * budget.estimate(scaling.end_to_end(plan))[0].active_parameters
    )


def test_shards_are_fetched_for_every_micro_batch() -> None:
    once = estimated(growth(), 16).growth["fsdp2"].stages[0]
    often = estimated(growth(micro_batch_tokens=1024), 16).growth["fsdp2"].stages[0]
    assert once.sent_bytes == pytest.approx(15 / 16 * 3 * 4 * once.active_parameters)
    assert often.sent_bytes == 4 * once.sent_bytes


def test_a_slow_link_is_waited_for() -> None:
    fast, slow = (estimated(growth(), 8, link=rate) for rate in (450e9, 1e9))
    for layout in ("data_parallel", "fsdp2"):
        quick, late = fast.growth[layout].stages[1], slow.growth[layout].stages[1]
        assert quick.share == 0 < quick.share_not_overlapped < late.share_not_overlapped < 1
        assert 0.5 < late.share < late.share_not_overlapped
        assert late.link_seconds == pytest.approx(450 * quick.link_seconds)
        assert late.seconds > 2 * quick.seconds
    # Gradients wait for the backward pass of what trains; the trunk's time hides nothing.
    late = slow.growth["data_parallel"].stages
    assert late[0].exposed_seconds == pytest.approx(late[2].exposed_seconds)


# --- memory ---


def test_sharding_saves_the_crowns_state_and_a_trunk_that_does_not_fit() -> None:
    plan = growth()
    roomy = estimated(plan, 16)
    copied, sharded = (roomy.growth[layout].stages[2] for layout in ("data_parallel", "fsdp2"))
    assert copied.memory_bytes > sharded.memory_bytes
    assert (copied.trunk, sharded.trunk) == ("replicated", "replicated")
    assert roomy.growth["fsdp2"].stages[0].trunk == "none"
    tight = estimated(plan, 16, memory=sharded.memory_bytes)
    moved = tight.growth["fsdp2"].stages[2]
    assert moved.trunk == "sharded"
    assert moved.memory_bytes < sharded.memory_bytes
    assert moved.sent_bytes > sharded.sent_bytes
    assert not tight.growth["data_parallel"].fits
    assert any(
        "Too much for a device, data parallel: stage" in line for line in tight.assumptions()
    )


def test_growth_holds_less_than_end_to_end_training() -> None:
    found = estimated(growth(), 8)
    for layout, run in found.growth.items():
        assert run.memory_bytes < found.end_to_end[layout].memory_bytes


# --- caches ---


def test_an_output_that_is_read_once_is_not_worth_storing() -> None:
    found = estimated(growth(), 8, disk=1e15).caches
    assert [(c.stage, c.trunk_depth, c.made_through) for c in found] == [(2, 2, 2), (3, 4, 4)]
    assert {cache.cheaper for cache in found} == {"recompute"}
    assert all(cache.passes_even == pytest.approx(1, rel=1e-2) for cache in found)


def test_a_chain_of_caches_pays_where_the_disk_keeps_up() -> None:
    plan = growth(order="restart")
    fast, slow = (estimated(plan, 8, disk=disk).caches for disk in (1e12, 1e9))
    assert [cache.made_through for cache in fast] == [2, 2]
    assert [cache.cheaper for cache in fast] == ["recompute", "cache"]
    assert {cache.cheaper for cache in slow} == {"recompute"}
    assert slow[0].blocks_even == pytest.approx(1000 * fast[0].blocks_even)
    assert fast[1].disk_bytes == (10_000_000 + plan.training.validation_tokens) * 2 * 1024


def test_reading_takes_as_long_as_running_the_even_number_of_blocks() -> None:
    cache = estimated(growth(), 8).caches[1]
    read = 10_000_000 / 8 * cache.bytes_per_token / H100.disk
    block = cache.recompute_seconds / cache.trunk_depth
    assert cache.blocks_even == pytest.approx(read / block, rel=1e-3)


def test_a_stage_that_reads_a_cache_waits_for_a_slow_disk() -> None:
    stages = [{"add_blocks": 2, "tokens": "10M", "trunk": mode} for mode in ("auto", "cache")]
    plan = growth().model_dump(by_alias=True) | {"stages": stages}
    stage = estimated(plans.parse(plan), 8, disk=1e6).growth["data_parallel"].stages[1]
    assert stage.trunk == "cached"
    assert stage.step_seconds == pytest.approx(8192 * 2 * 1024 / 1e6)


# --- a published run ---


def test_the_gpu_hours_of_llama_2_7b_lie_in_the_range() -> None:
    plan = plans.parse(
        {
            "tokenizer": {"size": 32_000},
            "model": {"width": 4096, "heads": 32, "mlp": 11_008, "context": 4096},
            "training": {"batch_tokens": 4_194_304, "micro_batch_tokens": 4096},
            "stages": [{"add_blocks": 32, "tokens": "2T"}],
        }
    )
    cluster = Cluster(DEVICES["A100"], 512)
    run = scaling.estimate(plan, cluster, Efficiency.of(None)).growth["fsdp2"]
    hours = [s * 512 / 3600 for s in (run.seconds_low, run.seconds, run.seconds_high)]
    assert hours[0] < 184_320 < hours[2], "arXiv 2307.09288, table 2"
    assert hours[1] == pytest.approx(184_320, rel=0.15)


# --- the command ---


def test_the_command_prints_tables_and_names_in_json(command: Command) -> None:
    asked = ("plan", "paper-9x3-glyph", "--devices", "64xH200", "--tokens", "1e12")
    code, out, _ = command(*asked)
    assert code == 0
    for text in ("64xH200, data parallel", "FSDP2", "end to end", "of end-to-end training"):
        assert text in " ".join(out.split())
    _, out, _ = command(*asked, "--mfu", "0.5", "--json")
    found = json.loads(out)["estimate"]
    assert found["tokens"] == 10**12
    assert found["devices"]["name"] == "H200"
    assert found["mfu"] == {"low": 0.5, "middle": 0.5, "high": 0.5}
    for kind in ("growth", "end_to_end"):
        assert set(found[kind]) == {"data_parallel", "fsdp2"}
        total = found[kind]["fsdp2"]["total"]
        assert set(total) == {
            "seconds", "seconds_low", "seconds_high", "memory_bytes", "sent_bytes", "fits", "flops",
        }  # fmt: skip
    assert len(found["growth"]["fsdp2"]["stages"]) == 3
    assert [cache["stage"] for cache in found["caches"]] == [2, 3]
    assert found["assumptions"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--devices", "64xH9000"), "unknown device 'H9000'"),
        (("--devices", "0xH100"), "'0xH100' is none"),
        (("--devices", "64x"), "'64x' names no device"),
        (("--devices", "64xH200"), "8 windows of 32 tokens, not to be shared by 64xH200"),
        (("--devices", "H100", "--mfu", "2"), "--mfu: 2 cannot be"),
        (("--devices", "here", "--mfu", "2"), "--mfu: 2 cannot be"),
        (("--mfu", "0.4"), "--mfu: of which devices?"),
        (("--tokens", "-1"), "--tokens: '-1' is no number of tokens"),
        (("--tokens", "100"), "--tokens: 100 leave stage 1 33"),
        (
            ("--devices", "H100", "--set", "training.precision=fp32"),
            "training.precision: fp32, but what is known of H100 is its rate in bf16",
        ),
    ],
)
def test_one_message_for_a_mistake(
    command: Command, arguments: tuple[str, ...], message: str
) -> None:
    code, out, err = command("plan", "tiny", *arguments)
    assert code == 2
    assert out == ""
    assert message in err
    assert err.count("error:") == 1


def test_this_machine_is_measured(command: Command) -> None:
    code, out, _ = command("plan", "tiny", "--devices", "here", "--json")
    assert code == 0
    found = json.loads(out)["estimate"]
    assert found["devices"]["count"] == 1
    assert found["devices"]["flops"] > found["devices"]["bandwidth"] > found["devices"]["disk"] > 0
    assert 0 < found["mfu"]["middle"] <= 1
    assert list(found["growth"]) == ["data_parallel"]
    run = found["growth"]["data_parallel"]
    assert 0 < run["total"]["seconds"] < 600
    assert run["total"]["memory_bytes"] > found["devices"]["reserved"] > 50_000_000
