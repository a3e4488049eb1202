"""What a composition remembers of the texts it reads.

Shapes: E experts, B batch, T positions, D width, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from transformers import Cache, DynamicCache


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
    `[B, T]` or `h_BTD`. `state_EB` are the decayed likelihood sums of `mixing.running_sums`, `last`
    each expert's logits `[B, V]` at the last position it has read, `read` how many positions that
    are, and `counted` how many tokens are in its sum: one more may be, which these logits foretold.
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
