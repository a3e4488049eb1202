"""Controls of the tab *Run*."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import gradio as gr

from nacre.play import markup
from nacre.play.shown import Shown
from nacre.play.tabs.parts import area, on

TICK = 2.0  # seconds between two looks at the files of a run


def build(shown: Shown, page: gr.Blocks) -> None:
    """Make the controls, or say what to open."""
    if not shown.given.runs:
        about = (
            "This tab shows loss, speed, stages and ledger of a run, while it goes on or "
            "afterwards. Open the --out folder of a `nacre grow`:"
        )
        area(markup.empty("No run to follow", about, "nacre play runs/NAME"))
        return
    path = shown.given.runs[0]
    out = area(markup.waiting("Reading the run…"), elem_id="run")
    check = gr.Button("Check every tensor against the ledger")
    checked = area(elem_id="checked")
    seen = gr.State(())
    timer = gr.Timer(TICK)

    def look(seen: tuple[float, ...]) -> tuple[Any, Any]:
        from nacre.play import run

        now = run.stamp(path)
        changed = now != tuple(seen)
        return (run.show(path), now) if changed else (gr.skip(), gr.skip())

    def checking() -> Iterator[str]:
        from nacre.play import run

        yield from run.check(path)

    on(page.load, look, seen, [out, seen])
    on(timer.tick, look, seen, [out, seen])
    on(check.click, checking, None, checked)
