"""What a plan will cost, before it runs: parameters, FLOPs, memory and disk, per stage.

Parameters are counted on the real model class without allocating it. FLOPs follow the usual count
(2 per weight and token forward, 4 backward, attention 4 T D a layer forward). Memory and disk are
estimates; what they count is said at each line.
"""

from __future__ import annotations

from dataclasses import dataclass

from transformers import PreTrainedConfig

from nacre.growth.cache import record_bytes
from nacre.growth.plan import Plan
from nacre.models import stock
from nacre.substrate import code_bits

FP32, BF16, EIGHT_BITS = 4, 2, 1
ADAM_STATES = 2
# Kept per token and block for the backward pass, in units of the width (block input, norms, q, k,
# v, attention output) and of the MLP's width; fp32 copies of the logits alive at once, and of how
# many tokens (the head's loss goes through its tokens in parts); and what the process holds anyway.
KEPT_WIDTHS = 10
KEPT_MLP = 4
LOGIT_COPIES = 2
LOGIT_TOKENS = 2048
PROCESS_BYTES = 400_000_000


@dataclass(frozen=True)
class StageCost:
    """The predicted cost of one stage. Bytes are estimates, counts are exact.

    The trunk is `trunk_depth` blocks, of which `trunk_run` run for a token (fewer over a cache
    below); `frozen_bytes` of it and the input table are in memory.
    """

    stage: int
    depth: int
    new_blocks: int
    block_parameters: int
    active_parameters: int
    total_parameters: int
    tokens: int
    flops_per_token: float
    trunk_depth: int
    trunk_run: int
    trunk_flops_per_token: float
    frozen_bytes: int
    memory_bytes: int
    disk_bytes: int
    cache_bytes: int

    @property
    def flops(self) -> float:
        """FLOPs of the whole stage."""
        return self.flops_per_token * self.tokens


def model_config(plan: Plan, vocabulary: int, depth: int) -> PreTrainedConfig:
    """Return the stock configuration of a plan's model at some depth."""
    shape = plan.model
    build = stock.FAMILIES[shape.family]
    return build(
        vocabulary=vocabulary,
        width=shape.width,
        heads=shape.head_count,
        mlp=shape.mlp_width,
        context=shape.context,
        depth=depth,
    )


def estimate(
    plan: Plan, vocabulary: int | None = None, base: PreTrainedConfig | None = None
) -> list[StageCost]:
    """Return the predicted cost of each stage.

    `vocabulary` is the tokenizer's size if it is known, else the plan's `tokenizer.size`. `base` is
    the configuration of the checkpoint that the plan grows, if it starts from one.
    """
    vocabulary = vocabulary or plan.tokenizer.size
    config = model_config(plan, vocabulary, depth=1) if base is None else base.get_text_config()
    counts = stock.count_parameters(config)
    start = 0 if base is None else config.num_hidden_layers
    return [_stage_cost(plan, index, config, counts, start) for index in range(len(plan.stages))]


def substrate_parameters(plan: Plan, vocabulary: int, width: int) -> int:
    """Return the numbers a substrate holds: V x bits for a code, V x width otherwise.

    A code is counted at its own width, as in arXiv 2507.07129; the checkpoint holds it lifted.
    """
    if plan.substrate.kind == "code" and plan.start_from is None:
        return vocabulary * code_bits(plan.substrate.bits, vocabulary, width)
    return vocabulary * width


