"""What a plan takes on other machines: time, memory, traffic, cache; beside end-to-end training.

A model of a run, not a run: FLOPs over what a device reaches, the optimizer over its memory, what
is sent over its link. `docs/scaling.md` says what it leaves out and how far it was off where it
could be checked.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from pydantic import TypeAdapter, ValidationError
from transformers import PreTrainedConfig

from nacre.errors import ConfigError, Problem
from nacre.growth import budget, choice
from nacre.growth.budget import ADAM_STATES, BF16, FP32, PROCESS_BYTES, StageCost, output_bytes
from nacre.growth.devices import Cluster
from nacre.growth.estimates import (
    CacheEstimate,
    Efficiency,
    Estimate,
    Layout,
    Place,
    RunEstimate,
    StageEstimate,
)
from nacre.growth.plan import Count, Plan, Stage

HEADROOM = 0.9
"""The share of a device's memory that a process may plan with; the rest fragments."""
OPTIMIZER_BYTES = 40
"""Moved for each weight that trains: AdamW reads and writes 28, clipping 12."""
STATE_BYTES = FP32 * (2 + ADAM_STATES)
"""Held for each weight that trains: itself, its gradient, two moments."""
BACKWARD = 2 / 3  # of the FLOPs of what trains


def parse_tokens(text: str) -> int:
    """Read `20B`, `1e12` or a plain number. Raises `ConfigError` for anything else."""
    try:
        return TypeAdapter(Count).validate_python(text)
    except ValidationError:
        fix = "e.g. 500M, 20B, 1e12; at most 1e18"
        raise ConfigError(Problem("--tokens", f"{text!r} is no number of tokens", fix)) from None


