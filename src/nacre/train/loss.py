"""What a stage minimises: next-token cross-entropy of the crown on the trunk's output.

Shapes: B batch, T positions, N = B * T, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any, Literal

import torch
from torch import nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers import PreTrainedModel

from nacre.growth.trunk import RecomputedTrunk
from nacre.models import stock

TrunkMode = Literal["recompute", "cache", "whole"]

IGNORED = -100  # as torch.nn.functional.cross_entropy has it
LOGIT_BYTES = {"cpu": 64 * 2**20, "cuda": 512 * 2**20}  # of fp32 logits in memory at once
CHUNK = {"cpu": 2048, "cuda": 4096}  # rows of logits at once, if LOGIT_BYTES allow


class Objective(nn.Module):
    """A stage's loss as a module: trunk without gradients, crown, head, mean cross-entropy in nats.

    It holds what its stage runs and no more. Mode `recompute`: trunk and crown; `cache`: the crown
    alone, which is given the trunk's outputs; `whole`: the decoder in one piece, because the trunk
    itself trains (LoRA, a trained embedding) or because it does not split: `exact` is what
    `stock.splits_exactly` says. Gradients stop at whatever is frozen.
    """

    compiled: bool = False
    """Whether the head's loss is compiled where it trains."""

    def __init__(
        self, model: PreTrainedModel, trunk_depth: int, *, mode: TrunkMode, exact: bool
    ) -> None:
        super().__init__()
        assert exact or mode == "whole"
        parts = stock.find_parts(model)
        whole = mode == "whole"
        self.trunk_mode: TrunkMode = mode
        self.trunk = RecomputedTrunk(model, trunk_depth) if mode == "recompute" else None
        self.crown = parts.decoder if whole else stock.upper(model, trunk_depth)
        self.head = parts.head
        self.model = None if exact else model
        self.frozen_blocks = [] if whole or mode == "cache" else list(parts.blocks)[:trunk_depth]

    def train(self, mode: bool = True) -> Objective:
        """Switch to training; a trunk that does not train stays without dropout."""
        super().train(mode)
        for block in self.frozen_blocks:
            block.eval()
        return self

    def forward(
        self,
        ids_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        below_BTD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the mean loss (nats a token, fp32 scalar) of predicting `targets_BT` (int64).

        `below_BTD` is the trunk's output: in mode `cache` it must be given.
        """
        if self.model is not None:
            logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
            return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
        if self.trunk is not None:
            below_BTD = self.trunk(ids_BT)
        if below_BTD is not None:
            inputs = {"inputs_embeds": below_BTD.to(self.head.weight.dtype)}
        else:
            inputs = {"input_ids": ids_BT}
        h_BTD = self.crown(**inputs, use_cache=False).last_hidden_state
        head = self.head
        return head_loss(
            h_BTD.flatten(0, 1), head.weight, head.bias, targets_BT.flatten(),
            compiled=self.compiled,
        )  # fmt: skip


def head_loss(
    h_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
    *,
    compiled: bool = False,
) -> torch.Tensor:
    """Return the mean cross-entropy of a linear head, in nats, without `[N, V]` logits in memory.

    Equals `cross_entropy(linear(h_ND, weight_VD, bias_V).float(), targets_N)`; targets of -100 do
    not count, and without any that count the loss is 0. Products run in the autocast dtype where
    autocast is on, the softmax in fp32, `chunk_rows` rows at a time; `compiled` fuses its passes
    over the logits where there are gradients.
    """
    device = h_ND.device.type
    dtype = weight_VD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        trains = torch.is_grad_enabled()
        softmax = _compiled_softmax() if compiled and trains else _softmax_in_place
        loss = _HeadLoss.apply(h_ND, weight_VD, bias_V, targets_N, dtype, trains, softmax)
    assert isinstance(loss, torch.Tensor)
    return loss


def chunk_rows(vocabulary: int, device: str) -> int:
    """Return how many rows of logits are in memory at once on a type of device."""
    kind = device if device in CHUNK else "cuda"
    return max(1, min(CHUNK[kind], LOGIT_BYTES[kind] // (4 * vocabulary)))


Softmax = tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]
"""Of rows of logits: the sum of their losses, and its gradients by logits and bias if wanted."""


def _softmax_in_place(
    logits_CV: torch.Tensor,
    targets_C1: torch.Tensor,
    dtype: torch.dtype,
    gradients: tuple[bool, bool],
) -> Softmax:
    """Use the logits up; of `gradients` (logits, bias) the first is made in `dtype`."""
    logits_CV = logits_CV.float()
    counts_C1 = targets_C1 != IGNORED
    targets_C1 = targets_C1.clamp(min=0)
    target_logits_C1 = logits_CV.gather(1, targets_C1)
    highest_C1 = logits_CV.amax(1, keepdim=True)
    sums_C1 = logits_CV.sub_(highest_C1).exp_().sum(1, keepdim=True)
    losses_C1 = sums_C1.log() + highest_C1 - target_logits_C1
    loss = losses_C1.masked_fill(~counts_C1, 0.0).sum()
    if not gradients[0]:
        return loss, None, None
    d_logits_CV = logits_CV.mul_(counts_C1 / sums_C1)
    d_logits_CV.scatter_add_(1, targets_C1, -counts_C1.to(d_logits_CV.dtype))
    return loss, d_logits_CV.to(dtype), d_logits_CV.sum(0) if gradients[1] else None


def _softmax(
    logits_CV: torch.Tensor,
    targets_C1: torch.Tensor,
    dtype: torch.dtype,
    gradients: tuple[bool, bool],
) -> Softmax:
    """Compute what `_softmax_in_place` does, written for a compiler: no pass stores fp32 logits."""
    logits_CV = logits_CV.float()
    counts_C1 = targets_C1 != IGNORED
    is_target_CV = torch.arange(logits_CV.shape[1], device=logits_CV.device) == targets_C1
    highest_C1 = logits_CV.amax(1, keepdim=True)
    exp_CV = (logits_CV - highest_C1).exp()
    sums_C1 = exp_CV.sum(1, keepdim=True)
    target_logits_C1 = logits_CV.gather(1, targets_C1.clamp(min=0))
    losses_C1 = sums_C1.log() + highest_C1 - target_logits_C1
    loss = losses_C1.masked_fill(~counts_C1, 0.0).sum()
    d_logits_CV = exp_CV * (counts_C1 / sums_C1) - is_target_CV.float()
    return loss, d_logits_CV.to(dtype), d_logits_CV.sum(0) if gradients[1] else None


@cache
def _compiled_softmax() -> Callable[..., Softmax]:
    return torch.compile(_softmax, dynamic=False)


class _HeadLoss(torch.autograd.Function):
    """Linear head and cross-entropy in one: the forward pass already makes the gradients.

    The gradient of the mean loss does not depend on what follows but for a factor, so each chunk
    of logits is used and thrown away (as in Liger Kernel, Hsu et al. 2024).
    """

    @staticmethod
    def forward(
        ctx: Any,
        h_ND: torch.Tensor,
        weight_VD: torch.Tensor,
        bias_V: torch.Tensor | None,
        targets_N: torch.Tensor,
        dtype: torch.dtype,
        with_gradients: bool,
        softmax: Callable[..., Softmax],
    ) -> torch.Tensor:
        kinds = (h_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        h_ND, weight_VD = h_ND.to(dtype), weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
        total = torch.zeros((), device=h_ND.device)
        if with_gradients:
            d_h = torch.empty_like(h_ND)
            d_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            d_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        chunk = chunk_rows(len(weight_VD), h_ND.device.type)
        gradients = (with_gradients, bias_V is not None)
        for start in range(0, len(h_ND), chunk):
            rows = slice(start, start + chunk)
            h_CD = h_ND[rows]
            # No name here holds the logits: the softmax frees them.
            loss, d_logits_CV, d_shift = softmax(
                functional.linear(h_CD, weight_VD, bias_V), targets_N[rows, None], dtype, gradients
            )
            total += loss
            if d_logits_CV is None:
                continue
            if d_bias is not None and d_shift is not None:
                d_bias += d_shift
            torch.mm(d_logits_CV, weight_VD, out=d_h[rows])
            if dtype == torch.float32:
                d_weight.addmm_(d_logits_CV.T, h_CD)
            else:
                d_weight += d_logits_CV.T @ h_CD
        ctx.counted = (targets_N != IGNORED).sum().clamp(min=1)
        ctx.gradients = None
        if with_gradients:
            made = zip((d_h, d_weight, d_bias), kinds, strict=True)
            ctx.gradients = [None if d is None else d.to(kind) for d, kind in made]
        return total / ctx.counted

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        if ctx.gradients is None:
            raise RuntimeError("the gradients of a head's loss are handed out once")
        gradients, ctx.gradients = ctx.gradients, None  # autograd copies what is still held here
        factor = grad_outputs[0] / ctx.counted
        for gradient in gradients:
            if gradient is not None:
                gradient.mul_(factor.to(gradient.dtype))
        return (*gradients, None, None, None, None)
