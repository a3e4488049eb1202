"""What a stage leaves: its record with the ledger, and its checkpoint."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import PreTrainedModel

from nacre import processes
from nacre.data.loader import validation_batches
from nacre.errors import DivergedError
from nacre.growth import budget, ledger, stage
from nacre.growth.plan import Plan, Stage
from nacre.models import stock
from nacre.train import checkpoint, files, state
from nacre.train.card import model_card
from nacre.train.loop import StageRun, evaluate, uncompiled
from nacre.train.metrics import sync_metrics
from nacre.train.parts import Parts


@dataclass(frozen=True)
class Below:
    """What a stage stands on: the checkpoint folder below it, and its record."""

    path: Path
    record: dict[str, Any]


def loss_of(below: Below | None) -> float | None:
    """Return the held-out loss (nats) that a stage stands on, None if none was measured."""
    return (below.record.get("validation") or {}).get("loss") if below else None


def certify_merge(adapted: PeftModel, this: Stage, run: StageRun) -> dict[str, Any]:
    """Merge the adapters; return their settings and a certificate on the first held-out windows."""
    assert this.lora is not None
    batch = next(validation_batches(run.store, context=run.context, batch_size=4))
    ids_BT = torch.from_numpy(batch[:, :-1]).to(next(adapted.parameters()).device)
    try:
        with uncompiled(run):
            certificate = stage.merge_lora(adapted, ids_BT)
    except ValueError as error:
        raise DivergedError(
            f"the adapters cannot be merged: {error}; lower the learning rate"
        ) from None
    return this.lora.model_dump() | {"merge": certificate.record()}


def plain_cost(plan: Plan, number: int, parts: Parts) -> budget.StageCost:
    """Return what stage `number`, from 1, costs where trunks are run for every batch.

    It is the same however the trunk is run: what decides a run's weights may rest on it.
    """
    base = None if parts.base is None else checkpoint.load_config(parts.base)
    stages = tuple(this.model_copy(update={"trunk": "recompute"}) for this in plan.stages)
    as_run = plan.model_copy(update={"stages": stages})
    return budget.estimate(as_run, len(parts.tokenizer), base)[number - 1]


def flops(plain: budget.StageCost, tokens: int, trunk: Mapping[str, Any], context: int) -> float:
    """Return the FLOPs of a stage: what trains at every token, its trunk as often as it was run.

    That is at every token, or once for each window of a cache, above the blocks of an older one.
    """
    if "cache" not in trunk:
        return plain.flops_per_token * tokens
    cache = trunk["cache"]
    blocks = (plain.trunk_depth - cache["from_depth"]) / plain.trunk_depth
    stored = plain.trunk_flops_per_token * blocks * cache["windows"] * context
    return (plain.flops_per_token - plain.trunk_flops_per_token) * tokens + stored


def stage_record(
    plan: Plan,
    number: int,
    run: StageRun,
    parts: Parts,
    below: Below | None,
    plain: budget.StageCost,
    trunk: Mapping[str, Any],
) -> dict[str, Any]:
    """Return what `stage.json` says of the training; the ledger's part is added by the caller.

    `plain` is what `plain_cost` says of the stage, `trunk` how its engine ran the trunk.
    """
    this, progress = plan.stages[number - 1], run.progress
    found = stock.find_parts(run.model)
    growth: list[list[int]] = below.record["growth"] if below else []
    if this.add_blocks:
        growth = growth_with(growth, this.add_blocks, this.under)
    return {
        "stage": number,
        "depth": len(found.blocks),
        "new_blocks": this.add_blocks,
        "total_parameters": plain.total_parameters,
        "tokens": progress.tokens,
        "seconds": progress.seconds,
        "tokens_per_second": progress.tokens / max(progress.seconds, 1e-9),
        "processes": processes.count(),
        "peak_memory_bytes": max(processes.gather(progress.peak_memory_bytes)),
        "flops": flops(plain, progress.tokens, trunk, plan.model.context),
        "trunk_mode": run.trunk_mode,
        "trunk": trunk,
        "init": this.init if this.add_blocks else None,
        "train": this.train if below else "crown",
        "under": this.under,
        "validation": evaluate(run),
        "history": progress.history,
        "plain_flops_per_token": plain.flops_per_token,
        "loss_below": loss_of(below),
        "growth": growth,
        "cursor": progress.cursor,
        "parent": below.record["fingerprint"] if below else None,
        "plan": plan.fingerprint(number),
        "substrate": below.record.get("substrate") if below else parts.fingerprints["substrate"],
        "tokenizer": parts.fingerprints["tokenizer"],
        "corpus": run.store.fingerprint,
    }


def growth_with(growth: Sequence[Sequence[int]], count: int, under: int) -> list[list[int]]:
    """Return the growth steps, as (step, blocks), after one of `count` blocks under the last ones.

    The `under` blocks above the new ones, which train with them, belong to the new step from then.
    """
    left, kept = under, list[list[int]]()
    for step, blocks in reversed(growth):
        taken = min(left, blocks)
        left -= taken
        if blocks > taken:
            kept.insert(0, [step, blocks - taken])
    return [*kept, [max((step for step, _ in growth), default=0) + 1, count + under]]


def save_stage(
    out: Path,
    record: dict[str, Any],
    model: PreTrainedModel,
    below: Below | None,
    frozen: Mapping[str, str],
) -> None:
    """Write a stage: weights by growth step, tokenizer, substrate, card, and the ledger.

    The record's `frozen` holds the hashes of what did not train (less what a LoRA merge changed),
    its `weights` those of everything else: together every tensor of the model. Frozen tensors may
    have left memory: their files are the ones of the stage below.
    """
    unmoved = frozen if record["lora"] is None else {}
    hashes = {
        name: unmoved.get(name) or ledger.tensor_hash(tensor)
        for name, tensor in model.state_dict().items()
    }
    record["frozen"] = {n: h for n, h in hashes.items() if frozen.get(n) == h}
    record["weights"] = {n: h for n, h in hashes.items() if n not in record["frozen"]}
    record["fingerprint"] = ledger.fingerprint(hashes)
    sync_metrics(out)
    embedding = f"{stock.find_parts(model).embedding_name}.weight"
    if embedding in record["trainable"]:
        record["substrate"] = hashes[embedding]
    with files.new_folder(out / "stages" / f"{record['stage']:02d}") as partial:
        checkpoint.save_weights(
            model,
            partial,
            [(step, count) for step, count in record["growth"]],
            unchanged=record["frozen"],
            previous=below.path if below else None,
        )
        shutil.copytree(out / "tokenizer", partial, dirs_exist_ok=True)
        if (out / "substrate").exists():
            shutil.copy2(out / "substrate" / "substrate.json", partial)
        (partial / "README.md").write_text(model_card(record), encoding="utf-8")
        files.write_json(partial / files.RECORD, record)
    state.clear(out / "state")
