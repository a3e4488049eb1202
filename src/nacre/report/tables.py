"""The tables of a report: a terminal, the page and the files beside it show the same ones."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Any

from nacre.numbers import count, size
from nacre.report.formats import Cell


def stage_table(records: Sequence[Mapping[str, Any]]) -> list[dict[str, str]]:
    """Return one row a finished stage, column title to cell; terminal and page show the same."""
    return [
        {
            "stage": number(record["stage"]),
            "depth": number(record["depth"]),
            "active": shortened(record["active_parameters"]),
            "total": shortened(record["total_parameters"]),
            "tokens": shortened(record["tokens"]),
            "bits/byte": number(record["validation"]["bits_per_byte"], ".4f"),
            "perplexity": number(record["validation"]["perplexity"], ",.2f"),
            "tokens/s": number(record["tokens_per_second"], ",.0f"),
            "peak memory": memory(record["peak_memory_bytes"]),
            "seconds": number(record["seconds"], ",.1f"),
        }
        for record in records
    ]


def number(value: float, form: str = "") -> Cell:
    """Return a number as a cell, written in a form of `format`."""
    return Cell(f"{value:{form}}", value)


def shortened(value: float) -> Cell:
    """Return a count as a cell: 32.9K."""
    return Cell(count(value), value)


def memory(value: float) -> Cell:
    """Return bytes as a cell: 812 MB."""
    return Cell(size(value), value)


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
        merge: str = Cell("–", None)
        if lora:
            trained.append(f"LoRA rank {lora['rank']}")
            certificate = lora["merge"]
            merge = (
                f"{certificate['adapters']} adapters, logits within "
                f"{certificate['largest_logit_difference']:.1e}, "
                f"loss {certificate['loss_difference']:+.1e}"
            )
        same: str
        same, parent = Cell("–", None), _hash(record["parent"])
        if below is not None:
            known = below["frozen"] | below["weights"]
            kept = sum(known.get(name) == value for name, value in record["frozen"].items())
            same = f"{kept} of {len(record['frozen'])}"
            if record["parent"] != below["fingerprint"]:
                parent = Cell(f"{parent} (not the stage below)", parent.value)
        rows.append(
            {
                "stage": number(record["stage"]),
                "trained": " + ".join(trained).replace("1 new blocks", "1 new block")
                or "norm and head",
                "trainable tensors": number(len(record["trainable"]), ","),
                "frozen tensors": number(len(record["frozen"]), ","),
                "as below": same,
                "LoRA merge": merge,
                "parent": parent,
                "fingerprint": _hash(record["fingerprint"]),
            }
        )
    return rows


def _hash(value: str | None) -> Cell:
    return Cell("nothing" if value is None else value[:12], value)


def short_name(folder: str, folders: Sequence[str]) -> str:
    """Return the end of a path, and so much of it that no other one ends alike."""
    parts = Path(folder).parts
    for length in range(1, len(parts)):
        end = parts[-length:]
        if end[0] != "stages" and sum(Path(f).parts[-length:] == end for f in folders) == 1:
            return "/".join(end)
    return folder
