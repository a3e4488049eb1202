"""Controls of the tab *Substrate*."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import gradio as gr

from nacre.play import markup
from nacre.play.shown import Shown
from nacre.play.tabs.parts import area, on, text_box

TEXT, STRING = "Nacre grows layer by layer.", "é"


def build(shown: Shown, page: gr.Blocks) -> None:
    """Make the controls, or say what to open."""
    if shown.ground is None:
        about = (
            "This tab shows the frozen rows that stand for tokens: as pictures, by their "
            "neighbours, and as a map. Open a run, a checkpoint or a composition:"
        )
        area(markup.empty("No substrate to look at", about, "nacre play runs/NAME"))
        return
    summary = area(markup.waiting("Loading the substrate…"), elem_id="substrate")
    area(
        markup.section("Tokens, as the model sees them", "Left: drawn. Right: what its row keeps.")
    )
    text = text_box("Text", 1, value=TEXT)
    glyphs = area(elem_id="glyphs")
    area(markup.section("Nearest tokens", "Whose rows point the same way as those of any string."))
    string = text_box("String", 1, value=STRING)
    near = area(elem_id="nearest")
    area(markup.section("Map of all tokens", "Near are tokens whose rows are alike."))
    methods = ["PCA", "UMAP"] if find_spec("umap") else ["PCA"]
    method = gr.Radio(methods, value="PCA", label="Method", visible=len(methods) > 1)
    atlas = area(markup.waiting("Drawing the map…"), elem_id="map")

    def begin() -> str:
        from nacre.play import substrate

        return substrate.summary(shown.substrate()[0])

    def draw(text: str) -> str:
        from nacre.play import substrate

        return substrate.drawn(*shown.substrate(), text)

    def find(string: str) -> str:
        from nacre.play import substrate

        return substrate.nearest(shown.substrate()[0], string)

    def chart(method: str) -> Iterator[str]:
        yield markup.waiting("Drawing the map…")
        yield shown.maps["UMAP" if method == "UMAP" else "PCA"]()

    on(page.load, begin, None, summary)
    on(page.load, draw, text, glyphs)
    on(page.load, find, string, near)
    on(page.load, chart, method, atlas)
    on(text.change, draw, text, glyphs, trigger_mode="always_last")
    on(string.change, find, string, near, trigger_mode="always_last")
    on(method.input, chart, method, atlas)
