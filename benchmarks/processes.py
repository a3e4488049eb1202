"""One run in two processes against one, on the same two cores: python benchmarks/processes.py

Speed and losses: a growth of the recipe `small` cut to a few steps, in one process of two threads
and in two of one thread, by turns. Memory: stages of as many parameters in a few wide blocks and in
many narrow ones, in one process and sharded over two (`training.shard: crown`), beyond what a tiny
model takes. While a block runs it is there whole, with its gradient: few wide ones share less well.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROUNDS = 3
SPEED = {
    "name": "speed",
    "training": {"batch_tokens": 4096, "precision": "fp32", "evaluate_every": 1000,
                 "validation_tokens": 8192, "save_every": 1000},
    "tokenizer": {"size": 4096},
    "model": {"family": "llama", "width": 256, "context": 256},
    "stages": [{"add_blocks": 2, "tokens": "160k"}, {"add_blocks": 2, "tokens": "160k"}],
}  # fmt: skip
MEMORY = {
    "name": "memory",
    "training": {"batch_tokens": 256, "precision": "fp32", "evaluate_every": 1000,
                 "validation_tokens": 256, "save_every": 1000, "shard": "crown"},
    "tokenizer": {"size": 2048},
    "model": {"family": "llama", "context": 128},
    "stages": [{"tokens": 1024}],
}  # fmt: skip


def grow(plan: dict[str, Any], out: Path, processes: int) -> list[dict[str, Any]]:
    """Grow in so many processes, two threads in all; return the records of the stages."""
    import yaml

    file = out.with_suffix(".yaml")
    file.write_text(yaml.safe_dump(plan))
    words = ["-m", "nacre", "grow", str(file), "--out", str(out), "--quiet", "--track", "none"]
    launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(processes)]
    threads = {"OMP_NUM_THREADS": str(2 // processes)}
    command = [sys.executable, *(launcher if processes > 1 else []), *words]
    subprocess.run(command, env=os.environ | threads, check=True, capture_output=True)
    return [json.loads(path.read_text()) for path in sorted(out.glob("stages/*/stage.json"))]


def losses(out: Path) -> list[float]:
    lines = map(json.loads, (out / "metrics.jsonl").read_text().splitlines())
    return [line["loss"] for line in lines if "loss" in line]


def speed(folder: Path) -> None:
    rates: dict[int, list[float]] = {1: [], 2: []}
    for number in range(ROUNDS):
        for count in rates:
            records = grow(SPEED, folder / f"speed-{count}-{number}", count)
            rates[count].append(
                sum(r["tokens"] for r in records) / sum(r["seconds"] for r in records)
            )
    one, two = (losses(folder / f"speed-{count}-0") for count in (1, 2))
    apart = max(abs(a - b) for a, b in zip(one, two, strict=True))
    for count, found in rates.items():
        print(f"{count} process(es): {statistics.median(found):,.0f} tokens/s ({found})")
    ratio = statistics.median(b / a for a, b in zip(rates[1], rates[2], strict=True))
    print(f"2 against 1: {ratio:.2f}x; {len(one)} losses differ by at most {apart:.1e}", flush=True)


def memory(folder: Path, blocks: int, width: int) -> None:
    peaks = {}
    for count in (1, 2):
        idle = grow(shaped(1, 64), folder / f"idle-{blocks}-{count}", count)[0]
        record = grow(shaped(blocks, width), folder / f"memory-{blocks}-{count}", count)[0]
        peaks[count] = record["peak_memory_bytes"] - idle["peak_memory_bytes"]
        trained = record["active_parameters"] / 1e6
        print(
            f"{blocks} blocks of width {width}, {trained:.0f}M trained, {count} process(es): "
            f"{peaks[count] / 1e6:,.0f} MB each beyond {idle['peak_memory_bytes'] / 1e6:,.0f}"
        )
    print(f"2 against 1: {peaks[2] / peaks[1]:.2f}x", flush=True)


def shaped(blocks: int, width: int) -> dict[str, Any]:
    (stage,) = MEMORY["stages"]
    model = MEMORY["model"] | {"width": width}
    return MEMORY | {"model": model, "stages": [stage | {"add_blocks": blocks}]}


if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as temporary:
        speed(Path(temporary))
        memory(Path(temporary), blocks=4, width=2048)
        memory(Path(temporary), blocks=16, width=1024)
