"""Suite `depth`: what a stage costs on deeper and deeper trunks, with their outputs cached or not.

Each trunk and mode is a process of its own, so that a peak is this stage's alone; not on CUDA,
whose allocator counts what is freed.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from nacre.bench.measure import Effort, Row, Sample, Target, default_device, fresh_process

CACHED, RECOMPUTED = "cache", "recompute"
TRUNKS, TINY_TRUNKS = (2, 4, 8, 16, 24), (1, 2)
REPEATS = {CACHED: 2, RECOMPUTED: 1}
"""Passes over the list of trunks, by mode; one on CUDA, which is steadier."""
STEPS, WARM_UP = 9, 2
BATCHES = 2  # of distinct text
NEW_BLOCKS = 2
ON_CUDA = 16  # times the tokens a step
TARGET = 1.05  # of a cached stage: the deepest trunk over the shallowest


@dataclass(frozen=True)
class Cost:
    """What the steps of a stage took: seconds of each, and bytes.

    `peak` is the most the process held while it trained above what it held before the model was
    built; `increment` is how much of that came with the steps.
    """

    seconds: tuple[float, ...]
    peak: int
    increment: int


def suite(effort: Effort) -> Iterator[Row]:
    """Yield seconds a step and peak memory, each beside the same on the shallowest trunk."""
    device = default_device()
    trunks = TINY_TRUNKS if effort.quick else TRUNKS
    cuda = device.startswith("cuda")
    once = effort.quick or cuda
    repeats = dict.fromkeys(REPEATS, 1) if once else REPEATS
    found: dict[tuple[str, int], list[Cost]] = {}
    for turn in range(max(repeats.values())):
        for trunk in trunks:
            for mode in (CACHED, RECOMPUTED):
                if turn < repeats[mode]:
                    effort.say(f"trunk of {trunk}, {mode}")
                    arguments = (trunk, mode, device, effort.quick)
                    cost = measure(*arguments) if cuda else fresh_process(measure, *arguments)
                    found.setdefault((mode, trunk), []).append(cost)
    for mode in (CACHED, RECOMPUTED):
        yield from _rows(mode, {trunk: found[mode, trunk] for trunk in trunks}, device)


def _rows(mode: str, costs: dict[int, list[Cost]], device: str) -> Iterator[Row]:
    first, last = min(costs), max(costs)
    seconds = {
        trunk: Sample(tuple(value for cost in runs for value in cost.seconds))
        for trunk, runs in costs.items()
    }
    peaks = {
        trunk: Sample(tuple(float(max(1, cost.peak)) for cost in runs))
        for trunk, runs in costs.items()
    }
    kept = "allocated on the device" if device.startswith("cuda") else "resident"
    for unit, samples in (("s", seconds), ("B", peaks)):
        for trunk, sample in samples.items():
            target = Target("peer", TARGET) if trunk == last and mode == CACHED else None
            grown = statistics.median(cost.increment for cost in costs[trunk])
            note = f"{mode}, trunk of {trunk}: {grown / 1e6:.0f} MB {kept} came with the steps"
            yield Row(
                suite="depth",
                case=f"{mode}, {NEW_BLOCKS} blocks on {trunk}, {'step' if unit == 's' else 'peak'}",
                unit=unit,
                better="lower",
                measured=sample.median,
                spread=sample.spread,
                rounds=len(sample.values),
                peer=None if trunk == first else samples[first].median,
                peer_spread=0.0 if trunk == first else samples[first].spread,
                peer_name="" if trunk == first else f"on {first}",
                target=target,
                note=note if unit == "B" else "",
            )


def measure(trunk: int, mode: str, device: str, quick: bool) -> Cost:
    """Train some steps of a stage on a trunk of `trunk` blocks; return what they took.

    What a first step loads into memory is loaded by a tiny stage before anything is counted.
    """
    import gc

    import torch

    from nacre.bench import stages
    from nacre.bench.measure import compare
    from nacre.bench.stages import Shape, Steps
    from nacre.train.device import PeakMemory

    small = Shape(32, 1 + NEW_BLOCKS, NEW_BLOCKS, vocabulary=512, tokens=128, context=32)
    full = Shape(256, trunk + NEW_BLOCKS, NEW_BLOCKS, vocabulary=4096, tokens=2048)
    if device.startswith("cuda"):
        full = dataclasses.replace(full, tokens=ON_CUDA * full.tokens)
    if quick:
        full = dataclasses.replace(small, depth=trunk + NEW_BLOCKS)
    stages.reset()
    accelerator = stages.make_accelerator(full.stage(mode), device)
    with tempfile.TemporaryDirectory() as name:

        def opened(shape: Shape, where: str) -> Steps:
            folder, batch = Path(name) / where, shape.tokens // shape.context
            store = stages.random_store(folder, shape.vocabulary, shape.context, BATCHES * batch)
            return Steps(shape.stage(mode), store, folder / "run", accelerator)

        warm = opened(small, "warm")
        warm()
        warm.close()
        del warm
        gc.collect()
        memory = PeakMemory(torch.device(device))
        before = memory.read()
        steps = opened(full, "stage")
        memory.reset()
        ready = memory.read()
        try:
            for _ in range(WARM_UP):
                steps()
            found = compare({mode: steps}, STEPS, float("inf"), device=device)[mode]
        finally:
            steps.close()
        peak = memory.read()
    return Cost(found.values, peak - before, peak - ready)