def scaled(plan: Plan, tokens: int) -> Plan:
    """Return the plan with its stages' tokens in proportion, `tokens` in all.

    Raises `ConfigError` if that leaves a stage less than a batch.
    """
    given = [stage.tokens for stage in plan.stages]
    shares = [tokens * part // sum(given) for part in given]
    shares[-1] = tokens - sum(shares[:-1])
    batch = plan.training.batch_tokens
    if min(shares) < batch:
        number = shares.index(min(shares)) + 1
        message = f"{tokens:,} leave stage {number} {min(shares):,}, less than a batch of {batch:,}"
        least = -(-batch * sum(given) // min(given))
        raise ConfigError(Problem("--tokens", message, f"at least {least:,}"))
    stages = [s.model_copy(update={"tokens": n}) for s, n in zip(plan.stages, shares, strict=True)]
    return plan.model_copy(update={"stages": tuple(stages)})


def end_to_end(plan: Plan) -> Plan:
    """Return the plan that trains the same final model at once, on the same number of tokens."""
    whole = Stage(
        add_blocks=plan.depth, tokens=sum(stage.tokens for stage in plan.stages), train="all"
    )
    return plan.model_copy(update={"stages": (whole,)})


def estimate(
    plan: Plan,
    cluster: Cluster,
    efficiency: Efficiency,
    *,
    base: PreTrainedConfig | None = None,
    precision: Literal["bf16", "fp32"] = "bf16",
) -> Estimate:
    """Return what a plan takes on a cluster, computed in `precision`.

    `base` is the configuration of the checkpoint that the plan grows, if any. Raises `ConfigError`
    if the devices cannot share the windows of a step equally.
    """
    batch = plan.training.batch_tokens
    model = _Model(_on_each(plan, cluster, precision), cluster, efficiency, base, batch)
    whole = _Model(end_to_end(model.plan), cluster, efficiency, base, batch)
    layouts: tuple[Layout, ...] = ("data_parallel",)
    if cluster.count > 1:
        layouts = ("data_parallel", "fsdp2")
    return Estimate(
        cluster=cluster,
        efficiency=efficiency,
        precision=precision,
        tokens=sum(stage.tokens for stage in plan.stages),
        device_tokens=model.tokens,
        micro_tokens=model.micro,
        growth={layout: model.run(layout) for layout in layouts},
        end_to_end={layout: whole.run(layout) for layout in layouts},
        caches=model.caches(),
    )


def _on_each(plan: Plan, cluster: Cluster, precision: str) -> Plan:
    """Return the plan as one device sees it: its part of a batch, in equal micro-batches."""
    training, context, count = plan.training, plan.model.context, cluster.count
    windows = training.batch_tokens // context
    if windows % count:
        message = f"{windows} windows of {context} tokens, not to be shared by {cluster.title}"
        nearest = max(1, round(windows / count)) * count * context
        fix = f"--set training.batch_tokens={nearest}, or another number of devices"
        raise ConfigError(Problem("training.batch_tokens", message, fix))
    share = windows // count
    own = {
        "batch_tokens": share * context,
        "micro_batch_tokens": training.forward_windows(context, count) * context,
        "precision": precision,
    }
    return plan.model_copy(update={"training": training.model_copy(update=own)})


@dataclass(frozen=True)
class _Model:
    """A plan as one device of a cluster sees it; `batch` is a step's tokens on all of them."""

    plan: Plan
    cluster: Cluster
    efficiency: Efficiency
    base: PreTrainedConfig | None
    batch: int

    @property
    def tokens(self) -> int:
        """Tokens of a device in a step."""
        return self.plan.training.batch_tokens

    @property
    def micro(self) -> int:
        """Tokens of a device in one forward pass."""
        return self.plan.training.forward_tokens

    @property
    def size(self) -> int:
        """Bytes of a number that is computed with."""
        return BF16 if self.plan.training.precision == "bf16" else FP32

    @property
    def config(self) -> PreTrainedConfig:
        """The configuration of the model at its first block, or of what it grows."""
        if self.base is not None:
            return self.base.get_text_config()
        return budget.model_config(self.plan, self.plan.tokenizer.size, depth=1)

    def run(self, layout: Layout) -> RunEstimate:
        """Return all stages in a layout."""
        costs = budget.estimate(self.plan, base=self.base)
        return RunEstimate(tuple(self.stage(cost, layout) for cost in costs))

    def stage(self, cost: StageCost, layout: Layout) -> StageEstimate:
        """Return one stage in a layout."""
        trunk, memory = self.memory(cost, layout)
        sent = self.sent(cost, layout, trunk)
        link = sent / self.cluster.link if sent else 0.0
        weights = cost.active_parameters / (self.cluster.count if layout == "fsdp2" else 1)
        optimizer = OPTIMIZER_BYTES * weights / self.cluster.device.bandwidth
        reading = 0.0
        if cost.cache_bytes:
            reading = self.tokens * self.bytes_per_token / self.cluster.device.disk

        def exposed(mfu: float) -> float:
            return max(0.0, link - self.overlapping(cost, layout, trunk, mfu))

        def step(mfu: float, waiting: float) -> float:
            return max(self.compute(cost.flops_per_token, mfu) + optimizer + waiting, reading)

        steps = max(1, round(cost.tokens / self.batch))
        low, middle, high = self.efficiency.low, self.efficiency.middle, self.efficiency.high
        waits = exposed(middle)
        seconds = step(middle, waits)
        return StageEstimate(
            stage=cost.stage,
            depth=cost.depth,
            tokens=cost.tokens,
            steps=steps,
            flops=cost.flops,
            active_parameters=cost.active_parameters,
            step_seconds=seconds,
            optimizer_seconds=optimizer,
            link_seconds=link,
            exposed_seconds=waits,
            sent_bytes=sent,
            seconds=steps * seconds,
            seconds_low=steps * step(high, exposed(high)),
            seconds_high=steps * step(low, link),
            memory_bytes=memory,
            fits=memory <= HEADROOM * self.cluster.device.memory,
            trunk=trunk,
        )

    def compute(self, flops_per_token: float, mfu: float) -> float:
        """Return the seconds of a step's FLOPs on a device."""
        return flops_per_token * self.tokens / (self.cluster.device.flops * mfu)

    def overlapping(self, cost: StageCost, layout: Layout, trunk: Place, mfu: float) -> float:
        """Return the seconds of a step during which a device can send.

        Gradients that are summed once a step go out while the last micro-batch runs backward.
        Shards are fetched and gradients scattered throughout; what a replicated trunk computes
        overlaps with nothing.
        """
        trains = self.compute(cost.flops_per_token - cost.trunk_flops_per_token, mfu)
        if layout == "data_parallel":
            return BACKWARD * trains * self.micro / self.tokens
        return self.compute(cost.flops_per_token, mfu) if trunk == "sharded" else trains

    def memory(self, cost: StageCost, layout: Layout) -> tuple[Place, int]:
        """Return where the trunk is, and the most bytes that a device holds."""
        count, device = self.cluster.count, self.cluster.device
        held: float = cost.memory_bytes - PROCESS_BYTES + device.reserved
        place: Place = "replicated" if cost.trunk_depth else "none"
        place = "cached" if cost.cache_bytes else place
        if layout == "data_parallel":
            if count > 1:  # gradients are gathered into buckets
                held += FP32 * cost.active_parameters
            return place, round(held)
        kept = 1 - 1 / count
        unit = max(cost.block_parameters, self.config.vocab_size * self.config.hidden_size)
        held -= STATE_BYTES * cost.active_parameters * kept
        held += 3 * unit * FP32  # one in use, one fetched ahead, a gradient
        if place == "replicated" and held > HEADROOM * device.memory:
            held -= cost.frozen_bytes * kept
            held += 2 * cost.block_parameters * self.size
            place = "sharded"
        return place, round(held)

    def sent(self, cost: StageCost, layout: Layout, trunk: Place) -> float:
        """Return the bytes that a device sends in a step, in rings over all devices.

        Data parallel: gradients, to be summed and handed out. FSDP2, for each micro-batch: weights
        fetched forward and backward, gradients scattered; a sharded trunk fetched. What trains
        travels in fp32, a trunk as it is held.
        """
        once = 1 - 1 / self.cluster.count
        if layout == "data_parallel":
            return 2 * once * FP32 * cost.active_parameters
        moved = 3 * FP32 * cost.active_parameters
        if trunk == "sharded":
            moved += cost.frozen_bytes
        return self.tokens / self.micro * once * moved

    @property
    def bytes_per_token(self) -> int:
        """Bytes of a trunk's output for one token in a cache."""
        return output_bytes(self.plan, self.config.hidden_size)

    def caches(self) -> tuple[CacheEstimate, ...]:
        """Return what a cache would be for every stage that could have one."""

        def costs(mode: str) -> list[StageCost]:
            stages = [
                stage.model_copy(update={"trunk": None if stage.lora else mode})
                for stage in self.plan.stages
            ]
            asked = self.plan.model_copy(update={"stages": tuple(stages)})
            return budget.estimate(asked, base=self.base)

        pairs = zip(self.plan.stages, costs("recompute"), costs("cache"), strict=True)
        return tuple(
            self.cache(run, stored)
            for stage, run, stored in pairs
            if run.trunk_depth and stage.lora is None
        )

    def cache(self, run: StageCost, stored: StageCost) -> CacheEstimate:
        """Return what a cache would be for a stage whose trunk is `run`, or has its `stored`."""
        device, mfu = self.cluster.device, self.efficiency.middle
        context = self.plan.model.context
        moved = context * self.bytes_per_token / device.disk
        block = context * run.trunk_flops_per_token / run.trunk_depth / (device.flops * mfu)
        below = run.trunk_depth - stored.trunk_run
        windows = math.ceil(run.tokens / context / self.cluster.count)
        reader = choice.Reader(run.trunk_depth, windows, windows, cached_below=below)
        rates = choice.Rates(block=block, write=moved, read=moved)
        recompute, cache = choice.seconds([reader], rates)
        saved = run.trunk_depth * block - moved
        made = stored.trunk_run * block + moved + (moved if below else 0.0)
        crown = self.compute(run.flops_per_token - run.trunk_flops_per_token, mfu)
        return CacheEstimate(
            stage=run.stage,
            trunk_depth=run.trunk_depth,
            made_through=stored.trunk_run,
            bytes_per_token=self.bytes_per_token,
            disk_bytes=stored.cache_bytes,
            keep_up=self.tokens * self.bytes_per_token / crown,
            blocks_even=moved / block,
            passes_even=made / saved if saved > 0 else None,
            recompute_seconds=recompute,
            cache_seconds=cache,
        )
