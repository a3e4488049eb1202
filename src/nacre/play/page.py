"""The page: its head, and a tab for each thing that can be looked at."""

from __future__ import annotations

import html

import gradio as gr

from nacre.play.given import Given
from nacre.play.shown import Shown
from nacre.play.tabs import compose, grow, run, study, substrate

TABS = {
    "grow": ("Grow", grow.build),
    "compose": ("Compose", compose.build),
    "substrate": ("Substrate", substrate.build),
    "run": ("Run", run.build),
    "study": ("Study", study.build),
}
"""By name: what stands on a tab, and what makes its controls."""


def build(shown: Shown) -> gr.Blocks:
    """Return the page; nothing of what was given is loaded yet."""
    given = shown.given
    with gr.Blocks(analytics_enabled=False, title=f"{given.title} · nacre") as page:
        gr.HTML(_masthead(given), apply_default_css=False)
        with gr.Tabs(selected=given.first_tab):
            for name, (label, make) in TABS.items():
                with gr.Tab(label, id=name):
                    make(shown, page)
    return page


def _masthead(given: Given) -> str:
    kinds = {
        "composition": given.compositions, "run": given.runs,
        "checkpoint": given.checkpoints, "study": given.studies,
    }  # fmt: skip
    said = [f"{kind} {path}" for kind, paths in kinds.items() for path in paths]
    return (
        f'<header class="masthead"><h1>{html.escape(given.title)}</h1>'
        f"<span>{html.escape(' · '.join(said))}</span></header>"
    )
