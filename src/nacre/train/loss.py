"""What a stage minimises: next-token cross-entropy of the crown on the trunk's output.

Shapes: B batch, T positions, N = B * T, D width, V vocabulary.
"""

from __future__ import annotations

import torch
from torch import nn
from torch.nn import functional
from transformers import PreTrainedModel

from nacre.growth.trunk import RecomputedTrunk
from nacre.models import stock


class Objective(nn.Module):
    """A stage's loss as a module: trunk without gradients, crown, head, mean cross-entropy in nats.

    Where the decoder does not split exactly into trunk and crown (see `stock.splits_exactly`), or
    where the trunk itself trains (LoRA, a trained embedding), the model runs whole: gradients stop
    at whatever is frozen.
    """

    def __init__(self, model: PreTrainedModel, trunk_depth: int, *, trunk_trains: bool) -> None:
        super().__init__()
        self.model = model
        splits = not trunk_trains and stock.splits_exactly(model, trunk_depth)
        self.trunk = RecomputedTrunk(model, trunk_depth) if splits else None
        self.crown = stock.upper(model, trunk_depth) if splits else None
        self.head = stock.find_parts(model).head

    @property
    def trunk_mode(self) -> str:
        """`recompute`, or `whole` when the model runs in one piece."""
        return "whole" if self.trunk is None else "recompute"

    def forward(self, ids_BT: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
        """Return the mean loss (nats a token, fp32 scalar) of predicting `targets_BT` (int64)."""
        if self.trunk is None or self.crown is None:
            logits_BTV = self.model(input_ids=ids_BT, use_cache=False).logits
        else:
            h_BTD = self.trunk(ids_BT)
            h_BTD = self.crown(inputs_embeds=h_BTD, use_cache=False).last_hidden_state
            logits_BTV = self.head(h_BTD)
        return cross_entropy(logits_BTV, targets_BT)


def cross_entropy(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy in nats, computed in fp32."""
    return functional.cross_entropy(logits_BTV.flatten(0, 1).float(), targets_BT.flatten())
