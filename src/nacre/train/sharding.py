"""Sharding: several processes hold a part each of what a stage trains, and of its trunk (FSDP2).

A block is gathered when it runs, and its gradient is reduced to the part that a process keeps; a
frozen block has neither gradient nor optimizer state. Without sharding each process holds all.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.nn.parallel import DistributedDataParallel
from transformers import PreTrainedModel

from nacre import processes
from nacre.growth.plan import Training
from nacre.models import stock


def shards(training: Training) -> bool:
    """Tell whether a stage is sharded: its plan says so, and there are several processes."""
    return training.shard != "none" and processes.count() > 1


def shard(objective: nn.Module, model: PreTrainedModel, training: Training) -> None:
    """Shard what `training.shard` says among all processes, in place: parameters become DTensors.

    `crown`: whatever holds something that trains; `all`: the frozen blocks and the substrate too.
    """
    parts = stock.find_parts(model)
    held = set(objective.modules())
    whole: set[nn.Parameter] = set()
    for module in (parts.embedding, *parts.blocks):
        if module not in held:
            continue
        if training.shard == "all" or any(p.requires_grad for p in module.parameters()):
            fully_shard(module)
        else:
            whole |= set(module.parameters())
    fully_shard(objective, ignored_params=whole)


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
def gathered(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return named tensors whole and on the CPU, one gathered after the other; same names."""
    return {name: processes.whole(tensor).detach().cpu() for name, tensor in tensors.items()}
