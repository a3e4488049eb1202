"""Sharding: several processes hold a part each of what a stage trains, and of its trunk (FSDP2).

A block is gathered when it runs, and its gradient is reduced to the part that a process keeps; a
frozen block has neither gradient nor optimizer state. Without sharding each process holds all.
"""

from __future__ import annotations

import contextlib
import ctypes
from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from nacre import processes
from nacre.growth.plan import Training
from nacre.models import stock

MMAP_THRESHOLD = -3  # of mallopt(3)
LARGE = 1 << 20  # bytes


def shards(training: Training) -> bool:
    """Tell whether a stage is sharded: its plan says so, and there are several processes."""
    return training.shard != "none" and processes.count() > 1


def shard(objective: nn.Module, model: PreTrainedModel, training: Training) -> None:
    """Shard what `training.shard` says among all processes, in place: parameters become DTensors.

    `crown`: whatever holds something that trains; `all`: the frozen blocks and the substrate too.
    """
    parts = stock.find_parts(model)
    held = set(objective.modules())
    kept: set[nn.Parameter] = set()
    for module in (parts.embedding, *parts.blocks):
        if module not in held:
            continue
        if training.shard == "all" or any(p.requires_grad for p in module.parameters()):
            fully_shard(module)
        else:
            kept |= set(module.parameters())
    fully_shard(objective, ignored_params=kept)
    if next(objective.parameters()).device.type == "cpu":
        _free_at_once()


def _free_at_once() -> None:
    """Let glibc hand every large buffer back to the system as soon as it is free.

    It keeps those below 32 MB, and what is gathered for each block lies among what stays: of two
    processes each held 0.79 of what one does, not 0.59 (benchmarks/processes.py, 16 blocks).
    """
    with contextlib.suppress(OSError, AttributeError):  # not glibc
        ctypes.CDLL("libc.so.6").mallopt(MMAP_THRESHOLD, LARGE)


def leave_frozen_alone(objective: nn.Module) -> None:
    """Keep data-parallel training from sending what does not train; every process has loaded it."""
    frozen = [name for name, p in objective.named_parameters() if not p.requires_grad]
    frozen += [name for name, _ in objective.named_buffers()]
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(objective, frozen)


def is_sharded(objective: nn.Module) -> bool:
    """Tell whether `shard` was here."""
    return isinstance(objective, FSDPModule)


def let_go(objective: nn.Module) -> None:
    """Give back what a forward pass gathered and no backward pass will: after an evaluation."""
    if isinstance(objective, FSDPModule):
        objective.reshard()


@torch.no_grad()
def put_together(tensors: Mapping[str, torch.Tensor], whole: nn.Module | None) -> None:
    """Copy sharded tensors into the parameters of the same name in `whole`, one after the other.

    All processes take part; one without a module to fill gives None.
    """
    targets = dict(whole.named_parameters()) if whole is not None else {}
    for name, tensor in tensors.items():
        found = processes.whole(tensor)
        if whole is not None:
            targets[name].copy_(found)
