"""What `config.json` and `generation_config.json` may say, before `transformers` reads them.

`transformers` makes lists as long as some fields say, follows others to more files, and fetches
code by others again.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, cast

from nacre.untrusted import LARGEST_DEPTH, as_object, read_json

CONFIG, GENERATION = "config.json", "generation_config.json"

CONFIG_BYTES = 2**22
LARGEST_FIELD = 2**40
MOST_EXPERTS = 2**17
"""In all blocks together."""

CEILINGS = {
    **dict.fromkeys(
        ("layer", "blocks", "depth", "iters", "cycles", "altup", "pretraining_tp"), LARGEST_DEPTH
    ),
    "expert": 2**12, "head": 2**16, "label": 2**16, "codebook": 2**16,
    "beam": 2**6, "return_sequences": 2**6,
}  # fmt: skip
"""The most that a whole number may be, by a part of its field's name: so many modules or entries of
a list are made, or texts written side by side."""

ELSEWHERE = ("transformers_weights", "configuration_files")
"""Fields that name other files to read."""

KERNELS = ("attn_implementation", "_attn_implementation", "experts_implementation",
           "_experts_implementation")  # fmt: skip
"""Fields by which code can be fetched from the hub: those who load a model choose these."""


def check(path: Path) -> None:
    """Raise ValueError or OSError for a configuration that `transformers` must not read."""
    from transformers import GenerationConfig, PreTrainedConfig

    config = as_object(read_json(path, CONFIG_BYTES))
    owner = GenerationConfig if path.name == GENERATION else PreTrainedConfig
    for key in ELSEWHERE:
        if config.get(key) is not None:
            raise ValueError(f"{key} names other files, which are not read; take the field out")
    for key, value in fields(config):
        if callable(getattr(owner, key, None)) or key.startswith("__"):
            raise ValueError(f"{key!r} is no field of a configuration")
        if key in KERNELS and value is not None and str(value) not in ("eager", "sdpa"):
            raise ValueError(f"{key} asks for {value!r}, which is not loaded; take the field out")
        if isinstance(value, int) and abs(value) > (most := _ceiling(key)):
            raise ValueError(f"{key} is {value:,}, at most {most:,} is allowed")
    blocks, experts = (_largest(config, part) for part in ("layer", "expert"))
    if blocks * experts > MOST_EXPERTS:
        raise ValueError(f"it describes {blocks:,} blocks of {experts:,} experts")


def fields(node: Any) -> Iterator[tuple[str, Any]]:
    """Yield the fields of a configuration, those inside others too."""
    if isinstance(node, dict):
        yield from cast("dict[str, Any]", node).items()
    children = node.values() if isinstance(node, dict) else node
    for child in children:
        if isinstance(child, dict | list):
            yield from fields(child)


def _ceiling(key: str) -> int:
    """Return the most that a whole number may be; sizes are checked by the weights."""
    parts = () if "size" in key else (most for part, most in CEILINGS.items() if part in key)
    return min(parts, default=LARGEST_FIELD)


def _largest(config: Mapping[str, Any], part: str) -> int:
    """Return the largest number of something in a configuration, by a part of its fields' names."""
    found = ((key, n) for key, n in fields(config) if part in key and "size" not in key)
    return max((n for _, n in found if type(n) is int), default=0)
