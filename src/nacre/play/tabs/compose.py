"""Controls of the tab *Compose*."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import gradio as gr

from nacre.folders import STAGES
from nacre.play import markup
from nacre.play.given import expert_count
from nacre.play.shown import Shown
from nacre.play.tabs.parts import area, box_to_fill, filled, on, sampling, sampling_controls

if TYPE_CHECKING:
    from nacre.models.rules import Rule

PROMPT = 20  # tokens of the text of each of two experts that the box begins with

OPTIONS: Mapping[str, str] = {
    "switch": "switch: chance that the text changes its expert at a token",
    "decay": "decay: what an expert keeps of its sum at each token",
    "floor": "floor: the least share of every expert",
    "temperature": "temperature: 0 would follow the surest expert alone",
    "k": "k: experts that count at a time",
    "threshold": "threshold: how sure the leading expert must be to speak alone",
}
"""Options of rules that are numbers, and what they mean."""


def build(shown: Shown, page: gr.Blocks) -> None:
    """Make the controls, or say what to open."""
    if not shown.mixes:
        about = (
            "This tab mixes experts and shows which of them carries each token. Open a "
            "composition, or several runs at once:"
        )
        area(markup.empty("Nothing to compose", about, "nacre play runs/EN runs/RU"))
        return
    about = "Whom you choose here, and how, changes this page alone: nothing is written."
    area(markup.section("Experts under one rule", about))
    table = area(markup.waiting("Loading the experts…"), elem_id="experts")
    with gr.Column(visible=False) as controls:
        names = gr.CheckboxGroup([], label="Experts that play")
        with gr.Row():
            rule = gr.Dropdown([], label="Rule")
            options = [gr.Number(label=said, visible=False) for said in OPTIONS.values()]
        with gr.Accordion("Weight of each expert", open=False) as weighing, gr.Row():
            weights = [
                gr.Slider(0, 1, 1, step=0.05, visible=False)
                for _ in range(expert_count(shown.given))
            ]
        prompt = box_to_fill("Prompt", 3)
        go = gr.Button("Continue", variant="primary")
        drawing = sampling_controls()
        out = area(elem_id="mixed")

    def begin() -> tuple[Any, ...]:
        return _begin(shown, len(weights))

    def choose(names: Sequence[str], rule: str) -> tuple[Any, ...]:
        from nacre.models.rules import RULES
        from nacre.play import compose

        has = RULES.get(rule, ())
        shows = [gr.update(visible=option in has) for option in OPTIONS]
        weighs = gr.update(visible="prior" in has or "weights" in has)
        return compose.experts(shown.mixtures(), names), *shows, weighs

    def mixed(names: Sequence[str], rule: str, prompt: str, *numbers: float) -> Iterator[str]:
        yield from _mixed(shown, names, rule, prompt, numbers, len(weights))

    on(page.load, begin, None, [table, controls, names, rule, *options, weighing, *weights, prompt])
    for changed in (names, rule):
        on(changed.input, choose, [names, rule], [table, *options, weighing])
    inputs = [names, rule, prompt, *options, *weights, *drawing]
    clicked = on(go.click, mixed, inputs, out, trigger_mode="always_last")
    on(prompt.submit, mixed, inputs, out, cancels=[clicked])


def _begin(shown: Shown, sliders: int) -> tuple[Any, ...]:
    """Show the composition as it is on disk: its experts, rule, options and weights."""
    from nacre.composition.folder import context
    from nacre.models.rules import RULES
    from nacre.play import compose
    from nacre.play.models import sample_text

    mixtures = shown.mixtures()
    known, playing = list(mixtures.experts), mixtures.own or list(mixtures.experts)
    rule = mixtures.rule
    has = RULES[rule.name]
    shares = dict(zip(playing, rule.shares(len(playing)), strict=True))
    largest = max(shares.values())
    weights: list[Any] = [
        gr.update(visible=True, label=name, value=shares.get(name, largest) / largest)
        for name in known
    ]
    size = min(PROMPT, context(list(mixtures.experts.values())) // 4)
    samples = [
        sample_text(_run_of(mixtures.experts[name].path), mixtures.tokenizer, size).strip()
        for name in playing[:2]
    ]
    return (
        compose.experts(mixtures, playing),
        gr.update(visible=True),
        gr.update(choices=known, value=playing),
        gr.update(choices=mixtures.rules, value=rule.name),
        *(gr.update(value=getattr(rule, key), visible=key in has) for key in OPTIONS),
        gr.update(visible="prior" in has or "weights" in has),
        *[*weights, *[gr.skip()] * sliders][:sliders],
        filled(" ".join(filter(None, samples))),
    )


def _run_of(stage: Any) -> Any:
    """Return the run that a stage belongs to; what is no stage as it is."""
    return stage.parent.parent if stage.parent.name == STAGES else stage


def _mixed(
    shown: Shown, names: Sequence[str], rule: str, prompt: str, numbers: Sequence[float],
    sliders: int,
) -> Iterator[str]:  # fmt: skip
    yield markup.waiting("Loading the experts…")
    from nacre.play import compose

    mixtures = shown.mixtures()
    options, weights = numbers[: len(OPTIONS)], numbers[len(OPTIONS) : len(OPTIONS) + sliders]
    by_name = dict(zip(mixtures.experts, weights, strict=False))
    ordered = [name for name in mixtures.experts if name in names]
    chosen = _rule(shown, ordered, rule, dict(zip(OPTIONS, options, strict=True)), by_name)
    drawing = sampling(numbers[len(OPTIONS) + sliders :])
    shown_last = ""
    for traced in compose.continue_mixed(mixtures, ordered, chosen, prompt, drawing):
        shown_last = compose.painted(traced) + compose.posterior(traced)
        yield shown_last
    if not shown_last:
        yield markup.notice("The model ends the text at once: try another prompt or seed.")


def _rule(
    shown: Shown, names: Sequence[str], rule: str, options: Mapping[str, float],
    weights: Mapping[str, float],
) -> Rule:  # fmt: skip
    """Return the chosen rule; a trained one is the composition's own, with nothing to set."""
    from nacre.models.rules import TRAINED
    from nacre.play import compose

    own = shown.mixtures().rule
    if rule in TRAINED and rule == own.name:
        return own
    return compose.rule_of(rule, [weights[name] for name in names], options)
