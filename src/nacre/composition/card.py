"""The model card that stands beside a composition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

FORMULAS = {
    "mean-logits": "the plain mean of the experts' logits (arXiv 2507.07129)",
    "mean-probs": "the plain mean of the experts' probabilities",
    "weighted": "a weighted mean with fixed weights",
    "posterior": (
        "each expert weighs prior × its likelihood of the text so far, "
        "older tokens counting less by `decay` each"
    ),
    "fixed-share": (
        "each expert weighs its posterior given the text so far, where the text may draw its "
        "expert anew before any token, with probability `switch`"
    ),
    "entropy": "each expert weighs exp(−entropy / temperature): the surer, the more",
    "top-k": "the `k` best experts by `posterior`; the others are not run",
    "selective": "the leading expert by `posterior` alone where it is sure, else the mix",
    "gate": "a trained gate weighs the experts by their final hidden states",
    "adapter": (
        "a trained adapter makes new logits of the experts' log-probabilities: a diagonal for "
        "each, and a low-rank part over their likeliest tokens (`rank` 0: one dense matrix)"
    ),
}
"""What every rule does, in words."""


def card(
    record: Mapping[str, Any],
    *,
    load: str = '"."',
    about: str = "",
    sections: Sequence[str] = (),
) -> str:
    """Return a Hugging Face model card (Markdown with YAML front matter) for a composition.

    `load`, `about` and `sections` as in a stage's card.
    """
    mix = record["mix"]
    options = {key: value for key, value in mix.items() if key != "name"}
    set_to = ", ".join(f"`{key}` {value}" for key, value in options.items())
    rows = "\n".join(_row(expert) for expert in record["experts"])
    more = "".join(f"{section}\n\n" for section in sections)
    shared = "\n".join(f"- {sharing(entry)}" for entry in record["shared"])
    return f"""---
library_name: transformers
pipeline_tag: text-generation
tags: [nacre, composition, mixture-of-experts]
{about}---

# A composition of {len(record["experts"])} experts

Mixed by `{mix["name"]}`: {FORMULAS[mix["name"]]}{f" ({set_to})" if set_to else ""}.

{_trained(record)}

| expert | family | blocks | width | parameters | stage | grown from | trained on | fingerprint |
|---|---|---|---|---|---|---|---|---|
{rows}

{record["parameters"]:,} parameters in all, a context of {record["context"]:,} tokens, a
vocabulary of {record["vocabulary"]:,}, tokenizer `{record["tokenizer"][:16]}`.

{shared or "No blocks are shared."}

{lost(record["report"]) if record.get("report") else ""}{more}{_load(load, record["bundled"])}"""


def sharing(entry: Mapping[str, Any]) -> str:
    """Return in words what an entry of a record's `shared` says."""
    first, last = entry["blocks"][0], entry["blocks"][1] - 1
    blocks = f"block {first}" if first == last else f"blocks {first} to {last}"
    saved = f"{entry['parameters_saved']:,} parameters fewer"
    return f"{blocks} shared by {', '.join(entry['experts'])}: run once, {saved}"


def lost(report: Mapping[str, Any]) -> str:
    """Return the section that says where the composition is worse than an expert alone."""
    heads, *rows = report_cells(report)
    lines = [heads, ["---", *["---:"] * (len(heads) - 1)], *rows]
    table = "\n".join(f"| {' | '.join(_cell(cell) for cell in line)} |" for line in lines)
    said = "On none of these texts is the composition worse than the best expert there."
    if worse := verdicts(report, "worse"):
        said = "\n".join(["The composition is worse on:\n", *(f"- {line}" for line in worse)])
    context, stride = report["settings"]["context"], report["settings"]["stride"]
    return f"""## Who lost what

Bits per byte (less is better) of the composition, "mixed", and of each expert alone on the same
texts (fingerprint `{report["texts"][:16]}`), in windows of {context:,} tokens that advance by
{stride:,}. The difference is to the best expert of the row, with its 95% interval (bootstrap over
documents).

{table}

{said}

"""


def report_cells(report: Mapping[str, Any]) -> list[list[str]]:
    """Return a report's table as plain text, heads first: the card and a terminal show the same."""
    names = list(report["rows"][0]["experts"])
    heads = ["texts", "count", "mixed", *names, "difference", "95% interval"]
    rows = [
        [
            _texts(row),
            f"{row['documents']:,}",
            *(f"{bits:.3f}" for bits in (row["composition"], *row["experts"].values())),
            f"{row['difference']:+z.3f}",
            "{:+z.3f} to {:+z.3f}".format(*row["interval"]) if row["interval"] else "none",
        ]
        for row in report["rows"]
    ]
    return [heads, *rows]


def verdicts(report: Mapping[str, Any], outcome: str | None = None) -> list[str]:
    """Return a sentence for each of a report's rows, or for those of one outcome."""
    return [
        f"{_texts(row)}: {row['verdict']}"
        for row in report["rows"]
        if outcome in (None, row["outcome"])
    ]


def _texts(row: Mapping[str, Any]) -> str:
    return f"all of {row['name']}" if row["kind"] == "language" else row["name"]


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


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
    return f"| {' | '.join(str(cell).replace('|', '&#124;') for cell in cells)} |"


def _trained(record: Mapping[str, Any]) -> str:
    if not (trained := record.get("trained")):
        return (
            "Nothing was trained after the experts; each can be added or removed without a change "
            "to the others."
        )
    before, after = (trained["validation"][when]["bits_per_byte"] for when in ("before", "after"))
    sources = ", ".join(f"`{source}`" for source in trained["sources"])
    return (
        f"Trained after the experts: {trained['what']}, {trained['parameters']:,} parameters, on "
        f"{trained['tokens']:,} tokens of {sources}. Held-out bits per byte {before:.4f} before, "
        f"{after:.4f} after. The experts' own checkpoints did not change. Adding or removing an "
        "expert takes this training back."
    )


def _load(where: str, bundled: bool) -> str:
    if bundled:
        return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained({where}, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained({where})
```
"""
    return """The experts' weights stay where they are (`config.json` has their places).

```python
import nacre

model = nacre.load_composition(".")
```
"""
