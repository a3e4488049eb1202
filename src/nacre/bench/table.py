"""A suite's rows as a table for a terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table

from nacre.bench.measure import Row
from nacre.numbers import size

HEADS = ("case", "measured", "peer", "limit", "ratio", "target")


def table(name: str, rows: Sequence[Row], seconds: float) -> Table:
    """Return the table of one suite; what the limits are and the rows' notes stand below it."""
    notes = [f"limit in {row.unit}: {row.limit_name}" for row in rows if row.limit_name]
    notes = list(dict.fromkeys([*notes, *(row.note for row in rows if row.note)]))
    found = Table(
        title=f"{name} ({seconds:.0f} s)",
        title_justify="left",
        caption="\n".join(notes) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
    )
    for head in HEADS:
        wraps = head in ("case", "peer", "target")
        narrowest = {"case": 18, "peer": 9, "target": 9}.get(head)
        justify = "left" if wraps else "right"
        found.add_column(head, justify=justify, no_wrap=not wraps, min_width=narrowest)
    for row in rows:
        found.add_row(*cells(row))
    return found


def cells(row: Row) -> list[str]:
    """Return a row's cells in the order of `HEADS`; empty where there is nothing to say.

    `limit` is how many times worse than the limit, `ratio` how many times better than the peer.
    """
    measured = value(row.measured, row.unit)
    if row.spread:
        measured += f" ±{100 * row.spread / row.measured:.0f}%"
    peer = limit = ratio = target = ""
    if row.peer is not None:
        peer = f"{value(row.peer, row.unit)} {row.peer_name}"
    if row.limit is not None and row.limit_ratio is not None:
        limit = f"{row.limit_ratio:.2f}x"
    if row.ratio is not None:
        ratio = f"{row.ratio:.2f}x"
    if row.target is not None:
        sense = "<=" if row.better == "lower" else ">="
        target = {
            "measured": f"{sense} {value(row.target.value, row.unit)}",
            "ratio": f">= {row.target.value:g}x",
            "peer": f"<= {row.target.value:g}x peer",
            "limit": f"<= {row.target.value:g}x limit",
        }[row.target.of]
        target += {True: " met", False: " missed", None: ""}[row.met]
    return [row.case, measured, peer, limit, ratio, target]


def value(number: float, unit: str) -> str:
    """Write a number with its unit: seconds also as ms or µs, bytes as MB or GB."""
    if unit == "B":
        return size(number) if number >= 1e7 else f"{number / 1e6:.2f} MB"
    if unit == "s" and number < 1:
        return f"{number * 1e3:.3g} ms" if number >= 1e-3 else f"{number * 1e6:.3g} µs"
    return f"{number:,.0f} {unit}" if number >= 100 else f"{number:.3g} {unit}"
