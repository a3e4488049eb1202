"""The model card that stands beside every stage."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any


def model_card(
    record: Mapping[str, Any],
    *,
    load: str = '"."',
    about: str = "",
    sections: Sequence[str] = (),
) -> str:
    """Return a Hugging Face model card (Markdown with YAML front matter) for a stage's record.

    `load` are the arguments that `from_pretrained` finds it by, `about` further lines of the front
    matter, `sections` what else is said of it, in Markdown.
    """
    validation = record["validation"]
    lora = record["lora"]
    more = "".join(f"{section}\n\n" for section in sections)
    how = f"{record['new_blocks']} new blocks" if record["new_blocks"] else "no new blocks"
    if lora:
        how += f" and LoRA of rank {lora['rank']} over the blocks below, merged"
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nacre, grown, frozen-embeddings]
{about}---

# Stage {record["stage"]}: a decoder of {record["depth"]} blocks

Grown with nacre: {how}. Everything below was frozen while it trained, and `stage.json` holds the
SHA-256 of every frozen tensor.

| | |
|---|---|
| Parameters | {record["total_parameters"]:,} |
| Of these trained in this stage | {record["active_parameters"]:,} |
| Tokens in this stage | {record["tokens"]:,} |
| Held-out bits per byte | {validation["bits_per_byte"]:.4f} |
| Held-out perplexity (a token) | {validation["perplexity"]:.2f} |
| Substrate | `{(record["substrate"] or "the checkpoint's own")[:16]}` |
| Tokenizer | `{record["tokenizer"][:16]}` |
| Grown from | `{(record["parent"] or "nothing")[:16]}` |

{more}```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({load})
tokenizer = AutoTokenizer.from_pretrained({load})
```
"""
