"""The ledger: proof that what should be frozen did not move, tensor by tensor or file by file."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from torch import nn

from nacre import processes


class LedgerError(RuntimeError):
    """A frozen tensor changed: a bug, never a user's mistake. The run stops."""


def tensor_hash(tensor: torch.Tensor) -> str:
    """Return the SHA-256 (hex) of a tensor's shape, dtype and bytes (any device).

    Of a sharded one it gathers the whole: all processes must ask for it.
    """
    tensor = processes.whole(tensor).detach().cpu().contiguous()
    digest = hashlib.sha256(f"{tensor.dtype} {tuple(tensor.shape)} ".encode())
    digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def file_hash(path: Path) -> str:
    """Return the SHA-256 (hex) of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def frozen_hashes(model: nn.Module) -> dict[str, str]:
    """Return the hash of every parameter and saved buffer that does not train, by name.

    What is not in memory as plain numbers (a trunk on the meta device or in 8 bits) is left out.
    """
    trainable = {name for name, p in model.named_parameters() if p.requires_grad}
    return {
        name: tensor_hash(tensor)
        for name, tensor in model.state_dict().items()
        if name not in trainable and not tensor.is_meta and type(tensor) is torch.Tensor
    }


def verify_frozen(model: nn.Module, before: Mapping[str, str]) -> None:
    """Raise `LedgerError` unless every tensor in `before` is still there, bit for bit."""
    state = model.state_dict()
    moved = [
        name
        for name, expected in before.items()
        if name not in state or tensor_hash(state[name]) != expected
    ]
    if moved:
        raise LedgerError(f"frozen tensors changed during training ({len(moved)}): {moved[:5]}")


def fingerprint(hashes: Mapping[str, str], names: Iterable[str] | None = None) -> str:
    """Return one SHA-256 (hex) over named tensor hashes, in the order of the names."""
    chosen = sorted(hashes if names is None else names)
    return hashlib.sha256("\n".join(f"{n} {hashes[n]}" for n in chosen).encode()).hexdigest()
