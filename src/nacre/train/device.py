"""What the machine offers: an Accelerator, fast bf16, and how much memory was used at most."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import psutil
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.utils import InitProcessGroupKwargs, parse_flag_from_env

from nacre import processes
from nacre.errors import ConfigError, Problem
from nacre.growth.plan import Training

TIMEOUT = timedelta(minutes=10)
"""How long a process waits in a step for the others before it gives them up."""


@contextlib.contextmanager
def accelerating(
    training: Training,
    context: int,
    out: Path | None = None,
    trackers: Sequence[str] = (),
    timeout: timedelta = TIMEOUT,
) -> Iterator[Accelerator]:
    """Give the Accelerator of a run, in bf16 where it is asked for or the device is fast.

    It connects this process with the others that a launcher has started. Accelerate keeps its
    settings for the whole process; they are forgotten at the end. Raises `ConfigError` where a
    machine has fewer GPUs than processes.
    """
    _check_devices()
    options: dict[str, Any] = {
        "cpu": processes.count() > 1 and not torch.accelerator.is_available(),
        "gradient_accumulation_steps": micro_batches(training, context),
        "kwargs_handlers": [InitProcessGroupKwargs(timeout=timeout)],
        "log_with": list(trackers) or None,
        "project_dir": None if out is None else str(out),
    }
    precision = training.precision
    try:
        if precision == "auto":
            probe = Accelerator(**options)
            precision = "bf16" if bf16_is_fast(probe.device) else "fp32"
            AcceleratorState._reset_state(reset_partial_state=True)
        mixed = {"bf16": "bf16", "fp32": "no"}[precision]
        yield Accelerator(mixed_precision=mixed, **options)
    finally:
        AcceleratorState._reset_state(reset_partial_state=True)
        processes.disconnect()


def _check_devices() -> None:
    here, there = int(os.environ.get("LOCAL_WORLD_SIZE", "1")), torch.cuda.device_count()
    if default_device().type == "cuda" and here > there:
        message = f"{here} on a machine of {there} GPU{'s' if there != 1 else ''}"
        fix = "start one for each GPU, or set ACCELERATE_USE_CPU=1"
        raise ConfigError(Problem("processes", message, fix))


def default_device() -> torch.device:
    """Return CUDA where there is some, and where accelerate's `ACCELERATE_USE_CPU` is not set."""
    cuda = torch.cuda.is_available() and not parse_flag_from_env("ACCELERATE_USE_CPU")
    return torch.device("cuda" if cuda else "cpu")


def micro_batches(training: Training, context: int) -> int:
    """Return in how many forward passes, of equal size, a process runs its part of a batch."""
    share = training.batch_tokens // context // processes.count()
    return share // forward_windows(training, context)


def forward_windows(training: Training, context: int) -> int:
    """Return how many windows a process runs at once, in training as in evaluation."""
    return training.forward_windows(context, processes.count())


def bf16_is_fast(device: torch.device) -> bool:
    """Tell whether the device has bf16 matrix instructions (CUDA from 8.0, AVX512-BF16 or AMX)."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type == "cpu":
        return any(cpu_features().values())
    return device.type == "xpu"


def cpu_features() -> dict[str, bool]:
    """Return which bf16 matrix instructions the processor has, by name."""
    capabilities = torch.cpu.get_capabilities()
    names = {"AMX-BF16": "amx_bf16", "AVX512-BF16": "avx512_bf16", "Arm BF16": "bf16"}
    return {shown: bool(capabilities.get(name, False)) for shown, name in names.items()}


class PeakMemory:
    """The most memory this process held since `reset`, in bytes.

    On CUDA, allocated device memory. On Linux, resident memory as the kernel counts it; elsewhere
    the largest resident size seen by calls of `read`.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.process = psutil.Process()
        self.seen = 0
        self.reset()

    def reset(self) -> None:
        """Start counting anew."""
        self.seen = 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        else:
            with contextlib.suppress(OSError):
                Path("/proc/self/clear_refs").write_text("5")

    def read(self) -> int:
        """Return the peak since `reset`, in bytes."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device)
        self.seen = max(self.seen, self.process.memory_info().rss, _high_water_mark())
        return self.seen


def _high_water_mark() -> int:
    try:
        status = Path("/proc/self/status").read_text()
    except OSError:
        return 0
    line = next((line for line in status.splitlines() if line.startswith("VmHWM:")), "VmHWM: 0 kB")
    return int(line.split()[1]) * 1024
