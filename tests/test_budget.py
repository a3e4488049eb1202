"""What a plan will cost: the papers' accounting to the last parameter; small models' real counts.

The papers' block has a bias on the LM head, the stock class has none: their figures are ours plus
one bias per token.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from conftest import Build, family_config

from nacre.growth import budget, stage
from nacre.growth import plan as plans
from nacre.models import stock
from nacre.train.record import flops

V, D = 65_536, 1024
HEAD_BIASES = V
BLOCK, NORM, HEAD = 12_592_128, 2 * D, V * D


def in_millions(parameters: int) -> str:
    return f"{parameters / 1e6:.1f}M"


def costs(recipe: str) -> list[budget.StageCost]:
    return budget.estimate(plans.load(recipe))


# --- the papers' accounting ---


def test_a_block_of_the_papers_at_1024() -> None:
    assert BLOCK == 12 * D**2 + 9 * D
    assert {cost.block_parameters for cost in costs("paper-9x3-glyph")} == {BLOCK}
    counts = stock.count_parameters(stock.gpt_neox_config(V, D, 32, 4 * D, 1024, 2))
    assert (counts.block, counts.blocks, counts.norm) == (BLOCK, 2 * BLOCK, NORM)
    assert (counts.head, counts.embedding, counts.rest) == (HEAD, V * D, 0)


@pytest.mark.parametrize("arm", ["glyph", "code"])
def test_active_parameters_of_the_constructive_arms(arm: str) -> None:
    active = [cost.active_parameters for cost in costs(f"paper-9x3-{arm}")]
    assert active == [3 * BLOCK + NORM + HEAD] * 3 == [104_887_296] * 3
    assert in_millions(active[0]) == "104.9M"
    assert in_millions(active[0] + HEAD_BIASES) == "105.0M"


@pytest.mark.parametrize("arm", ["glyph", "code"])
def test_active_parameters_of_the_monolithic_arms(arm: str) -> None:
    (cost,) = costs(f"paper-mono-{arm}")
    assert cost.active_parameters == 9 * BLOCK + NORM + HEAD == 180_440_064
    assert in_millions(cost.active_parameters) == "180.4M"
    assert in_millions(cost.active_parameters + HEAD_BIASES) == "180.5M"


def test_active_parameters_with_trained_embeddings() -> None:
    (cost,) = costs("paper-mono-trained")
    assert cost.active_parameters == 9 * BLOCK + NORM + HEAD + V * D == 247_548_928
    assert in_millions(cost.active_parameters) == "247.5M"
    assert in_millions(cost.active_parameters + HEAD_BIASES) == "247.6M"
    grown = [cost.active_parameters for cost in costs("paper-9x3-trained")]
    assert grown == [104_887_296 + V * D, 104_887_296, 104_887_296]


def test_total_parameters_with_the_16_bit_code() -> None:
    nine, sixteen = costs("paper-9x3-code")[-1], costs("paper-16-code")[-1]
    assert nine.total_parameters == 9 * BLOCK + NORM + HEAD + V * 16 == 181_488_640
    assert in_millions(nine.total_parameters) == "181.5M"
    assert in_millions(nine.total_parameters + HEAD_BIASES) == "181.6M"
    assert sixteen.total_parameters == 16 * BLOCK + NORM + HEAD + V * 16 == 269_633_536
    assert in_millions(sixteen.total_parameters) == "269.6M"
    assert in_millions(sixteen.total_parameters + HEAD_BIASES) == "269.7M"


def test_a_stage_of_the_v1_series_adds_its_adapters() -> None:
    width, block = 4096, 12 * 4096**2 + 9 * 4096
    crown = block + 2 * width + 131_072 * width
    adapter = 16 * (4 * width + 2 * width + 5 * width + 5 * width)  # qkv, dense, up, down
    active = [cost.active_parameters for cost in costs("paper-abs-6")]
    assert active == [crown] * 4 + [crown + 4 * adapter, crown + 5 * adapter]


# --- counts equal those of real models ---


def small_plan(family: str, kind: str = "glyph", **parts: Any) -> plans.Plan:
    return plans.parse(
        {
            "tokenizer": {"size": 512},
            "substrate": {"kind": kind},
            "model": {"family": family, "width": 32, "heads": 2, "context": 32},
            "training": {"batch_tokens": 256},
            "stages": [
                {"add_blocks": 2, "tokens": 1024},
                {"add_blocks": 1, "tokens": 1024},
                {"add_blocks": 1, "tokens": 1024, "lora": {"rank": 3}},
                {"tokens": 1024, "lora": {"rank": 5}},
            ],
            **parts,
        }
    )


def active_and_total(model: torch.nn.Module) -> tuple[int, int]:
    active = sum(p.numel() for p in model.parameters() if p.requires_grad)
    return active, sum(p.numel() for p in model.parameters())


def grow(model: Any, plan: plans.Plan, depth: int, train_embedding: bool) -> list[tuple[int, int]]:
    """Grow a real model by a plan without training; return its active and total parameters."""
    counted: list[tuple[int, int]] = []
    for index, step in enumerate(plan.stages):
        if step.add_blocks and (index or depth):
            stage.add_blocks(model, step.add_blocks, "random", seed=0)
        adapted = stage.choose_trainable(
            model, step, depth_below=depth, seed=0, train_embedding=train_embedding and not index
        )
        active, _ = active_and_total(model)
        if adapted is not None:
            stage.merge_lora(adapted, torch.arange(8).reshape(1, 8))
        counted.append((active, active_and_total(model)[1]))
        depth += step.add_blocks
    return counted


@pytest.mark.parametrize("kind", ["glyph", "trained"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_counts_equal_a_real_growth(family: str, kind: str) -> None:
    plan = small_plan(family, kind)
    model = stock.build(budget.model_config(plan, 512, depth=2))
    expected = grow(model, plan, 0, train_embedding=kind == "trained")
    found = budget.estimate(plan)
    assert [(cost.active_parameters, cost.total_parameters) for cost in found] == expected
    assert [cost.depth for cost in found] == [2, 3, 4, 4]
    assert [cost.new_blocks for cost in found] == [2, 1, 1, 0]


@pytest.mark.parametrize("family", ["llama", "gpt2", "qwen3_sliding", "gemma2", "opt"])
def test_counts_equal_a_real_growth_of_a_checkpoint(family: str, pico: Build) -> None:
    parts = {
        "from": "x",
        "substrate": {"kind": "trained"},
    }  # without effect: the checkpoint decides
    plan = small_plan("llama", **parts)
    model = pico(family, depth=3)
    expected = grow(model, plan, 3, train_embedding=False)
    found = budget.estimate(plan, base=family_config(family, 3))
    assert [(cost.active_parameters, cost.total_parameters) for cost in found] == expected
    assert [cost.depth for cost in found] == [5, 6, 7, 7]


def test_the_tokenizer_decides_over_the_plans_size() -> None:
    plan = small_plan("llama")
    less, more = budget.estimate(plan, 500), budget.estimate(plan, 600)
    assert more[0].active_parameters - less[0].active_parameters == 100 * 32
    assert more[0].total_parameters - less[0].total_parameters == 2 * 100 * 32


def test_a_code_counts_its_bits() -> None:
    code = {"kind": "code", "bits": 16}
    cost = budget.estimate(small_plan("llama", substrate=code))[0]
    assert cost.total_parameters == cost.active_parameters + 512 * 16


def test_counting_allocates_nothing() -> None:
    stock.count_parameters(stock.llama_config(131_072, 65_536, 64, 262_144, 128, 1))


# --- FLOPs, memory, disk ---


def test_flops_of_one_stage_are_six_per_weight_and_attention() -> None:
    (cost,) = costs("paper-mono-glyph")
    attention = 3 * 9 * 4 * 1024 * D
    assert cost.flops_per_token == 6 * (9 * BLOCK + HEAD) + attention
    assert cost.flops == cost.flops_per_token * 4.5e9


def test_a_trunk_costs_its_forward_pass_only() -> None:
    flops = [cost.flops_per_token for cost in costs("paper-9x3-glyph")]
    forward = 3 * (2 * BLOCK + 4 * 1024 * D)
    assert [flops[1] - flops[0], flops[2] - flops[1]] == [forward, forward]


def test_a_trunk_under_adapters_costs_its_backward_pass_for_activations_too() -> None:
    plain = small_plan("llama", stages=[{"add_blocks": 2, "tokens": 99_999}] * 2)
    lora = small_plan(
        "llama",
        stages=[
            {"add_blocks": 2, "tokens": 99_999},
            {"add_blocks": 2, "tokens": 99_999, "lora": {"rank": 3}},
        ],
    )
    without, with_lora = budget.estimate(plain)[1], budget.estimate(lora)[1]
    adapters = with_lora.active_parameters - without.active_parameters
    trunk = 2 * (2 * without.block_parameters + 2 * 4 * 32 * 32)
    assert with_lora.flops_per_token - without.flops_per_token == trunk + 6 * adapters


def test_frozen_blocks_above_a_reopened_one_cost_a_backward_pass_for_their_inputs() -> None:
    grow = [{"add_blocks": 2, "tokens": 99_999}] * 2
    again = {"tokens": 99_999, "train": {"blocks": "1-2"}}
    everything = {"tokens": 99_999, "train": "all"}
    part = budget.estimate(small_plan("llama", stages=[*grow, again]))[2]
    whole = budget.estimate(small_plan("llama", stages=[*grow, everything]))[2]
    block, attention = part.block_parameters, 4 * 32 * 32
    assert whole.active_parameters - part.active_parameters == 2 * block
    trunk_saves = 4 * block + 2 * attention  # block 0: forward only
    passed_saves = 2 * block  # block 3: no gradients of its weights
    assert whole.flops_per_token - part.flops_per_token == trunk_saves + passed_saves
    assert part.memory_bytes < whole.memory_bytes


def test_blocks_above_new_ones_count_as_trained() -> None:
    stages = [{"add_blocks": 2, "tokens": 99_999}] * 2
    top = budget.estimate(small_plan("llama", stages=stages))[1]
    stages = [stages[0], stages[1] | {"under": 1}]
    middle = budget.estimate(small_plan("llama", stages=stages))[1]
    assert middle.depth == top.depth == 4
    assert middle.active_parameters - top.active_parameters == top.block_parameters


def test_memory_of_a_stage_grows_with_its_crown_not_its_trunk() -> None:
    first, second, third = costs("paper-9x3-glyph")
    assert second.memory_bytes - first.memory_bytes == 3 * BLOCK * 4
    assert third.memory_bytes - second.memory_bytes == 3 * BLOCK * 4
    (whole,) = costs("paper-mono-glyph")
    assert third.memory_bytes < 0.7 * whole.memory_bytes


def test_a_cached_trunk_is_counted_once_a_window() -> None:
    plain = costs("paper-9x3-glyph")[2]
    tokens, context = 4096, 1024
    whole = plain.flops_per_token * tokens
    trunk = plain.trunk_flops_per_token * tokens
    assert flops(plain, tokens, {"mode": "recompute"}, context) == whole

    def cached(windows: int, from_depth: int) -> float:
        return flops(
            plain, tokens, {"cache": {"windows": windows, "from_depth": from_depth}}, context
        )

    assert cached(windows=4, from_depth=0) == pytest.approx(whole)
    assert cached(windows=1, from_depth=0) == pytest.approx(whole - 0.75 * trunk)
    assert cached(windows=4, from_depth=3) == pytest.approx(whole - 0.5 * trunk)


def test_a_cached_stage_holds_its_crown_and_a_chain_of_caches_runs_new_blocks_only() -> None:
    stages = [{"add_blocks": 2, "tokens": "1M"}] * 4

    def costs_of(mode: str, order: str) -> list[budget.StageCost]:
        data = {"stages": stages, "trunk": {"mode": mode}, "data": {"order": order}}
        return budget.estimate(plans.parse(data))

    run = costs_of("recompute", "restart")
    apart = costs_of("cache", "continue")
    chain = costs_of("cache", "restart")
    assert len({cost.memory_bytes for cost in chain[1:]}) == 1, "whatever the depth"
    assert chain[3].memory_bytes < run[3].memory_bytes
    assert [cost.flops for cost in apart] == [cost.flops for cost in run]
    assert len({cost.flops_per_token for cost in chain[1:]}) == 1
    assert chain[1].flops == run[1].flops < chain[3].flops + 1 < run[3].flops
    assert [cost.cache_bytes for cost in run] == [0] * 4
    held = (1_000_000 + 32_768) * 256 * 4
    assert [cost.cache_bytes for cost in chain] == [0, held, held, held]
    assert budget.disk_needed(chain) == budget.disk_needed(run) + 2 * held


def test_a_trunk_takes_half_the_memory_in_bf16() -> None:
    stages = [{"add_blocks": 2, "tokens": "1M"}] * 2
    full, half = (
        budget.estimate(plans.parse({"stages": stages, "training": {"precision": precision}}))
        for precision in ("fp32", "bf16")
    )
    assert full[0].memory_bytes == half[0].memory_bytes
    trunk = 2 * full[1].block_parameters + 4096 * 256
    assert full[1].memory_bytes - half[1].memory_bytes == 2 * trunk


def test_a_trunk_in_eight_bits_takes_a_quarter_of_the_memory() -> None:
    stages = [{"add_blocks": 2, "tokens": "1M"}, {"add_blocks": 2, "tokens": "1M"}]
    stages += [{"tokens": "1M", "lora": {"rank": 4}}]
    plain, small = (
        budget.estimate(plans.parse({"stages": stages, "trunk": {"weights": weights}}))
        for weights in ("auto", "int8")
    )
    saved = [a.memory_bytes - b.memory_bytes for a, b in zip(plain, small, strict=True)]
    assert saved == [0, 3 * 2 * plain[1].block_parameters, 0]


def test_gradient_checkpointing_and_micro_batches_save_memory() -> None:
    def memory(**training: Any) -> int:
        whole = plans.load("paper-mono-glyph").model_dump(by_alias=True)
        whole["training"] |= training
        return budget.estimate(plans.parse(whole))[0].memory_bytes

    assert memory(gradient_checkpointing=True) < memory()
    assert memory(micro_batch_tokens=8192) < memory() < memory(micro_batch_tokens=32_768)


def test_disk_is_one_shard_a_stage_and_everything_after_lora() -> None:
    plan = small_plan("llama")
    found = budget.estimate(plan)
    block, outer, table = found[0].block_parameters, 32 + 512 * 32, 512 * 32
    assert [cost.disk_bytes // 4 for cost in found] == [
        2 * block + outer + table,
        block + outer,
        4 * block + outer,
        4 * block + outer,
    ]
    widest = max(cost.active_parameters for cost in found)
    assert budget.disk_needed(found) == sum(c.disk_bytes for c in found) + 2 * 3 * 4 * widest


def test_disk_of_a_grown_checkpoint_holds_all_of_it_once(pico: Build) -> None:
    stages = [{"add_blocks": 1, "tokens": 99_999}] * 2
    plan = small_plan("llama", **{"from": "x", "stages": stages})
    first, second = budget.estimate(plan, base=family_config("gpt2", 2))
    assert first.disk_bytes == 4 * first.total_parameters
    assert second.disk_bytes < first.disk_bytes
