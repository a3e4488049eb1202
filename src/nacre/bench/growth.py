"""Suite `run`: a whole growth, its trunks cached or run, and the same blocks end to end."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacre import tokenizer as tokenizers
from nacre.bench.measure import Effort, Row, Target, default_device, training_dtype
from nacre.bench.text import english
from nacre.growth import budget, plan
from nacre.growth.plan import Plan
from nacre.models import stock
from nacre.train.grow import grow
from nacre.train.observer import Observer

CACHED, RECOMPUTED, MONOLITHIC = "cache", "recompute", "monolithic"
FASTER = 1.6  # with a cache than without
SAME_LOSS = {"fp32": 0.0, "bf16": 0.02}
"""Nats by which the training losses of the two growths may differ at most, by precision."""


@dataclass(frozen=True)
class Growth:
    """The shape of a growth; `characters` of text are cut into `pieces` documents."""

    stages: int
    blocks: int
    width: int
    vocabulary: int
    context: int
    batch: int
    steps: int
    pieces: int
    characters: int


FULL = Growth(
    stages=6, blocks=2, width=256, vocabulary=1024, context=256, batch=2048, steps=10,
    pieces=16, characters=16_000,
)  # fmt: skip
TINY = Growth(
    stages=2, blocks=1, width=32, vocabulary=512, context=32, batch=128, steps=4,
    pieces=16, characters=4000,
)  # fmt: skip


@dataclass(frozen=True)
class Arm:
    """What one growth left: wall-clock seconds, training losses in order, the stages' records."""

    seconds: float
    losses: tuple[float, ...]
    records: list[dict[str, Any]]

    @property
    def bits(self) -> float:
        """Held-out bits per byte at the end."""
        return self.records[-1]["validation"]["bits_per_byte"]


class Watch(Observer):
    """The wall-clock from the first stage's first step to the end of the last stage."""

    def __init__(self) -> None:
        self.start: float | None = None
        self.end = 0.0

    def stage_started(self, stage: int, stages: int, tokens: int, done: int) -> None:
        """Start the clock at the first stage; making the trunk's outputs counts from then on."""
        self.start = time.perf_counter() if self.start is None else self.start

    def stage_finished(self, record: dict[str, Any]) -> None:
        """Stop the clock."""
        self.end = time.perf_counter()

    @property
    def seconds(self) -> float:
        """Seconds between the two."""
        assert self.start is not None
        return self.end - self.start


def suite(effort: Effort) -> Iterator[Row]:
    """Yield wall-clock, loss difference and held-out bits per byte of three arms, equal in tokens.

    Evaluations, making caches and writing checkpoints count; tokenizer and tokens do not.
    """
    shape = TINY if effort.quick else FULL
    arms: dict[str, Arm] = {}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        effort.say("tokenizer")
        prepare(shape, folder, english(effort.quick))
        plans = {mode: planned(shape, folder, mode) for mode in (RECOMPUTED, CACHED, MONOLITHIC)}
        for mode, this in plans.items():
            effort.say(mode)
            watch = Watch()
            records = grow(this, folder / mode, observer=watch)
            arms[mode] = Arm(watch.seconds, losses(folder / mode), records)
    yield from _rows(shape, plans, arms)


def _rows(shape: Growth, plans: dict[str, Plan], arms: dict[str, Arm]) -> Iterator[Row]:
    cached = arms[CACHED]
    title = f"{shape.stages} stages of {shape.blocks} blocks, d = {shape.width}"
    needed = {mode: flops(shape, plans[mode], arms[mode]) for mode in arms}
    windows = cached.records[-1]["trunk"]["cache"]["windows"]
    epochs = shape.steps * shape.batch / shape.context / windows
    for peer, name, target in (
        (RECOMPUTED, "without cache", Target("ratio", FASTER)),
        (MONOLITHIC, "end to end", None),
    ):
        yield Row(
            suite="run",
            case=f"{title}: cached",
            unit="s",
            better="lower",
            measured=cached.seconds,
            peer=arms[peer].seconds,
            peer_name=name,
            target=target,
            note=f"{title}, {epochs:.1f} epochs a stage, against {name}: "
            f"FLOPs alone allow {needed[peer] / needed[CACHED]:.2f}x",
        )
    recomputed = arms[RECOMPUTED].losses
    differences = [abs(a - b) for a, b in zip(cached.losses, recomputed, strict=True)]
    dtype = {"torch.bfloat16": "bf16"}.get(str(training_dtype(default_device())), "fp32")
    yield Row(
        suite="run",
        case=f"{title}: largest difference of a training loss, cached or not",
        unit="nats",
        better="lower",
        measured=max(differences),
        rounds=len(differences),
        target=Target("measured", SAME_LOSS[dtype]),
        note=f"trained in {dtype}",
    )
    for peer, name in ((RECOMPUTED, "without cache"), (MONOLITHIC, "end to end")):
        yield Row(
            suite="run",
            case=f"{title}: held-out text",
            unit="bits/byte",
            better="lower",
            measured=cached.bits,
            peer=arms[peer].bits,
            peer_name=name,
        )


def prepare(shape: Growth, folder: Path, texts: Sequence[str]) -> None:
    """Write documents and a tokenizer learned from them, for all arms, into a folder."""
    text = "".join(texts)[: shape.characters]
    size = shape.characters // shape.pieces
    pieces = [text[first : first + size] for first in range(0, len(text), size)]
    (folder / "text").mkdir()
    for number, piece in enumerate(pieces):
        (folder / "text" / f"{number:02d}.txt").write_text(piece, encoding="utf-8")
    tokenizers.build(texts, shape.vocabulary).save_pretrained(folder / "tokenizer")


def planned(shape: Growth, folder: Path, mode: str) -> Plan:
    """Return the plan of an arm: growth in a trunk mode, or all blocks in one stage."""
    tokens = shape.steps * shape.batch
    stages = [{"add_blocks": shape.blocks, "tokens": tokens}] * shape.stages
    if mode == MONOLITHIC:
        stages = [{"add_blocks": shape.blocks * shape.stages, "tokens": tokens * shape.stages}]
    return plan.parse(
        {
            "tokenizer": {"path": str(folder / "tokenizer")},
            "data": {"sources": [str(folder / "text")], "holdout": 0.1, "order": "restart"},
            "model": {"width": shape.width, "context": shape.context},
            "training": {"batch_tokens": shape.batch, "validation_tokens": shape.batch},
            "trunk": {"mode": "recompute" if mode == MONOLITHIC else mode},
            "stages": stages,
        }
    )


def losses(out: Path) -> tuple[float, ...]:
    """Return the training loss of every step of a run, in order."""
    lines = (json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines())
    return tuple(line["loss"] for line in lines if "loss" in line)


def flops(shape: Growth, plan: Plan, arm: Arm) -> float:
    """Return the FLOPs of an arm's training steps, counted as `stages.flops` does.

    A cached stage runs its trunk's newest blocks once over its distinct windows.
    """
    counts = stock.count_parameters(budget.model_config(plan, shape.vocabulary, depth=1))
    block = 2 * counts.block + 2 * shape.context * shape.width
    total, depth = 0.0, 0
    for this, record in zip(plan.stages, arm.records, strict=True):
        total += 3 * (this.add_blocks * block + 2 * counts.head) * record["tokens"]
        if "cache" in record["trunk"]:
            made = record["trunk"]["cache"]
            total += (depth - made["from_depth"]) * block * made["windows"] * shape.context
        else:
            total += depth * block * record["tokens"]
        depth += this.add_blocks
    return total
