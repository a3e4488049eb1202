"""What a report costs: python benchmarks/report.py [--out FOLDER] [--repeats N]

Of a run of 12 stages and 10,000 steps: the seconds of `nacre report`, and of only starting Python
and importing what it uses; the bytes of the page; the seconds until Chromium has loaded the page
and drawn its charts, where Playwright and Debian's Chromium are there. With `--out` run and report
stay for looking at. Seconds of the processor stand beside those of the clock: a busy machine
changes mostly the latter.

The run is made for this, it is no result: a real growth of 12 stages by the recipe `tiny`, a few
steps each, whose metrics and records are then stretched to 10,000 steps with numbers as a run of
that length would have. What it takes to read and draw them is the same.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path
from statistics import median
from typing import Any

from nacre import config
from nacre.folders import METRICS, PLAN
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.train import files
from nacre.train.grow import grow

STAGES, STEPS, EVALUATE_EVERY = 12, 10_000, 50
LORA = (4, 8, 12)
CHROMIUM = shutil.which("chromium")
DRAWN = """async () => {
  await Promise.all([...document.images].map(image => image.decode()));
  await new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)));
}"""
Cost = tuple[float, float]
"""Seconds by the clock, and of the processor."""


def twelve_stages(steps: int) -> Plan:
    """Return the recipe `tiny` with 12 stages, `steps` in all."""
    data = plans.load("tiny").model_dump(mode="json", by_alias=True)
    batch = data["training"]["batch_tokens"]
    stages = []
    for stage in range(1, STAGES + 1):
        own = steps // STAGES + (steps % STAGES if stage == STAGES else 0)
        lora = {"rank": 4, "alpha": 8} if stage in LORA else None
        stages.append({"add_blocks": 1, "tokens": own * batch, "lora": lora})
    return plans.parse(data | {"name": "twelve-stages", "stages": stages})


def make_run(out: Path) -> None:
    """Grow 12 stages of 2 steps each, and stretch what they left to 10,000 steps."""
    grow(twelve_stages(2 * STAGES), out)
    plan = twelve_stages(STEPS)
    config.write_yaml(plan, out / PLAN)
    chance = random.Random(0)
    lines: list[dict[str, Any]] = []
    for stage, path in enumerate(files.stages(out), 1):
        record = json.loads((path / files.RECORD).read_text(encoding="utf-8"))
        tokens, speed = plan.stages[stage - 1].tokens, 21_000.0 / (1 + 0.04 * stage)
        steps = tokens // plan.training.batch_tokens
        for step in range(steps + 1):
            at = {"stage": stage, "step": step, "tokens": step * plan.training.batch_tokens}
            held_out = loss(stage, step / steps)
            if step:
                noisy = held_out - 0.03 + chance.gauss(0, 0.08)
                rate = {"lr": 1e-3, "grad_norm": 0.4, "tokens_per_second": speed}
                lines.append(at | rate | {"loss": noisy})
            if step % EVALUATE_EVERY == 0 and step < steps:
                lines.append(at | {"validation": scores(held_out)})
        record |= {
            "tokens": tokens,
            "seconds": tokens / speed,
            "tokens_per_second": speed,
            "validation": scores(loss(stage, 1.0)),
        }
        files.write_json(path / files.RECORD, record)
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (out / METRICS).write_text(text, encoding="utf-8")


def loss(stage: int, part: float) -> float:
    """Return a held-out loss that starts high, rises a little at every new stage, and falls."""
    floor = 3.3 + 1.1 / stage
    start = 8.32 if stage == 1 else floor + 0.35
    return floor + (start - floor) * math.exp(-part * (9 if stage == 1 else 4))


def scores(value: float) -> dict[str, float]:
    return {"loss": value, "perplexity": math.exp(value), "bits_per_byte": value / 2.42}


def timed(*arguments: str) -> Cost:
    """Run Python with these arguments in a process of its own; return what it took."""
    before, started = os.times(), time.perf_counter()
    subprocess.run(
        [sys.executable, "-W", "ignore", *arguments], check=True, stdout=subprocess.DEVNULL
    )
    took, after = time.perf_counter() - started, os.times()
    used = after.children_user + after.children_system
    return took, used - before.children_user - before.children_system


def middle(costs: list[Cost]) -> Cost:
    """Return the median of both kinds of seconds."""
    return median(cost[0] for cost in costs), median(cost[1] for cost in costs)


def opened(index: Path, repeats: int) -> tuple[float, float]:
    """Return the median seconds until the load event, and until all charts are drawn."""
    from playwright.sync_api import sync_playwright

    loads: list[float] = []
    draws: list[float] = []
    with sync_playwright() as started:
        browser = started.chromium.launch(
            executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"]
        )
        for _ in range(repeats):
            page = browser.new_page(viewport={"width": 1200, "height": 900})
            begun = time.perf_counter()
            page.goto(index.absolute().as_uri(), wait_until="load")
            loads.append(time.perf_counter() - begun)
            page.evaluate(DRAWN)
            draws.append(time.perf_counter() - begun)
            page.close()
        browser.close()
    return median(loads), median(draws)


def said(cost: Cost) -> str:
    return f"{cost[0]:.2f} s ({cost[1]:.2f} s of the processor)"


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--out", type=Path, help="keep the run here; made where it is not there")
    options.add_argument("--repeats", type=int, default=3)
    asked = options.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = asked.out or Path(temporary) / "run"
        if not run.exists():
            make_run(run)
        again = range(asked.repeats)
        imports = middle([timed("-c", "import nacre.cli, nacre.report") for _ in again])
        whole = middle([timed("-m", "nacre", "report", str(run)) for _ in again])
        lines = len((run / METRICS).read_text(encoding="utf-8").splitlines())
        print(f"{STAGES} stages, {STEPS:,} steps, {lines:,} lines of metrics")
        print(f"nacre report: {said(whole)}; of it Python and imports: {said(imports)}")
        written = sorted((run / "report").iterdir())
        index = run / "report" / "index.html"
        print(f"the page: {index.stat().st_size / 1e6:.2f} MB; all {len(written)} files: "
              f"{sum(path.stat().st_size for path in written) / 1e6:.2f} MB")  # fmt: skip
        if CHROMIUM and find_spec("playwright"):
            load, drawn = opened(index, asked.repeats)
            print(f"Chromium: loaded after {load:.2f} s, all charts drawn after {drawn:.2f} s")
        else:
            print("Chromium: not measured, it needs Playwright and /usr/bin/chromium")


if __name__ == "__main__":
    main()
