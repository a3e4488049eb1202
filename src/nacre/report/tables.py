"""The tables of a report, as plain text cells: a terminal and the page show the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nacre.numbers import count, size


def stage_table(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one row a finished stage, column title to text; terminal and page show the same."""
    return [
        {
            "stage": str(record["stage"]),
            "depth": str(record["depth"]),
            "active": count(record["active_parameters"]),
            "total": count(record["total_parameters"]),
            "tokens": count(record["tokens"]),
            "bits/byte": f"{record['validation']['bits_per_byte']:.4f}",
            "perplexity": f"{record['validation']['perplexity']:,.2f}",
            "tokens/s": f"{record['tokens_per_second']:,.0f}",
            "peak memory": size(record["peak_memory_bytes"]),
            "seconds": f"{record['seconds']:,.1f}",
        }
        for record in records
    ]


def ledger_table(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one row a finished stage: what it trained, what stayed frozen, on what it stands.

    `as below` counts the frozen tensors whose hash is the one the stage below recorded.
    """
    rows: list[dict[str, str]] = []
    for below, record in pairwise([None, *records]):
        assert record is not None
        trained = [f"{record['new_blocks']} new blocks"] if record["new_blocks"] else []
        if record.get("under"):
            trained.append(f"{record['under']} above them")
        reopened = record.get("train", "crown")
        if reopened != "crown":
            trained.append("all blocks" if reopened == "all" else f"blocks {reopened}")
        lora = record["lora"]
        merge = "–"
        if lora:
            trained.append(f"LoRA rank {lora['rank']}")
            certificate = lora["merge"]
            merge = (
                f"{certificate['adapters']} adapters, logits within "
                f"{certificate['largest_logit_difference']:.1e}, "
                f"loss {certificate['loss_difference']:+.1e}"
            )
        same, parent = "–", (record["parent"] or "nothing")[:12]
        if below is not None:
            known = below["frozen"] | below["weights"]
            kept = sum(known.get(name) == value for name, value in record["frozen"].items())
            same = f"{kept} of {len(record['frozen'])}"
            if record["parent"] != below["fingerprint"]:
                parent += " (not the stage below)"
        rows.append(
            {
                "stage": str(record["stage"]),
                "trained": " + ".join(trained).replace("1 new blocks", "1 new block")
                or "norm and head",
                "trainable tensors": f"{len(record['trainable']):,}",
                "frozen tensors": f"{len(record['frozen']):,}",
                "as below": same,
                "LoRA merge": merge,
                "parent": parent,
                "fingerprint": record["fingerprint"][:12],
            }
        )
    return rows


def short_name(folder: str, folders: Sequence[str]) -> str:
    """Return the end of a path, and so much of it that no other one ends alike."""
    parts = Path(folder).parts
    for length in range(1, len(parts)):
        end = parts[-length:]
        if end[0] != "stages" and sum(Path(f).parts[-length:] == end for f in folders) == 1:
            return "/".join(end)
    return folder
