"""Controls of the tab *Grow*."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import gradio as gr

from nacre.play import markup
from nacre.play.given import stage_depths
from nacre.play.shown import Shown
from nacre.play.tabs.parts import area, box_to_fill, filled, on, sampling, sampling_controls

PROMPT, TEXT = 12, 90  # tokens of a run's own text that the boxes begin with


def build(shown: Shown, page: gr.Blocks) -> None:
    """Make the controls, or say what to open."""
    path = shown.given.model
    known = stage_depths(path) if path else []
    if path is None:
        about = (
            "This tab continues a text at every depth of a run, and shows what each depth loses "
            "on it. Open a run or a checkpoint:"
        )
        area(markup.empty("No model to look into", about, "nacre play runs/NAME"))
    elif not known:
        about = (
            "This tab continues a text at every depth. Start the page again once the first stage "
            "of the run has finished; the tab Run shows how far it is."
        )
        area(markup.empty("No stage has finished yet", about))
    else:
        prompt = _continuing(shown, known)
        text = _losing(shown, known)
        on(page.load, lambda: _begin(shown), None, [area(), prompt, text])


def _begin(shown: Shown) -> tuple[str, Any, Any]:
    """Fill the boxes with text of the run itself, while the models are loaded beside it."""
    from nacre.play.models import sample_text

    depths = shown.depths()
    prompt, text = (sample_text(depths.path, depths.tokenizer, size) for size in (PROMPT, TEXT))
    shown.warm()
    return "", filled(prompt.rstrip()), filled(text)


def _continuing(shown: Shown, known: Sequence[int]) -> gr.Textbox:
    several = len(known) > 1
    about = "The same prompt and the same seed at every depth." if several else ""
    area(markup.section("Continue a text", about))
    prompt = box_to_fill("Prompt", 2)
    stages = " · ".join(f"stage {n}: {depth} blocks" for n, depth in enumerate(known, 1))
    place = gr.Slider(
        1, max(2, len(known)), len(known), step=1, label="Depth, as the stage of the run",
        info=stages, visible=several, elem_id="depth",
    )  # fmt: skip
    with gr.Row():
        go = gr.Button("Continue", variant="primary")
        every = gr.Button("All depths side by side", visible=several)
    drawing = sampling_controls()
    out = area(elem_id="continued")

    def one(prompt: str, place: float, *drawing: float) -> Iterator[str]:
        at = min(max(int(place), 1), len(known)) - 1
        yield from _continued(shown, [at], prompt, drawing)

    def all_depths(prompt: str, *drawing: float) -> Iterator[str]:
        yield from _continued(shown, range(len(known)), prompt, drawing)

    inputs = [prompt, place, *drawing]
    clicked = on(go.click, one, inputs, out, trigger_mode="always_last")
    beside = on(every.click, all_depths, [prompt, *drawing], out, cancels=[clicked])
    on(place.input, one, inputs, out, trigger_mode="always_last", cancels=[clicked, beside])
    on(prompt.submit, one, inputs, out, cancels=[clicked, beside])
    return prompt


def _continued(
    shown: Shown, places: Sequence[int], prompt: str, drawing: Sequence[float]
) -> Iterator[str]:
    yield markup.waiting("Loading the model…")
    from nacre.play import grow

    depths = shown.depths()
    chosen = [depths.depths[place] for place in places]
    texts = [""] * len(chosen)
    for texts in grow.continue_at(depths, places, prompt, sampling(drawing)):
        yield grow.cards(chosen, prompt, texts, going=True)
    ended = [text or " (the model ends the text here)" for text in texts]
    yield grow.cards(chosen, prompt, ended, going=False)


def _losing(shown: Shown, known: Sequence[int]) -> gr.Textbox:
    several = len(known) > 1
    about = "Each token coloured by how much it surprised the model"
    area(markup.section("Loss, token by token", f"{about}{', at two depths' * several}."))
    text = box_to_fill("Text", 4)
    places = [(f"{depth} blocks (stage {n})", n) for n, depth in enumerate(known, 1)]
    with gr.Row(visible=several):
        first = gr.Dropdown(places, value=1, label="First depth")
        second = gr.Dropdown(places, value=len(known), label="Second depth")
    views = [("Difference", "difference"), ("First depth", "first"), ("Second depth", "second")]
    view = gr.Radio(
        views, value="difference" if several else "second", label="Colour shows", visible=several
    )
    score = gr.Button("Show the loss", variant="primary")
    out = area(elem_id="losses")

    def scored(text: str, first: int, second: int, view: Any) -> Iterator[str]:
        yield markup.waiting("Reading the text…")
        from nacre.play import grow

        depths = shown.depths()
        one, other = int(first) - 1, int(second) - 1
        both = grow.losses(depths, one, text), grow.losses(depths, other, text)
        named = depths.depths[one], depths.depths[other]
        yield grow.painted(text, depths.tokenizer, both, named, view)

    inputs = [text, first, second, view]
    on(score.click, scored, inputs, out, trigger_mode="always_last")
    on(text.submit, scored, inputs, out)
    for changed in (view, first, second):
        on(changed.input, scored, inputs, out)
    return text
