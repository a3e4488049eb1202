"""The frozen-trunk engine: how the blocks that no longer train give the crown its input.

Mode `recompute` runs the trunk for every batch: without gradients, without keeping activations, in
the precision of the products. Mode `cache` runs it once for every window of text, see
`nacre.growth.outputs`; afterwards the trunk leaves memory. Both give the crown the same numbers.

Shapes: B batch, T positions, D width; `ids_BT`, `h_BTD`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import logging
from collections.abc import Mapping
from importlib.util import find_spec
from typing import Literal

import torch
from torch import nn
from transformers import PreTrainedModel

from nacre.errors import ConfigError, Problem, clone_install
from nacre.growth import ledger
from nacre.models import stock

Weights = Literal["auto", "int8", "fp8"]

NOT_COMPUTED = (
    "num_hidden_layers", "_name_or_path", "architectures", "transformers_version", "dtype",
)  # fmt: skip
"""Entries of a configuration that do not change what a given block computes."""


class RecomputedTrunk(nn.Module):
    """Frozen blocks `start` to `depth` of a model, run without gradients and without dropout.

    A view: the weights are the model's own. With `start` 0 it takes token ids (int64), else the
    outputs of the blocks below. Its outputs are what training sees whether autocast is on or not.
    """

    def __init__(self, model: PreTrainedModel, depth: int, start: int = 0) -> None:
        super().__init__()
        self.start = start
        self.body = stock.middle(model, start, depth) if start else stock.lower(model, depth)

    def forward(self, below: torch.Tensor) -> torch.Tensor:
        """Return `h_BTD`, the input of what is above, for `ids_BT` or `h_BTD`."""
        self.body.eval()
        inputs = {"inputs_embeds": below.to(self.dtype)} if self.start else {"input_ids": below}
        with torch.inference_mode(), torch.autocast(below.device.type, enabled=False):
            h_BTD = self.body(**inputs, use_cache=False).last_hidden_state
        return h_BTD.clone()  # outside: a tensor that autograd may save

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of the outputs."""
        return next(self.body.parameters()).dtype


def reduce_precision(
    model: PreTrainedModel, depth: int, dtype: torch.dtype, weights: Weights = "auto"
) -> None:
    """Cast the substrate and the first `depth` blocks to `dtype`, in place; they never train again.

    `weights` keeps the blocks' linear layers in 8 bits (torchao, weights only). A model without
    trunk keeps its substrate as it is. Raises `ConfigError` where torchao is not installed.
    """
    if not depth:
        return
    require_torchao(weights)
    for parameter in stock.lower(model, depth).parameters():
        parameter.data = parameter.data.to(dtype)
    if weights != "auto":
        from torchao.quantization import (  # pyright: ignore[reportMissingImports]
            Float8WeightOnlyConfig,
            Int8WeightOnlyConfig,
            quantize_,
        )

        kind = {"int8": Int8WeightOnlyConfig, "fp8": Float8WeightOnlyConfig}[weights]
        for block in list(stock.find_parts(model).blocks)[:depth]:
            quantize_(block, kind())


def require_torchao(weights: Weights) -> None:
    """Raise `ConfigError` if the plan wants 8-bit weights and torchao is missing."""
    if weights != "auto" and find_spec("torchao") is None:
        message = f"{weights} needs torchao, which is not installed"
        fix = f"{clone_install('quantize')}, or trunk.weights: auto"
        raise ConfigError(Problem("trunk.weights", message, fix))


def unload(model: PreTrainedModel, depth: int) -> None:
    """Take the first `depth` blocks and the substrate out of memory; their shapes stay."""
    parts = stock.find_parts(model)
    for module in (*list(parts.blocks)[:depth], parts.embedding):
        module.to("meta")
    release_memory()


def release_memory() -> None:
    """Hand freed memory back to the system, so that the next phase's peak is its own."""
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    try:
        ctypes.CDLL("libc.so.6").malloc_trim(0)
    except (OSError, AttributeError):  # not glibc: its allocator decides
        logging.getLogger(__name__).debug("freed memory stays with the allocator")


def fingerprint(
    model: PreTrainedModel,
    hashes: Mapping[str, str],
    depth: int,
    dtype: torch.dtype,
    weights: Weights = "auto",
) -> str:
    """Return the SHA-256 (hex) of what decides the outputs of a model's first `depth` blocks.

    `hashes` are those of every frozen tensor. Counted are the tensors below the crown, the model's
    configuration but for its depth, and the precision.
    """
    parts = stock.find_parts(model)
    above = (f"{parts.head_name}.", f"{parts.norm_name}.")
    names = [
        name
        for name in hashes
        if not name.startswith(above) and (stock.block_index(parts, name) or 0) < depth
    ]
    config = model.config.to_dict()
    for key in NOT_COMPUTED:
        config.pop(key, None)
    for key in stock.PER_BLOCK:
        config[key] = (config.get(key) or [])[:depth]
    said = [ledger.fingerprint(hashes, names), depth, str(dtype), weights, config]
    return hashlib.sha256(json.dumps(said, sort_keys=True, default=str).encode()).hexdigest()
