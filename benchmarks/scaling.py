"""What `nacre plan --devices here` predicts of small growths, beside the same growths run.

    OMP_NUM_THREADS=1 python benchmarks/scaling.py

Every case is measured, predicted and grown in processes of its own. Seconds are processor time, so
that other jobs of the machine do not count; evaluation and checkpoints do not count either. Prints
a Markdown table.
"""

from __future__ import annotations

import dataclasses
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from nacre import tokenizer as tokenizers
from nacre.bench.measure import fresh_process
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.train.observer import Observer

VOCABULARY = 4096
STEPS = 4
ALONE = {"OMP_NUM_THREADS": "1"}


@dataclasses.dataclass(frozen=True)
class Case:
    """A growth: `stages` of `blocks` blocks, `batch` tokens a step."""

    title: str
    width: int
    stages: int = 3
    blocks: int = 2
    batch: int = 2048
    context: int = 256
    family: str = "llama"
    mode: str = "recompute"
    precision: str = "bf16"

    def plan(self, folder: Path) -> Plan:
        """Return the case as a plan, with the text and the tokenizer in a folder."""
        stage = {"add_blocks": self.blocks, "tokens": STEPS * self.batch}
        return plans.parse(
            {
                "tokenizer": {"path": str(folder / "tokenizer"), "size": VOCABULARY},
                "data": {"sources": [str(folder / "text")], "holdout": 0.1, "order": "restart"},
                "model": {"family": self.family, "width": self.width, "context": self.context},
                "training": {
                    "batch_tokens": self.batch,
                    "validation_tokens": self.batch,
                    "precision": self.precision,
                },
                "trunk": {"mode": self.mode},
                "stages": [stage] * self.stages,
            }
        )


CASES = (
    Case("d = 256, 3 x 2 blocks", 256),
    Case("the same, cached", 256, mode="cache"),
    Case("the same, end to end", 256, stages=1, blocks=6),
    Case("the same, fp32", 256, precision="fp32"),
    Case("d = 512, 2 x 3 blocks, 128 tokens of context", 512, 2, 3, batch=1024, context=128),
    Case("d = 384, 2 x 2 blocks, GPT-NeoX", 384, 2, family="gpt_neox"),
)


class Watch(Observer):
    """Processor seconds of every stage's steps, and of making its trunk's outputs."""

    def __init__(self) -> None:
        self.stages: list[float] = []
        self.last = 0.0
        self.making = False

    def phase(self, title: str, total: int | None = None) -> None:
        """Start the clock; note whether a cache is being made."""
        self.making = title == "Trunk outputs"
        self.last = time.process_time()

    def stage_started(self, stage: int, stages: int, tokens: int, done: int) -> None:
        """Begin a stage with what its cache took."""
        self.stages.append(time.process_time() - self.last if self.making else 0.0)
        self.making = False

    def evaluated(self, validation: dict[str, float]) -> None:
        """Leave the evaluation out."""
        self.last = time.process_time()

    def trained(self, step: dict[str, Any]) -> None:
        """Add a step."""
        self.stages[-1] += time.process_time() - self.last
        self.last = time.process_time()


def grown(plan: Plan, out: Path) -> list[tuple[float, int]]:
    """Grow a plan; return seconds and peak bytes of every stage."""
    from nacre.train.grow import grow

    watch = Watch()
    records = grow(plan, out, observer=watch)
    peaks = [record["peak_memory_bytes"] for record in records]
    return list(zip(watch.stages, peaks, strict=True))


def predicted(plan: Plan) -> list[tuple[float, int]]:
    """Measure this machine; return the predicted seconds and bytes of every stage."""
    from nacre.bench import here
    from nacre.growth import scaling
    from nacre.growth.devices import Cluster
    from nacre.growth.estimates import Efficiency

    device, mfu = here.measure(plan, clock=time.process_time)
    found = scaling.estimate(
        plan, Cluster(device), Efficiency.of(mfu), precision=here.precision_of(plan)
    )
    return [(s.seconds, s.memory_bytes) for s in found.growth["data_parallel"].stages]


def main() -> None:
    from nacre.bench.text import english

    began = time.perf_counter()
    errors: dict[str, list[float]] = {"seconds": [], "memory": []}
    kinds = ("seconds, predicted", "memory, predicted")
    heads = [head for kind in kinds for head in (kind, "measured", "off by")]
    print(f"| growth | stage | {' | '.join(heads)} |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        texts = english(False)
        tokenizers.build(texts, VOCABULARY).save_pretrained(folder / "tokenizer")
        (folder / "text").mkdir()
        text = "".join(texts)[:100_000]
        for number in range(20):
            piece = text[number * 5000 : (number + 1) * 5000]
            (folder / "text" / f"{number:02d}.txt").write_text(piece, encoding="utf-8")
        for number, case in enumerate(CASES):
            plan = case.plan(folder)
            expected = fresh_process(predicted, plan, environment=ALONE)
            found = fresh_process(grown, plan, folder / f"run-{number}", environment=ALONE)
            for stage, (asked, got) in enumerate(zip(expected, found, strict=True), start=1):
                off = [a / b - 1 for a, b in zip(asked, got, strict=True)]
                for key, value in zip(errors, off, strict=True):
                    errors[key].append(value)
                print(
                    f"| {case.title if stage == 1 else ''} | {stage} "
                    f"| {asked[0]:.2f} s | {got[0]:.2f} s | {off[0]:+.0%} "
                    f"| {asked[1] / 1e6:.0f} MB | {got[1] / 1e6:.0f} MB | {off[1]:+.0%} |",
                    flush=True,
                )
    for key, values in errors.items():
        size = [abs(value) for value in values]
        print(f"\n{key}: off by {statistics.mean(size):.0%} in the mean, {max(size):.0%} at most")
    print(f"\n{time.perf_counter() - began:.0f} s in all")


if __name__ == "__main__":
    main()
