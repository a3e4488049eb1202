"""The model card that stands beside a composition."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

FORMULAS = {
    "mean-logits": "the plain mean of the experts' logits (arXiv 2507.07129)",
    "mean-probs": "the plain mean of the experts' probabilities",
    "weighted": "a weighted mean with fixed weights",
    "posterior": (
        "each expert weighs prior × its likelihood of the text so far, "
        "older tokens counting less by `decay` each"
    ),
    "entropy": "each expert weighs exp(−entropy / temperature): the surer, the more",
    "top-k": "the `k` best experts by `posterior`; the others are not run",
    "selective": "the leading expert by `posterior` alone where it is sure, else the mix",
}
"""What every rule does, in words."""


def card(record: Mapping[str, Any]) -> str:
    """Return a Hugging Face model card (Markdown with YAML front matter) for a composition."""
    mix = record["mix"]
    options = {key: value for key, value in mix.items() if key != "name"}
    set_to = ", ".join(f"`{key}` {value}" for key, value in options.items())
    rows = "\n".join(_row(expert) for expert in record["experts"])
    shared = "\n".join(f"- {sharing(entry)}" for entry in record["shared"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nacre, composition, mixture-of-experts]
---

# A composition of {len(record["experts"])} experts

Mixed by `{mix["name"]}`: {FORMULAS[mix["name"]]}{f" ({set_to})" if set_to else ""}.

Nothing was trained after the experts; each can be added or removed without a change to the others.

| expert | family | blocks | width | parameters | stage | grown from | trained on | fingerprint |
|---|---|---|---|---|---|---|---|---|
{rows}

{record["parameters"]:,} parameters in all, a context of {record["context"]:,} tokens, a
vocabulary of {record["vocabulary"]:,}, tokenizer `{record["tokenizer"][:16]}`.

{shared or "No blocks are shared."}

{_load(bundled=record["bundled"])}"""


def sharing(entry: Mapping[str, Any]) -> str:
    """Return in words what an entry of a record's `shared` says."""
    first, last = entry["blocks"][0], entry["blocks"][1] - 1
    blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
    saved = f"{entry['parameters_saved']:,} parameters fewer"
    return f"{blocks} shared by {', '.join(entry['experts'])}: run once, {saved}"


def _row(expert: Mapping[str, Any]) -> str:
    cells = [
        expert["name"],
        expert["family"],
        expert["depth"],
        expert["width"],
        f"{expert['parameters']:,}",
        "" if expert["stage"] is None else expert["stage"],
        *(f"`{expert[key][:16]}`" if expert[key] else "" for key in ("parent", "corpus")),
        f"`{expert['fingerprint'][:16]}`" if expert["fingerprint"] else "",
    ]
    return f"| {' | '.join(map(str, cells))} |"


def _load(bundled: bool) -> str:
    if bundled:
        return """```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(".", trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(".")
```
"""
    return """The experts' weights stay where they are (`config.json` has their places).

```python
import nacre

model = nacre.load_composition(".")
```
"""
