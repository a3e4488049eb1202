"""Stages as suites measure them: plan, engine and loop of a real run, on random tokens.

Shapes: B batch, T positions, D width; `below_BTD` the trunk's outputs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState

from nacre.data.shards import Counts, TokenStore
from nacre.growth import budget, ledger, plan
from nacre.growth.plan import Plan
from nacre.growth.stage import drawing
from nacre.models import stock
from nacre.train.device import bf16_is_fast, micro_batches
from nacre.train.engine import StageTrunk, reading
from nacre.train.loop import StageRun, setup, train_step
from nacre.train.observer import Observer

STEPS = 10_000  # a stage never ends while it is measured; its corpus is read over and over


@dataclass(frozen=True)
class Shape:
    """A stage: its newest blocks `top` of `depth` train, `tokens` a step."""

    width: int
    depth: int
    top: int
    vocabulary: int
    tokens: int
    context: int = 256

    @property
    def title(self) -> str:
        """The shape in words."""
        return f"d = {self.width}, top {self.top} of {self.depth}"

    def plan(self, blocks: Sequence[int], mode: str = "auto") -> Plan:
        """Return a plan whose stages add `blocks`; the trunk runs as `mode` says."""
        stages = [{"add_blocks": count, "tokens": STEPS * self.tokens} for count in blocks if count]
        return plan.parse(
            {
                "tokenizer": {"size": self.vocabulary},
                "model": {"width": self.width, "context": self.context},
                "training": {"batch_tokens": self.tokens, "validation_tokens": self.context},
                "trunk": {"mode": mode},
                "stages": stages,
            }
        )

    def stage(self, mode: str) -> Plan:
        """Return the plan whose last stage adds the top blocks."""
        return self.plan([self.depth - self.top, self.top], mode)

    def whole(self) -> Plan:
        """Return the plan that trains all blocks at once."""
        return self.plan([self.depth])


def random_store(folder: Path, vocabulary: int, context: int, windows: int) -> TokenStore:
    """Write a corpus of `windows` windows of random tokens, and one held out; return its store."""
    folder.mkdir(parents=True, exist_ok=True)
    sizes = {"train": windows * context + 1, "validation": context + 1}
    store = TokenStore(
        folder=folder,
        fingerprint=f"random, {windows} windows",
        tokenizer="none",
        vocabulary_size=vocabulary,
        end=0,
        counts={
            "train": Counts(1, sizes["train"], 0),
            "validation": Counts(1, sizes["validation"], 0),
        },
    )
    draw = np.random.default_rng(0)
    for split, size in sizes.items():
        draw.integers(vocabulary, size=size).astype(store.dtype).tofile(folder / f"{split}.tokens")
    return store


def make_accelerator(plan: Plan, device: str) -> Accelerator:
    """Return an Accelerator as a run's: in bf16 where the device is fast in it.

    Accelerators share their state: `reset` it before one of another kind is made.
    """
    return Accelerator(
        cpu=device == "cpu",
        gradient_accumulation_steps=micro_batches(plan.training, plan.model.context),
        mixed_precision="bf16" if bf16_is_fast(torch.device(device)) else "no",
    )


def reset() -> None:
    """Forget the shared state of Accelerators, and what was compiled for other shapes."""
    AcceleratorState._reset_state(reset_partial_state=True)
    torch.compiler.reset()


class Steps:
    """The last stage of a plan, ready to train; a call is one optimizer step.

    The engine sets up its trunk as in a run: in mode `cache` its outputs are stored in the folder
    `out`, and it has left memory. A step reads its batch from the stage's stream.
    """

    def __init__(self, plan: Plan, store: TokenStore, out: Path, accelerator: Accelerator) -> None:
        index = len(plan.stages) - 1
        trunk, depth = plan.depth - plan.stages[-1].add_blocks, plan.depth
        with drawing(0):
            model = stock.build(budget.model_config(plan, plan.tokenizer.size, depth))
        model.requires_grad_(False)
        stock.upper(model, trunk).requires_grad_(True)
        stock.find_parts(model).head.requires_grad_(True)
        out.mkdir(parents=True, exist_ok=True)
        engine = StageTrunk(
            plan=plan,
            index=index,
            model=model,
            depth=trunk,
            hashes=ledger.frozen_hashes(model),
            read=reading(plan, index, store, None),
            out=out,
            accelerator=accelerator,
            observer=Observer(),
            trains=False,
            exact=True,
            begun=False,
        ).set_up()
        self.record: Mapping[str, Any] = engine.record
        self.run: StageRun = setup(
            model,
            plan.stages[-1],
            plan.training_of(plan.stages[-1]),
            store,
            accelerator,
            objective=engine.objective,
            outputs=engine.outputs,
            context=plan.model.context,
            seed=plan.seed,
            byte_lengths=np.ones(plan.tokenizer.size, dtype=np.int64),
            cursor=None,
        )
        self.run.objective.train()
        self.batches = self.run.batches()

    def __call__(self) -> float:
        """Train one step; return its loss (nats a token)."""
        batch, _, below_BTD = next(self.batches)
        return train_step(self.run, batch, below_BTD)["loss"]

    def close(self) -> None:
        """Stop reading."""
        self.batches.close()
        if self.run.outputs is not None:
            self.run.outputs.close()


def flops(plan: Plan, *, trunk_runs: bool) -> float:
    """Return the FLOPs a token that the last stage of a plan cannot avoid.

    2 a trunk weight if the trunk runs, 6 a crown and head weight; attention 2 T D a layer forward
    (4 T D, half of it masked), twice that backward.
    """
    counts = stock.count_parameters(budget.model_config(plan, plan.tokenizer.size, 1))
    new = plan.stages[-1].add_blocks
    trunk = plan.depth - new if trunk_runs else 0
    attention = 2 * plan.model.context * plan.model.width
    crown = 3 * (new * (2 * counts.block + attention) + 2 * counts.head)
    return float(crown + trunk * (2 * counts.block + attention))


FLOPS_NAME = "2 FLOPs a trunk weight, 6 a crown and head weight, causal attention, at the rate of"
