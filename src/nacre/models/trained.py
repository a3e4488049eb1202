"""Mixing rules that are trained: a gate over hidden states, an adapter over logits.

They begin as the mean of the experts' probabilities and of their log-probabilities, and never touch
an expert.

Shapes: E experts, B batch, T positions, D width of an expert, V vocabulary, r rank, k candidates;
N positions in any arrangement.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import nn
from torch.nn import functional

from .mixing import IMPOSSIBLE
from .rules import LARGEST_ADAPTER, Rule


class Gate(nn.Module):
    """Weights of the experts at a position from the final hidden states of all of them.

    log w = log_softmax(b + sum_e W_e h_e), a linear gate as in Jacobs et al. 1991 ("Adaptive
    mixtures of local experts"), here over experts that are finished and frozen.
    """

    def __init__(self, widths: Sequence[int]) -> None:
        super().__init__()
        self.scores = nn.ModuleList(nn.Linear(width, len(widths), bias=False) for width in widths)
        self.bias = nn.Parameter(torch.zeros(len(widths)))
        for score in self.scores:
            nn.init.zeros_(score.weight)  # pyright: ignore[reportArgumentType]

    def forward(self, hidden: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return log weights, fp32 `[E, B, T]`, for hidden states `[B, T, D]` of every expert."""
        scores_BTE = self.bias
        with torch.autocast(self.bias.device.type, enabled=False):
            for score, h_BTD in zip(self.scores, hidden, strict=True):
                scores_BTE = scores_BTE + score(h_BTD.to(self.bias.dtype))
            return scores_BTE.float().log_softmax(-1).movedim(-1, 0)


class Adapter(nn.Module):
    """New logits from the log-probabilities of all experts.

    The trained adapter of arXiv 2507.07129 is one matrix on the concatenated logits, E V^2 weights:
    8.6e9 for two experts over 65,536 tokens, more than the experts. Here that matrix is a diagonal
    for each expert plus a low-rank part, E V + (E + 1) V r weights:

        z = sum_e a_e log p_e + [v in C] U sum_e D_e x_e

    The low-rank part reads the k likeliest tokens of each expert, x_e = log p_e less that of the
    kth, and changes the union C of these alone. With a rank of 0 the matrix is dense, z = sum_e W_e
    log p_e, of at most `LARGEST_ADAPTER` weights.
    """

    def __init__(self, experts: int, vocabulary: int, rank: int, candidates: int) -> None:
        super().__init__()
        self.candidates = min(candidates, vocabulary)
        self.dense = rank == 0
        if self.dense:
            identity = torch.eye(vocabulary) / experts
            self.weight = nn.Parameter(identity.repeat(experts, 1, 1))
            return
        self.diagonal = nn.Parameter(torch.full((experts, vocabulary), 1 / experts))
        generator = torch.Generator().manual_seed(0)
        down_EVr = torch.randn(experts, vocabulary, rank, generator=generator)
        self.down = nn.Parameter(down_EVr / math.sqrt(rank * self.candidates))
        self.up = nn.Parameter(torch.zeros(vocabulary, rank))

    def forward(self, logits: Sequence[torch.Tensor]) -> torch.Tensor:
        """Return logits, fp32 `[B, T, V]`, for the logits `[B, T, V]` of every expert."""
        with torch.autocast(logits[0].device.type, enabled=False):
            log_p = [
                given.flatten(0, 1).log_softmax(-1, dtype=torch.float32).clamp(min=IMPOSSIBLE)
                for given in logits
            ]
            z_NV = self._dense(log_p) if self.dense else self._low_rank(log_p)
        return z_NV.view(logits[0].shape)

    def _dense(self, log_p: Sequence[torch.Tensor]) -> torch.Tensor:
        z_NV = torch.zeros_like(log_p[0])
        for log_p_NV, weight_VV in zip(log_p, self.weight, strict=True):
            z_NV = z_NV + log_p_NV @ weight_VV.float().T
        return z_NV

    def _low_rank(self, log_p: Sequence[torch.Tensor]) -> torch.Tensor:
        z_NV = torch.zeros_like(log_p[0])
        read_Nr = torch.zeros(len(z_NV), self.up.shape[1], device=z_NV.device)
        touched_NV = torch.zeros_like(z_NV, dtype=torch.bool)
        for expert, log_p_NV in enumerate(log_p):
            z_NV = z_NV + self.diagonal[expert].float() * log_p_NV
            likely_Nk, tokens_Nk = log_p_NV.topk(self.candidates, -1)
            read_Nr = read_Nr + functional.embedding_bag(
                tokens_Nk,
                self.down[expert].float(),
                per_sample_weights=likely_Nk - likely_Nk[:, -1:],
                mode="sum",
            )
            touched_NV.scatter_(1, tokens_Nk, True)
        return z_NV + (read_Nr @ self.up.float().T) * touched_NV


def build(rule: Rule, widths: Sequence[int], vocabulary: int) -> Gate | Adapter | None:
    """Return the untrained module of a rule for experts of these widths; None if it has none.

    Raises ValueError for an adapter that is too large.
    """
    if rule.name == "gate":
        return Gate(widths)
    if rule.name != "adapter":
        return None
    check(rule, len(widths), vocabulary)
    return Adapter(len(widths), vocabulary, rule.rank, rule.candidates)


def check(rule: Rule, experts: int, vocabulary: int) -> None:
    """Raise ValueError for an adapter that is too large."""
    if rule.name != "adapter":
        return
    low_rank = experts * vocabulary + (experts + 1) * vocabulary * rule.rank
    weights = low_rank if rule.rank else experts * vocabulary**2
    if weights > LARGEST_ADAPTER:
        kind, fix = ("an", "a lower rank") if rule.rank else ("a dense", "a rank of 1 or more")
        raise ValueError(
            f"rank: {rule.rank} makes {kind} adapter of {weights:,} weights (allowed: "
            f"{LARGEST_ADAPTER:,}; give {fix})"
        )
