"""Controls of the tab *Study*."""

from __future__ import annotations

from collections.abc import Iterator

import gradio as gr

from nacre.play import markup
from nacre.play.shown import Shown
from nacre.play.tabs.parts import area, on


def build(shown: Shown, page: gr.Blocks) -> None:
    """Make the controls, or say what to open."""
    if not shown.given.studies:
        about = (
            "This tab shows arms side by side at equal cost, with intervals and verdicts. Open "
            "the --out folder of a `nacre study`:"
        )
        area(markup.empty("No study to compare", about, "nacre play runs/STUDY"))
        return
    path = shown.given.studies[0]
    out = area(markup.waiting("Reading the study…"), elem_id="study")
    again = gr.Button("Read the results again")

    def read() -> Iterator[str]:
        from nacre.play import study

        yield from study.show(path)

    on(page.load, read, None, out)
    on(again.click, read, None, out)
