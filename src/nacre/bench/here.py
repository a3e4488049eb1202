"""This machine as a device that plans can be estimated for: measured in seconds, by a few trials.

A large product, a triad in memory, a file on disk, and one step of a stage of the plan's own
width, context and vocabulary: what that reaches of the product's rate is the efficiency.
"""

from __future__ import annotations

import copy
import importlib
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from typing import Literal

import psutil
import torch
from transformers import PreTrainedConfig

from nacre.bench.measure import Clock, default_device, matrix_rate, synchronise, training_dtype
from nacre.errors import ConfigError, Problem
from nacre.growth import budget, scaling
from nacre.growth.devices import DEVICES, HERE, Cluster, Device
from nacre.growth.estimates import Efficiency, Estimate
from nacre.growth.plan import Plan
from nacre.growth.trunk import release_memory
from nacre.models import stock
from nacre.train.loss import Objective

SIDE = {"cpu": 1024, "cuda": 8192}  # of the product
TRIAD = {"cpu": 16_000_000, "cuda": 250_000_000}  # fp32 numbers, three times
TOKENS = {"cpu": 2048, "cuda": 16_384}  # of the stage's step at most, but one window
BLOCKS = 2  # of the stage that is tried
TRIALS = 5
DISK_BYTES = 64_000_000
Precision = Literal["bf16", "fp32"]


def estimate(
    plan: Plan,
    name: str,
    count: int,
    mfu: float | None = None,
    base: PreTrainedConfig | None = None,
) -> Estimate:
    """Estimate a plan on devices as `devices.parse` names them; `here` is measured first.

    `mfu` takes the place of the usual or the measured efficiency; `base` is the configuration of
    the checkpoint that the plan grows. Raises `ConfigError` for what cannot be estimated.
    """
    given = Efficiency.of(mfu)
    if name == HERE:
        device, measured = measure(plan, base)
        efficiency = Efficiency.of(measured) if mfu is None else given
        precision = precision_of(plan)
        return scaling.estimate(plan, Cluster(device), efficiency, base=base, precision=precision)
    if plan.training.precision == "fp32":
        message = f"fp32, but what is known of {name} is its rate in bf16"
        raise ConfigError(Problem("training.precision", message, "use bf16 or auto"))
    return scaling.estimate(plan, Cluster(DEVICES[name], count), given, base=base)


def precision_of(plan: Plan) -> Precision:
    """Return what the plan computes in on this machine."""
    asked = plan.training.precision
    if asked == "auto":
        return "bf16" if training_dtype(default_device()) == torch.bfloat16 else "fp32"
    return asked


def measure(
    plan: Plan, base: PreTrainedConfig | None = None, *, clock: Clock = time.perf_counter
) -> tuple[Device, float]:
    """Return this machine as a device, and the efficiency of the plan's stages on it.

    `base` is the configuration of the checkpoint that the plan grows, if any.
    """
    name = default_device()
    kind = torch.device(name).type
    side = SIDE.get(kind, SIDE["cpu"])
    dtype = torch.bfloat16 if precision_of(plan) == "bf16" else torch.float32
    peak = matrix_rate(dtype, side, side, side, name, clock=clock)
    bandwidth = triad(TRIAD.get(kind, TRIAD["cpu"]), name, clock)
    rate = stage_rate(plan, base, name, dtype, clock)
    peak = max(peak, matrix_rate(dtype, side, side, side, name, clock=clock), rate)
    cuda = kind == "cuda"
    held = 0 if cuda else resident()
    device = Device(
        name=HERE,
        flops=peak,
        memory=torch.cuda.mem_get_info(name)[1] if cuda else psutil.virtual_memory().total,
        bandwidth=bandwidth,
        disk=disk(),
        reserved=held,
        source=f"measured: a {str(dtype).removeprefix('torch.')} product of side {side:,}, a "
        f"triad, a flushed file; {torch.get_num_threads()} threads",
    )
    return device, rate / peak


def triad(numbers: int, device: str, clock: Clock) -> float:
    """Return the bytes/s of `a = b + 2 c` over fp32 vectors: two read, one written."""
    a, b, c = (torch.ones(numbers, device=device) for _ in range(3))
    return 12 * numbers / usual(lambda: torch.add(b, c, alpha=2.0, out=a), device, clock)


def usual(work: Callable[[], object], device: str, clock: Clock) -> float:
    """Return the median of a few runs after one that is not counted, in seconds."""
    times: list[float] = []
    for _ in range(TRIALS + 1):
        synchronise(device)
        started = clock()
        work()
        synchronise(device)
        times.append(clock() - started)
    return statistics.median(times[1:])


def resident() -> int:
    """Return the bytes that a process holds which has imported what a growth needs."""
    importlib.import_module("nacre.train.grow")
    release_memory()
    return psutil.Process().memory_info().rss


def disk(size: int = DISK_BYTES) -> float:
    """Return the bytes/s at which a file is written and flushed in the temporary folder."""
    data = os.urandom(size)
    with tempfile.TemporaryFile() as file:
        started = time.perf_counter()
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        return size / (time.perf_counter() - started)


def stage_rate(
    plan: Plan, base: PreTrainedConfig | None, device: str, dtype: torch.dtype, clock: Clock
) -> float:
    """Return the FLOP/s of a step of a small stage with the plan's blocks, head and context."""
    context, training = plan.model.context, plan.training
    if base is None:
        config = budget.model_config(plan, plan.tokenizer.size, BLOCKS)
    else:
        config = _shallow(base)
    counts = stock.count_parameters(config)
    model = stock.build(config).to(device)  # pyright: ignore[reportArgumentType]
    stock.find_parts(model).embedding.requires_grad_(False)
    exact = stock.splits_exactly(model, 0)
    objective = Objective(model, 0, mode="whole", exact=exact)
    most = TOKENS.get(torch.device(device).type, TOKENS["cpu"])
    windows = max(1, min(training.forward_tokens, most) // context)
    ids_BT = torch.randint(config.vocab_size, (windows, context), device=device)

    def step() -> None:
        enabled = dtype != torch.float32
        with torch.autocast(torch.device(device).type, dtype, enabled=enabled):
            loss = objective(ids_BT, ids_BT)
        loss.backward()
        model.zero_grad()

    attention = 4 * context * config.hidden_size * config.num_hidden_layers
    flops = 3 * (2 * (counts.blocks + counts.head) + attention) * ids_BT.numel()
    return flops / usual(step, device, clock)


def _shallow(base: PreTrainedConfig) -> PreTrainedConfig:
    """Return the configuration of the lowest blocks of a checkpoint."""
    config = copy.deepcopy(base.get_text_config())
    config.num_hidden_layers = min(BLOCKS, config.num_hidden_layers)
    for name in stock.PER_BLOCK:
        if isinstance(getattr(config, name, None), list):
            setattr(config, name, getattr(config, name)[: config.num_hidden_layers])
    return config
