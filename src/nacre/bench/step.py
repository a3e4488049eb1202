"""Suite `step`: one optimizer step of a stage against its limit and against `Trainer`."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path

import torch

from nacre.bench import stages
from nacre.bench.measure import (
    FEWEST_ROUNDS,
    Effort,
    Row,
    Sample,
    Target,
    compare,
    default_device,
    matrix_rate,
    training_dtype,
)
from nacre.bench.stages import Shape, Steps
from nacre.bench.trainer import TrainerSteps, arguments
from nacre.growth import budget
from nacre.models import stock

CACHED, RECOMPUTED, MONOLITHIC = "cached", "recompute", "monolithic"
TRAINER, FROZEN = "Trainer", "Trainer, trunk frozen"

SHAPES = (
    Shape(width=256, depth=6, top=2, vocabulary=4096, tokens=4096),
    Shape(width=384, depth=12, top=4, vocabulary=8192, tokens=2048),
    Shape(width=1024, depth=6, top=2, vocabulary=8192, tokens=1024),
)
TINY = Shape(width=32, depth=2, top=1, vocabulary=512, tokens=128, context=32)
SECONDS = {256: 25.0, 384: 40.0, 1024: 70.0}
"""Per width: what the comparison may take."""
ON_CUDA = 16  # times the tokens a step
BATCHES = 3  # of distinct text
TARGETS = {
    (384, CACHED): 4.0, (384, RECOMPUTED): 2.0,
    (256, MONOLITHIC): 1.5, (384, MONOLITHIC): 1.5, (1024, MONOLITHIC): 1.5,
}  # fmt: skip
"""Per width and candidate: how many times faster than `Trainer`."""
LIMIT, LIMIT_FROM = 2.0, 512  # times the limit, from this width on


def suite(effort: Effort) -> Iterator[Row]:
    """Yield tokens/s of every candidate beside its limit, then seconds beside those of `Trainer`.

    In "Trainer, trunk frozen" the embedding is frozen too, so that no gradient has to go through
    the trunk.
    """
    device = default_device()
    cuda = device.startswith("cuda")
    for shape in (TINY,) if effort.quick else SHAPES:
        tokens = shape.tokens * (ON_CUDA if cuda and not effort.quick else 1)
        yield from _rows(dataclasses.replace(shape, tokens=tokens), device, effort)


def _rows(shape: Shape, device: str, effort: Effort) -> Iterator[Row]:
    whole = stages.flops(shape.whole(), trunk_runs=False)
    with_trunk = stages.flops(shape.stage("recompute"), trunk_runs=True)
    flops = {
        CACHED: stages.flops(shape.stage("cache"), trunk_runs=False),
        RECOMPUTED: with_trunk,
        MONOLITHIC: whole,
        TRAINER: whole,
        FROZEN: with_trunk,
    }
    effort.say(shape.title)
    product = (training_dtype(device), shape.tokens, shape.width, 4 * shape.width, device)
    rate = matrix_rate(*product)
    seconds = measure(shape, device, effort)
    rate = max(rate, matrix_rate(*product))  # a busy moment must not make the limit easy
    sides = f"{shape.tokens:,} x {shape.width} x {4 * shape.width}"
    name = f"{stages.FLOPS_NAME} {sides} (V = {shape.vocabulary:,}, {shape.tokens:,} tokens a step)"
    for candidate, sample in seconds.items():
        speed = sample.per(shape.tokens)
        ours = candidate in (CACHED, RECOMPUTED) and shape.width >= LIMIT_FROM
        yield Row(
            suite="step",
            case=f"{shape.title}: {candidate}",
            unit="tokens/s",
            better="higher",
            measured=speed.median,
            spread=speed.spread,
            rounds=len(speed.values),
            limit=rate / flops[candidate],
            limit_name=name,
            target=Target("limit", LIMIT) if ours else None,
        )
    pairs = [(ours, TRAINER) for ours in (CACHED, RECOMPUTED, MONOLITHIC)]
    pairs += [(ours, FROZEN) for ours in (CACHED, RECOMPUTED)]
    for ours, peer in pairs:
        ratio = TARGETS.get((shape.width, ours)) if peer == TRAINER else None
        sample, other = seconds[ours], seconds[peer]
        yield Row(
            suite="step",
            case=f"{shape.title}: {ours}",
            unit="s",
            better="lower",
            measured=sample.median,
            spread=sample.spread,
            rounds=len(sample.values),
            peer=other.median,
            peer_spread=other.spread,
            peer_name=peer,
            target=Target("ratio", ratio) if ratio else None,
            note=f"{shape.title}: {ours} against {peer}, "
            f"FLOPs alone allow {flops[peer] / flops[ours]:.2f}x",
        )


def measure(shape: Shape, device: str, effort: Effort) -> dict[str, Sample]:
    """Return the seconds of a step by candidate; they take turns on the same text."""
    budget_seconds = effort.seconds if effort.quick else SECONDS[shape.width]
    stages.reset()
    with tempfile.TemporaryDirectory() as name, ExitStack() as open_:
        folder, batch = Path(name), shape.tokens // shape.context
        store = stages.random_store(
            folder / "data", shape.vocabulary, shape.context, BATCHES * batch
        )
        tokens = torch.from_numpy(store.tokens("train")[:-1].astype("int64"))
        windows = tokens.view(-1, shape.context)
        asked = arguments(folder / "trainer", batch, device, stages.STEPS)
        config = budget.model_config(shape.whole(), shape.vocabulary, shape.depth)
        candidates: dict[str, Callable[[], object]] = {}
        for candidate, frozen in ((TRAINER, 0), (FROZEN, shape.depth - shape.top)):
            model = stock.build(config)
            if frozen:
                stock.lower(model, frozen).requires_grad_(False)
            candidates[candidate] = peer = TrainerSteps(model, asked, windows)
            open_.callback(peer.close)
        accelerator = stages.make_accelerator(shape.whole(), device)
        plans = {
            CACHED: shape.stage("cache"),
            RECOMPUTED: shape.stage("recompute"),
            MONOLITHIC: shape.whole(),
        }
        for candidate, planned in plans.items():
            ours = Steps(planned, store, folder / candidate, accelerator)
            candidates[candidate] = ours
            open_.callback(ours.close)
        order = [CACHED, RECOMPUTED, MONOLITHIC, TRAINER, FROZEN]
        turns = {candidate: candidates[candidate] for candidate in order}
        if device.startswith("cuda"):  # blocks compile in their first step, which is not the time
            for work in turns.values():
                work()
        rounds = max(effort.rounds, FEWEST_ROUNDS)
        return compare(turns, rounds, budget_seconds, device=device)
