"""What a composition remembers of the texts it reads, and how well each expert foretold them.

Shapes: E experts, B batch, T positions, D width, V vocabulary; R experts that have read.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch.nn import functional
from transformers import Cache, DynamicCache

from .mixing import log_likelihood
from .rules import Rule, follow


class ShiftedCache(DynamicCache):
    """Keys and values of blocks that do not begin at 0."""

    def __init__(self, first: int) -> None:
        super().__init__()
        self.first = first

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, layer_idx: int, *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """Add to the cache of block `layer_idx`."""
        return super().update(key_states, value_states, layer_idx - self.first, *args, **kwargs)


class ComposedCache(Cache):
    """Keys and values of every segment, and how well each expert foretold the text so far.

    A segment whose experts were skipped lags behind: `waiting` holds what it has still to read, ids
    `[B, T]` or `h_BTD`. `state_EB` is that of `rules.follow`, `last` each expert's logits `[B, V]`
    at the last position it has read, `read` how many positions that are, and `counted` how many
    tokens are in its state: one more may be, which these logits foretold.
    `arrangement` says for which experts of the model the cache was made.
    """

    def __init__(self, starts: Sequence[int], experts: int, arrangement: int = 0) -> None:
        super().__init__(layers=[])
        self.arrangement = arrangement
        self.keys = [ShiftedCache(start) for start in starts]
        self.waiting: list[list[torch.Tensor]] = [[] for _ in starts]
        self.state_EB: torch.Tensor | None = None
        self.last: list[torch.Tensor | None] = [None] * experts
        self.read = [0] * experts
        self.counted = [0] * experts
        self.ids_BT = torch.empty(0, 0, dtype=torch.int64)
        self.mask_BT = torch.empty(0, 0, dtype=torch.bool)
        self.positions_BT = torch.empty(0, 0, dtype=torch.int64)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Return how many tokens were read."""
        return self.ids_BT.shape[1]

    def append(self, ids: torch.Tensor, mask: torch.Tensor, positions: torch.Tensor) -> None:
        """Add tokens, their mask and their positions, each `[B, T]`."""
        if not self.ids_BT.numel():
            self.ids_BT, self.mask_BT, self.positions_BT = ids, mask, positions
            return
        self.ids_BT = torch.cat([self.ids_BT, ids], 1)
        self.mask_BT = torch.cat([self.mask_BT, mask], 1)
        self.positions_BT = torch.cat([self.positions_BT, positions], 1)

    def take(self, place: int) -> torch.Tensor | None:
        """Return all that waits for a segment, in one piece, and let nothing wait."""
        inputs, self.waiting[place] = self.waiting[place], []
        if not inputs:
            return None
        return torch.cat(inputs, 1) if len(inputs) > 1 else inputs[0]

    def observed(
        self, logits: Mapping[int, torch.Tensor], first: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return log p_e of the tokens from `first` on, `[E, B, T]`, and where it counts, `[B, T]`.

        `logits` `[B, T, V]` are experts' at these positions; their `last` are those before them. It
        counts where a token stands and another stands before it.
        """
        length = next(iter(logits.values())).shape[1]
        ids_BT = self.ids_BT[:, first : first + length]
        before_BT = functional.pad(self.mask_BT[:, :-1], (1, 0))
        real_BT = (self.mask_BT & before_BT)[:, first : first + length]
        observed_EBT = torch.zeros(len(self.last), *ids_BT.shape, device=ids_BT.device)
        lasts = {e: last_BV for e in logits if (last_BV := self.last[e]) is not None}
        if lasts:
            log_p_RBV = torch.stack(list(lasts.values())).log_softmax(-1)
            token_RB1 = ids_BT[:, :1].expand(len(lasts), -1, -1)
            observed_EBT[list(lasts), :, :1] = log_p_RBV.gather(-1, token_RB1)
        if length > 1:
            for expert, logits_BTV in logits.items():
                likelihood_Bt = log_likelihood(logits_BTV[:, :-1], ids_BT[:, 1:])
                observed_EBT[expert, :, 1:] = likelihood_Bt
        return observed_EBT, real_BT

    def count(self, rule: Rule, logits: Mapping[int, torch.Tensor], first: int) -> torch.Tensor:
        """Move on some experts' states by tokens that are not in them; others' stay.

        Returns the log weights that all experts then have, `[E, B, T]`.
        """
        observed_EBT, real_BT = self.observed(logits, first)
        real_EBT = real_BT.new_zeros(observed_EBT.shape)
        for expert in logits:
            known = max(0, self.counted[expert] - first)
            real_EBT[expert, :, known:] = real_BT[:, known:]
            self.counted[expert] = max(self.counted[expert], first + real_BT.shape[1])
        shares = rule.shares(len(self.last))
        log_weights_EBT, self.state_EB = follow(rule, shares, observed_EBT, self.state_EB, real_EBT)
        return log_weights_EBT

    def remember(self, logits: Mapping[int, torch.Tensor]) -> None:
        """Keep the last logits that experts have made."""
        for expert, logits_BTV in logits.items():
            self.last[expert] = logits_BTV[:, -1].to(torch.float32, copy=True)
            self.read[expert] += logits_BTV.shape[1]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Keep the rows `beam_idx` of the batch, in that order."""
        for keys in self.keys:
            keys.reorder_cache(beam_idx)  # pyright: ignore[reportArgumentType]
        self._rows(lambda rows, axis: rows.index_select(axis, beam_idx.to(rows.device)))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keep the rows `indices` of the batch, in that order."""
        self.reorder_cache(indices)

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Repeat every row of the batch."""
        for keys in self.keys:
            keys.batch_repeat_interleave(repeats)
        self._rows(lambda rows, axis: rows.repeat_interleave(repeats, axis))

    def _rows(self, change: Callable[[torch.Tensor, int], torch.Tensor]) -> None:
        self.waiting = [[change(rows, 0) for rows in inputs] for inputs in self.waiting]
        self.last = [None if rows is None else change(rows, 0) for rows in self.last]
        if self.state_EB is not None:
            self.state_EB = change(self.state_EB, 1)
        for name in ("ids_BT", "mask_BT", "positions_BT"):
            setattr(self, name, change(getattr(self, name), 0))

    def crop(self, max_length: int) -> None:
        """Refuse: the likelihood sums cannot be taken back."""
        raise ValueError("a composition cannot take tokens back: use no assisted generation")

    def reset(self) -> None:
        """Refuse: a new text needs a new cache."""
        raise ValueError("a composition's cache is not used again: begin a text without one")
