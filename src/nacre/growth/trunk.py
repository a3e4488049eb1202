"""The frozen-trunk engine: run the trunk without gradients and give its output to the crown.

Mode `recompute` runs the trunk for every batch. No activation of it is kept, so the memory of a
stage is that of its crown plus the trunk's weights.

Shapes: B batch, T positions, D width; `ids_BT`, `h_BTD`.
"""

from __future__ import annotations

import torch
from torch import nn
from transformers import PreTrainedModel

from nacre.models import stock


class RecomputedTrunk(nn.Module):
    """The first `depth` blocks of a model, run under no-grad and without dropout for every batch.

    It holds a view of the model: the weights are the model's own.
    """

    def __init__(self, model: PreTrainedModel, depth: int) -> None:
        super().__init__()
        self.body = stock.lower(model, depth)

    @torch.no_grad()
    def forward(self, ids_BT: torch.Tensor) -> torch.Tensor:
        """Return `h_BTD`, the input of the crown, for token ids (int64)."""
        self.body.eval()
        return self.body(input_ids=ids_BT, use_cache=False).last_hidden_state
