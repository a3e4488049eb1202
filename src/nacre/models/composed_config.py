"""The configuration of a composition: which experts, where they are, and how they are mixed."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from transformers import PreTrainedConfig

from .rules import Rule


class ComposedConfig(PreTrainedConfig):
    """Names, places and shared parts of the experts, and the mixing rule.

    `experts` has for each expert its `name`, `path` (relative to the composition's folder, or
    absolute), `fingerprint` or None, and `parts`: hashes of its embedding and of every block, by
    which shared ones are recognised. `mix` is what `Rule.as_json` gives.
    """

    model_type = "nacre-composed"

    def __init__(
        self,
        experts: Sequence[dict[str, Any]] = (),
        mix: dict[str, Any] | None = None,
        vocab_size: int = 0,
        max_position_embeddings: int = 0,
        **kwargs: Any,
    ) -> None:
        self.experts = [dict(expert) for expert in experts]
        self.mix = dict(mix or Rule().as_json())
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        kwargs.setdefault("tie_word_embeddings", False)
        super().__init__(**kwargs)
