"""Suite `paper`: how much of a GPU a stage of the papers' own shape uses."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

from nacre.bench import stages
from nacre.bench.measure import (
    Effort,
    Row,
    Target,
    compare,
    default_device,
    matrix_rate,
    training_dtype,
)
from nacre.bench.stages import Steps
from nacre.growth import plan

RECIPE, STAGE = "paper-9x3-glyph", 3
BATCHES = 3  # of distinct text
UTILISATION = 45.0  # percent
PRODUCT_SIDE = {"cpu": 512, "cuda": 8192}


def suite(effort: Effort) -> Iterator[Row]:
    """Yield the utilisation of the papers' third stage: 3 blocks on a trunk of 6, recomputed.

    Nothing on a CPU, where a step takes hours, unless `effort` is quick.
    """
    device = default_device()
    if not (device.startswith("cuda") or effort.quick):
        return
    settings = ["trunk.mode=recompute"]
    if effort.quick:
        settings += ["tokenizer.size=512", "tokenizer.alphabet=corpus", "model.width=64"]
        settings += ["model.heads=2", "model.context=32"]
        settings += ["training.batch_tokens=128", "training.micro_batch_tokens=64"]
    loaded = plan.load(RECIPE, settings)
    planned = loaded.model_copy(update={"stages": loaded.stages[:STAGE]})
    shape, training = planned.model, planned.training
    title = f"{RECIPE}, stage {STAGE}, {training.batch_tokens:,} tokens: recompute"
    effort.say(title)
    stages.reset()
    side = 128 if effort.quick else PRODUCT_SIDE[torch.device(device).type]
    product = (training_dtype(device), side, side, side, device)
    rate = matrix_rate(*product)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        store = stages.random_store(
            folder / "data", planned.tokenizer.size, shape.context,
            BATCHES * training.batch_tokens // shape.context,
        )  # fmt: skip
        step = Steps(planned, store, folder / "run", stages.make_accelerator(planned, device))
        try:
            step()  # blocks may compile
            taken = compare({"step": step}, effort.rounds, effort.seconds, device=device)["step"]
        finally:
            step.close()
    stages.reset()
    rate = max(rate, matrix_rate(*product))
    flops = stages.flops(planned, trunk_runs=True) * training.batch_tokens
    used = taken.per(100 * flops / rate)
    yield Row(
        suite="paper",
        case=title,
        unit="%",
        better="higher",
        measured=used.median,
        spread=used.spread,
        rounds=len(used.values),
        limit=100.0,
        limit_name=f"{stages.FLOPS_NAME} {side:,} x {side:,} x {side:,}",
        target=Target("measured", UTILISATION),
        note=f"{title}: {taken.median:.3f} s a step, "
        f"{taken.per(training.batch_tokens).median:,.0f} tokens/s, "
        f"product rate {rate / 1e12:,.1f} TFLOP/s",
    )
