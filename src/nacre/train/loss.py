"""What a stage minimises: next-token cross-entropy of the crown on the trunk's output.

Shapes: B batch, T positions, N = B * T, D width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from nacre.growth.trunk import RecomputedTrunk
from nacre.models import stock

CHUNK = 512  # rows of logits in memory at once; the fastest of 64 .. 4096 at V = 4,096 and 65,536


class Objective(nn.Module):
    """A stage's loss as a module: trunk without gradients, crown, head, mean cross-entropy in nats.

    Where the decoder does not split exactly into trunk and crown (see `stock.splits_exactly`), or
    where the trunk itself trains (LoRA, a trained embedding), its body runs whole: gradients stop
    at whatever is frozen.
    """

    def __init__(self, model: PreTrainedModel, trunk_depth: int, *, trunk_trains: bool) -> None:
        super().__init__()
        self.model = model
        self.parts = stock.find_parts(model)
        splits = stock.splits_exactly(model, trunk_depth)
        self.plain_head = splits and isinstance(self.parts.head, nn.Linear)
        cut = splits and not trunk_trains
        self.trunk = RecomputedTrunk(model, trunk_depth) if cut else None
        self.crown = stock.upper(model, trunk_depth) if cut else self.parts.decoder
        self.frozen_blocks = [] if trunk_trains else list(self.parts.blocks)[:trunk_depth]

    @property
    def trunk_mode(self) -> str:
        """`recompute`, or `whole` when the model runs in one piece."""
        return "whole" if self.trunk is None else "recompute"

    def train(self, mode: bool = True) -> Objective:
        """Switch to training; a trunk that does not train stays without dropout."""
        super().train(mode)
        for block in self.frozen_blocks:
            block.eval()
        return self

    def forward(self, ids_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Return the mean loss (nats a token, fp32 scalar) of predicting `targets_BT` (int64)."""
        if not self.plain_head:
            logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
            return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
        inputs = {"inputs_embeds": self.trunk(ids_BT)} if self.trunk else {"input_ids": ids_BT}
        h_BTD = self.crown(**inputs, use_cache=False).last_hidden_state
        head = self.parts.head
        return head_loss(h_BTD.flatten(0, 1), head.weight, head.bias, targets_BT.flatten())


def head_loss(
    h_ND: torch.Tensor,
    weight_VD: torch.Tensor,
    bias_V: torch.Tensor | None,
    targets_N: torch.Tensor,
) -> torch.Tensor:
    """Return the mean cross-entropy of a linear head, in nats, without `[N, V]` logits in memory.

    Equals `cross_entropy(linear(h_ND, weight_VD, bias_V).float(), targets_N)`. Products run in the
    autocast dtype where autocast is on, the softmax in fp32, `CHUNK` rows at a time.
    """
    device = h_ND.device.type
    dtype = weight_VD.dtype
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
    with torch.autocast(device, enabled=False):
        loss = _HeadLoss.apply(h_ND, weight_VD, bias_V, targets_N, dtype, torch.is_grad_enabled())
    assert isinstance(loss, torch.Tensor)
    return loss


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
    ) -> torch.Tensor:
        kinds = (h_ND.dtype, weight_VD.dtype, None if bias_V is None else bias_V.dtype)
        h_ND, weight_VD = h_ND.to(dtype), weight_VD.to(dtype)
        bias_V = None if bias_V is None else bias_V.to(dtype)
        total = torch.zeros((), device=h_ND.device)
        if with_gradients:
            d_h = torch.empty_like(h_ND)
            d_weight = torch.zeros_like(weight_VD, dtype=torch.float32)
            d_bias = None if bias_V is None else torch.zeros_like(bias_V, dtype=torch.float32)
        for start in range(0, len(h_ND), CHUNK):
            rows = slice(start, start + CHUNK)
            h_CD, target_C1 = h_ND[rows], targets_N[rows, None]
            logits_CV = functional.linear(h_CD, weight_VD, bias_V)
            log_probs_CV = torch.log_softmax(logits_CV, dim=-1, dtype=torch.float32)
            total -= log_probs_CV.gather(1, target_C1).sum()
            if with_gradients:
                d_logits_CV = log_probs_CV.exp_()
                minus_one = torch.full_like(target_C1, -1.0, dtype=torch.float32)
                d_logits_CV = d_logits_CV.scatter_add_(1, target_C1, minus_one).to(h_ND.dtype)
                torch.mm(d_logits_CV, weight_VD, out=d_h[rows])
                d_weight += d_logits_CV.T @ h_CD
                if d_bias is not None:
                    d_bias += d_logits_CV.sum(0, dtype=torch.float32)
        if with_gradients:
            gradients = zip((d_h, d_weight, d_bias), kinds, strict=True)
            ctx.save_for_backward(*(None if d is None else d.to(kind) for d, kind in gradients))
        ctx.rows = max(1, len(h_ND))
        return total / ctx.rows

    @staticmethod
    def backward(ctx: Any, *grad_outputs: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        d_h, d_weight, d_bias = ctx.saved_tensors
        factor = grad_outputs[0] / ctx.rows
        scaled = [None if d is None else d * factor.to(d.dtype) for d in (d_h, d_weight, d_bias)]
        return (*scaled, None, None, None)
