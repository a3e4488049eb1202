"""What saved states cost: python benchmarks/resume.py [--megabytes N] [--repeats N]

Of a growth by the recipe `small`: what a save takes, against the 200 steps between two saves; and
the time from `nacre grow --resume` to the first new step, the data cursor at 90% of the corpus,
against that of a run which starts: from the text, and from a tokenizer and tokens that are there.
Seconds of the processor stand beside those of the clock: a busy machine changes only the latter.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from safetensors.torch import load_file

from nacre import config
from nacre.data import read
from nacre.data.shards import TokenStore
from nacre.folders import METRICS
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.train import state
from nacre.train.grow import grow
from nacre.train.metrics import NewMetrics, read_metrics
from nacre.train.observer import Observer

SAVE_EVERY, STEPS = 200, 33
Cost = tuple[float, float]
"""Seconds by the clock, and of the processor."""


class Stopped(Exception):
    """Ends a growth after some steps."""


class Clock(Observer):
    """Times steps and saves, and ends the growth after `STEPS`."""

    def __init__(self) -> None:
        self.ends: list[Cost] = []
        self.saves: dict[int, Cost] = {}
        self.save = state.save

    def trained(self, step: dict[str, Any]) -> None:
        """Note the end of a step."""
        self.ends.append(now())
        if step["step"] == STEPS:
            raise Stopped

    def saved(self, *arguments: Any) -> None:
        """Save a state as `state.save` does, and note what it took."""
        before = now()
        self.save(*arguments)
        self.saves[len(self.ends)] = since(before)

    def step(self) -> Cost:
        """Return what a step takes after which nothing was saved."""
        pairs = [
            (self.ends[at][0] - self.ends[at - 1][0], self.ends[at][1] - self.ends[at - 1][1])
            for at in range(2, len(self.ends))
            if at not in self.saves
        ]
        return middle(pairs)


def now() -> Cost:
    return time.perf_counter(), time.process_time()


def since(before: Cost) -> Cost:
    clock, processor = now()
    return clock - before[0], processor - before[1]


def middle(costs: list[Cost]) -> Cost:
    """Return the median of both kinds of seconds."""
    return median(cost[0] for cost in costs), median(cost[1] for cost in costs)


def write_text(path: Path, megabytes: float) -> None:
    """Write the documents of the default corpus, numbered copies of them, until it is enough."""
    documents = [document.text for document in read(("default",))]
    size, copy = 0, 0
    with path.open("w", encoding="utf-8") as file:
        while size < megabytes * 1e6:
            copy += 1
            for text in documents:
                size += file.write(json.dumps({"text": f"{copy}\n{text}"}) + "\n")


def small_plan(text: Path, tokens: int) -> Plan:
    """Return the recipe `small` with one stage of so many tokens on a text."""
    plan = plans.load("small", [f"data.sources=[{text}]", "training.save_every=4"])
    data = plan.model_dump(mode="json", by_alias=True)
    return plans.parse(data | {"stages": [data["stages"][0] | {"tokens": tokens}]})


def stopped_run(plan: Plan, out: Path) -> Clock:
    """Grow until `STEPS`, timing steps and saves; then set the cursor to 90% of the corpus."""
    clock = Clock()
    state.save = clock.saved
    try:
        grow(plan, out, observer=clock)
    except Stopped:
        pass
    finally:
        state.save = clock.save
    saved = state.load(out / "state")
    assert saved is not None
    tensors = load_file(next((out / "state").glob("*.safetensors")))
    cursor, batch = saved.progress["cursor"], plan.training.batch_tokens
    store = TokenStore.open(out / "data" / "01")
    steps = int(0.9 * store.counts["train"].tokens / batch)
    cursor["position"] = steps * batch // plan.model.context
    progress = saved.progress | {"step": steps, "tokens": steps * batch, "cursor": cursor}
    state.save(out / "state", tensors, progress)
    lines = read_metrics(out)
    last = next(line for line in reversed(lines) if "lr" in line)
    for step in range(lines[-1]["step"] + 1, steps + 1):
        lines.append(last | {"step": step, "tokens": step * batch})
    (out / METRICS).write_text("".join(json.dumps(line) + "\n" for line in lines))
    return clock


def until_first_step(out: Path, *arguments: str) -> Cost:
    """Start `nacre grow`, wait for its first new step, end it; return what that took."""
    metrics = NewMetrics(out)
    before = max((line["step"] for line in metrics.read()), default=0)
    command = [sys.executable, "-W", "ignore", "-m", "nacre", "grow", *arguments, "--quiet"]
    started = time.perf_counter()
    child = subprocess.Popen(
        [*command, "--track", "none", "--out", str(out)],
        stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    try:
        while not any("lr" in line and line["step"] > before for line in metrics.read()):
            assert child.poll() is None, f"nacre grow ended with {child.returncode}"
            time.sleep(0.02)
        took = time.perf_counter() - started
        ticks = Path(f"/proc/{child.pid}/stat").read_text().rpartition(")")[2].split()[11:13]
    finally:
        child.kill()
        child.wait()
    return took, sum(map(int, ticks)) / os.sysconf("SC_CLK_TCK")


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--megabytes", type=float, default=16.0)
    options.add_argument("--repeats", type=int, default=3)
    asked = options.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as temporary:
        place = Path(temporary)
        text, run = place / "text.jsonl", place / "run"
        write_text(text, asked.megabytes)
        plan = small_plan(text, tokens=int(asked.megabytes * 1e6))
        config.write_yaml(plan, place / "plan.yaml")
        clock = stopped_run(plan, run)
        size = sum(path.stat().st_size for path in (run / "state").iterdir())
        save, step = middle(list(clock.saves.values())), clock.step()
        print(f"a save of {size / 1e6:.1f} MB: {said(save)}; a step: {said(step)}")
        shares = [100 * one / (SAVE_EVERY * each) for one, each in zip(save, step, strict=True)]
        print(f"saving every {SAVE_EVERY} steps: {shares[0]:.2f}% of the time, "
              f"{shares[1]:.2f}% of the processor's", flush=True)  # fmt: skip
        kinds: dict[str, Callable[[Path], Cost]] = {
            "resumed at 90%": lambda out: until_first_step(out, "--resume"),
            "started on tokens": lambda out: until_first_step(out, "--resume"),
            "started on text": lambda out: until_first_step(out, str(place / "plan.yaml")),
        }
        costs: dict[str, list[Cost]] = {kind: [] for kind in kinds}
        for _ in range(asked.repeats):
            for kind, measure in kinds.items():
                out = place / "again"
                if kind != "started on text":
                    shutil.copytree(run, out)
                if kind == "started on tokens":
                    state.clear(out / "state")
                    (out / METRICS).unlink()
                costs[kind].append(measure(out))
                shutil.rmtree(out)
        resumed = middle(costs["resumed at 90%"])
        for kind, found in costs.items():
            ratios = [one / other for one, other in zip(resumed, middle(found), strict=True)]
            print(f"{kind}: {said(middle(found))} to the first new step; resuming takes "
                  f"{ratios[0]:.2f}x the time, {ratios[1]:.2f}x the processor's")  # fmt: skip


def said(cost: Cost) -> str:
    return f"{cost[0]:.3f} s ({cost[1]:.3f} s of the processor)"


if __name__ == "__main__":
    main()
