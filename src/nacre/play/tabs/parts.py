"""What the tabs' controls have in common: boxes for text, and events that speak in words."""

from __future__ import annotations

import functools
import importlib
import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from nacre.errors import NacreError
from nacre.play import markup
from nacre.play.shown import Once

if TYPE_CHECKING:
    from nacre.generation import Sampling

logger = logging.getLogger(__name__)

SLOW = ("grow", "compose", "substrate", "run", "study")
"""Modules of `nacre.play` that bring torch, transformers and matplotlib."""

FALLBACK = "Once upon a time"
MOST_NEW = 200  # tokens of a continuation


def area(value: str = "", **options: Any) -> gr.HTML:
    """Return a place for HTML of ours."""
    return gr.HTML(value, apply_default_css=False, elem_classes=["nacre"], **options)


def text_box(label: str, lines: int, **options: Any) -> gr.Textbox:
    """Return a box for a text that is not too long."""
    longest = markup.LONGEST_TEXT
    return gr.Textbox(label=label, lines=lines, max_lines=10, max_length=longest, **options)


def box_to_fill(label: str, lines: int) -> gr.Textbox:
    """Return a box that takes no typing before `filled` has put the first text into it."""
    return text_box(label, lines, interactive=False, placeholder="Loading…")


def filled(text: str) -> Any:
    """Return the first text of a `box_to_fill`; nothing that a person types is lost to it."""
    return gr.update(value=text or FALLBACK, interactive=True)


def sampling_controls() -> list[Any]:
    """Return the controls that say how tokens are drawn, folded away."""
    with gr.Accordion("How tokens are drawn", open=False), gr.Row():
        new = gr.Slider(8, MOST_NEW, 60, step=4, label="New tokens")
        heat = gr.Slider(0, 1.5, 0.8, step=0.05, label="Temperature (0: the likeliest)")
        seed = gr.Number(0, precision=0, minimum=0, maximum=2**32 - 1, label="Seed")
    return [new, heat, seed]


def sampling(values: Sequence[float | None]) -> Sampling:
    """Return what `sampling_controls` are set to."""
    from nacre.generation import Sampling

    new, heat, seed = (value or 0 for value in values)
    return Sampling(max_new_tokens=int(min(new, MOST_NEW)), temperature=heat, seed=int(seed))


def on(
    trigger: Callable[..., Any], work: Callable[..., Any], inputs: Any, outputs: Any,
    **options: Any,
) -> Any:  # fmt: skip
    """Wire an event that only the page calls.

    `work` returns the values of `outputs`, or yields them one after the other. What it yields last
    is written twice, with a pause between: a box that a person writes into is filled by a return.
    """
    several = len(outputs) if isinstance(outputs, list) else 1
    return trigger(
        spoken(work, several),
        inputs,
        outputs,
        show_progress="hidden",
        api_visibility="private",
        **options,
    )


def spoken(work: Callable[..., Any], outputs: int = 1) -> Callable[..., Any]:
    """Return an event that puts what a person can mend, or a bug, into words in the page.

    The words go to the first of its outputs, which is HTML; the others stay as they are.
    """

    def said(error: Exception) -> Any:
        if isinstance(error, NacreError):
            shown = markup.notice(str(error))
        else:
            logger.error("an event of the page failed", exc_info=error)
            shown = markup.notice(
                f"This failed, and it is a fault of nacre: {type(error).__name__}: {error}\n"
                "The terminal that runs the page has the details."
            )
        return shown if outputs == 1 else (shown, *[gr.skip()] * (outputs - 1))

    @functools.wraps(work)
    def at_once(*inputs: Any) -> Any:
        try:
            _imported()
            return work(*inputs)
        except Exception as error:
            return said(error)

    @functools.wraps(work)
    def in_turn(*inputs: Any) -> Iterator[Any]:
        try:
            _imported()
            yield from work(*inputs)
        except Exception as error:
            yield said(error)

    return in_turn if inspect.isgeneratorfunction(work) else at_once


def _import() -> bool:
    for name in SLOW:
        importlib.import_module(f"nacre.play.{name}")
    return True


_imported = Once(_import)  # by one thread: two that import in circles meet half-made modules
