"""What this machine and this installation offer a run."""

from __future__ import annotations

import platform
import shutil
from importlib import util
from pathlib import Path
from typing import Any

import psutil
import torch

from nacre.train.device import bf16_is_fast, cpu_features, default_device
from nacre.train.folder import versions

EXTRAS = {
    "datasets": "data", "pyarrow": "data", "zstandard": "data", "tensorboard": "track",
    "lm_eval": "eval", "sacrebleu": "eval",
}  # fmt: skip


def examine(folder: Path) -> dict[str, Any]:
    """Return versions, device, bf16 support, threads, memory and the free disk under `folder`."""
    device = default_device()
    memory = psutil.virtual_memory()
    return {
        "python": platform.python_version(),
        "versions": versions(),
        "extras": {name: util.find_spec(name) is not None for name in EXTRAS},
        "system": platform.platform(),
        "device": str(device),
        "accelerator": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "bf16": bf16_is_fast(device),
        "cpu_features": cpu_features(),
        "cores": psutil.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": memory.total,
        "memory_free_bytes": memory.available,
        "disk_free_bytes": shutil.disk_usage(folder).free,
    }