def _stage_cost(
    plan: Plan, index: int, config: PreTrainedConfig, counts: stock.Counts, start: int
) -> StageCost:
    stage, training = plan.stages[index], plan.training
    width, vocabulary = config.hidden_size, config.vocab_size
    mlp = getattr(config, "intermediate_size", None) or 4 * width
    added = sum(earlier.add_blocks for earlier in plan.stages[:index])
    below = start + added
    depth = below + stage.add_blocks
    weights_below = (counts.blocks if start else 0) + added * counts.block
    block = weights_below / max(below, 1)  # of those below, in the mean
    trunk = stage.trunk_depth(below)
    trained_below = {*stage.reopened, *range(below - stage.under, below)} & {*range(below)}
    again = below if stage.train == "all" else len(trained_below)
    trained = stage.add_blocks * counts.block + round(again * block)
    passed = below - trunk - again  # frozen, but gradients pass through them
    outer = counts.norm + counts.head
    stored = counts.embedding
    substrate = substrate_parameters(plan, vocabulary, width) if not start else stored

    trunk_weights = round(trunk * block)
    cached = uses_cache(plan, index) and trunk > 0
    lora = 0
    if stage.lora is not None:
        adapters = (counts.adapters if start else 0) + added * counts.adapter
        lora = stage.lora.rank * round(adapters * trunk / max(below, 1))
    active = trained + outer + lora
    if plan.substrate.kind == "trained" and index == 0 and not start:
        active += substrate
    total = weights_below + stage.add_blocks * counts.block + outer + counts.rest

    micro = training.forward_tokens
    kept_blocks = depth if lora else depth - trunk
    per_block = KEPT_WIDTHS * width + KEPT_MLP * mlp
    kept = kept_blocks * per_block
    if training.gradient_checkpointing:  # one input a block, and one block in full at a time
        kept = kept_blocks * width + min(kept_blocks, 1) * per_block
    still_size = BF16 if training.precision == "bf16" and trunk and not lora else FP32
    trunk_size = EIGHT_BITS if plan.trunk.weights != "auto" and not lora else still_size
    floats = total - trunk_weights + active * (1 + ADAM_STATES)
    frozen = 0 if cached else trunk_weights * trunk_size + stored * still_size
    floats += micro * kept + min(micro, LOGIT_TOKENS) * LOGIT_COPIES * vocabulary

    attention = 4 * plan.model.context * width
    flops = 3 * (2 * (trained + counts.head) + (depth - trunk) * attention)
    flops += 2 * (2 * passed * block)  # backward for their inputs, not for their weights
    run = _trunk_blocks_run(plan, index, trunk)
    trunk_flops = (2 * trunk_weights / max(trunk, 1) + attention) * run
    flops += trunk_flops
    if lora:
        # Backward: the trunk's activations (in attention twice the forward), and adapters, but not
        # the trunk's weights.
        flops += 2 * trunk_weights + 2 * trunk * attention + 6 * lora

    written = total if lora or index == 0 or trunk < below else trained + outer
    if index == 0:
        written += stored
    return StageCost(
        stage=index + 1,
        depth=depth,
        new_blocks=stage.add_blocks,
        block_parameters=counts.block,
        active_parameters=active,
        total_parameters=total + substrate,
        tokens=stage.tokens,
        flops_per_token=float(flops),
        trunk_depth=trunk,
        trunk_run=run,
        trunk_flops_per_token=float(trunk_flops),
        frozen_bytes=frozen,
        memory_bytes=floats * FP32 + frozen + PROCESS_BYTES,
        disk_bytes=written * FP32,
        cache_bytes=_cache_bytes(plan, index, width) if cached else 0,
    )


def uses_cache(plan: Plan, index: int) -> bool:
    """Tell whether the plan demands a cache for stage `index` (auto may still choose one)."""
    stage = plan.stages[index]
    return stage.lora is None and (stage.trunk or plan.trunk.mode) == "cache"


def _trunk_blocks_run(plan: Plan, index: int, trunk: int) -> int:
    """Return the trunk blocks that run once a token; a cache below spares all but the newest."""
    before = plan.stages[index - 1] if index else None
    if before is None or plan.data.order == "continue" or before.add_blocks == trunk:
        return trunk
    same_text = plan.sources_of(before) == plan.sources_of(plan.stages[index])
    plain = all(stage.train == "crown" and not stage.under for stage in plan.stages[: index + 1])
    chained = plain and uses_cache(plan, index) and uses_cache(plan, index - 1) and same_text
    return before.add_blocks if chained else trunk


def _cache_bytes(plan: Plan, index: int, width: int) -> int:
    """Return the most that a stage's cache takes: its tokens are all different."""
    tokens = plan.stages[index].tokens + plan.training.validation_tokens
    return tokens * output_bytes(plan, width)


def output_bytes(plan: Plan, width: int) -> int:
    """Return the bytes of a trunk's output for one token in a cache."""
    asked = plan.trunk.cache_dtype
    if asked == "auto":
        asked = "bf16" if plan.training.precision == "bf16" else "fp32"
    return record_bytes(1, width, asked)


def state_bytes(cost: StageCost) -> int:
    """Return the size of a saved state: trained weights and two optimizer moments, in fp32."""
    return cost.active_parameters * (1 + ADAM_STATES) * FP32


def disk_needed(costs: list[StageCost]) -> int:
    """Return the bytes of a run at its widest moment: stages, two states, two caches."""
    caches = [cost.cache_bytes for cost in costs]
    widest = max(map(sum, zip(caches, [0, *caches], strict=False)))
    stages = sum(cost.disk_bytes for cost in costs)
    return stages + 2 * max(state_bytes(cost) for cost in costs) + widest
