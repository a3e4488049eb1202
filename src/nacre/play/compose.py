"""The tab *Compose*: experts under a rule, who carried each token, and the weights over time."""

from __future__ import annotations

import html
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nacre.errors import ConfigError, Problem
from nacre.generation import Sampling, pieces
from nacre.models.rules import RULES, Rule
from nacre.numbers import count
from nacre.play.chart import Line, draw_lines
from nacre.play.grow import begin, stops
from nacre.play.markup import details, quoted, token, tokens
from nacre.play.models import Mixtures
from nacre.play.sampling import draw
from nacre.report.formats import to_html

COLORS = 8  # of experts that can be told apart; used again where there are more


def rule_of(name: str, weights: Sequence[float], options: Mapping[str, float]) -> Rule:
    """Return a rule by name with the `options` it has, and a weight for every expert.

    Weights that are all alike are left out: they are then the same as none. Raises ConfigError with
    every problem.
    """
    if not weights:
        raise ConfigError(Problem("Experts", "none is chosen", "choose one at least"))
    if name not in RULES:
        raise ConfigError(Problem("Rule", f"{name!r} is none", f"there are: {', '.join(RULES)}"))
    data: dict[str, Any] = {"name": name}
    for key, value in options.items():
        if key in RULES[name]:
            data[key] = int(value) if key == "k" else value
    alike = len(set(weights)) == 1 and weights[0] > 0
    if "weights" in RULES[name]:
        data["weights"] = list(weights)
    elif "prior" in RULES[name] and not alike:
        data["prior"] = list(weights)
    try:
        return Rule.parse(data, len(weights))
    except ValueError as error:
        problems = [Problem("Rule", line) for line in str(error).splitlines()]
        raise ConfigError(problems) from None


@dataclass(frozen=True)
class Traced:
    """A text with who carried it: ids, what each adds to the text, the experts' shares at each.

    `shares[i]` (`[E]`) are those that token i was foretold with; the first token of a prompt, which
    nothing foretold, has none. The first `prompt` tokens are the prompt's.
    """

    names: tuple[str, ...]
    pieces: list[str]
    shares: list[list[float]]
    prompt: int


def continue_mixed(
    mixtures: Mixtures, names: Sequence[str], rule: Rule, prompt: str, sampling: Sampling
) -> Iterator[Traced]:
    """Yield the prompt and its continuation so far, with every token's shares.

    Raises as `Mixtures.model`, `begin` and `Sampling` do.
    """
    model, tokenizer = mixtures.model(names, rule), mixtures.tokenizer
    ids_BT, fitting = begin(prompt, tokenizer, model, sampling)
    read = ids_BT[0].tolist() if prompt else []
    ids, shares = list(read), [[]] * min(1, len(read))
    settled: list[str] = []  # less the last piece, which the next token may change
    for drawn in draw(model, ids_BT, fitting, stops(tokenizer)):
        ids.append(drawn.token)
        shares += drawn.shares
        added = [*settled, *pieces(tokenizer, ids, settled)]
        settled = added[:-1]
        yield Traced(tuple(names), added, list(shares), len(read))


def painted(traced: Traced) -> str:
    """Return a traced text, each token in the colour of the expert that carried it, and a legend.

    Tokens of the prompt are coloured by who foretold them best so far. A rule without weights (an
    adapter) leaves the text plain.
    """
    spans: list[str] = []
    for index, (piece, shares) in enumerate(zip(traced.pieces, _padded(traced), strict=True)):
        origin = "prompt" if index < traced.prompt else "new"
        if not shares:
            spans.append(token(piece, origin, quoted(piece)))
            continue
        lead = max(range(len(shares)), key=shares.__getitem__)
        said = ", ".join(
            f"{name} {share:.0%}" for name, share in zip(traced.names, shares, strict=True)
        )
        spans.append(
            token(piece, f"{origin} e{lead % COLORS}", f"{quoted(piece)}: {said}", shares[lead])
        )
    return legend(traced) + tokens(spans, "The text, coloured by the expert that carried it")


def _padded(traced: Traced) -> list[list[float]]:
    """Return the shares of every token, none where the rule has none."""
    missing = len(traced.pieces) - len(traced.shares)
    return [*traced.shares, *([[]] * missing)]


def legend(traced: Traced) -> str:
    """Return every expert's name in its colour, with its mean share of the new tokens."""
    new = [shares for shares in _padded(traced)[traced.prompt :] if shares]
    items = "".join(
        f'<li><i class="swatch e{index % COLORS}"></i>{html.escape(name)}'
        + (f" <b>{sum(shares[index] for shares in new) / len(new):.0%}</b>" if new else "")
        + "</li>"
        for index, name in enumerate(traced.names)
    )
    said = "" if new else "<p>This rule has no weights for each expert.</p>"
    return f'<ul class="legend" aria-label="Mean share of each expert">{items}</ul>{said}'


def posterior(traced: Traced) -> str:
    """Return the experts' shares over the tokens as a chart, the prompt as a band, and as a table.

    Nothing for a rule that has no weights.
    """
    points = [(index, shares) for index, shares in enumerate(traced.shares) if shares]
    if not points:
        return ""
    lines = [
        Line(name, [(float(at), shares[index]) for at, shares in points], f"e{index % COLORS}")
        for index, name in enumerate(traced.names)
    ]
    last = len(traced.pieces)
    bands = [(0.0, float(traced.prompt), "prompt")] if traced.prompt else []
    bands.append((float(traced.prompt), float(last), "new tokens"))
    chart = draw_lines(
        lines,
        title="Who carries the text",
        about="each expert's share in the distribution that a token was drawn from",
        x_label="tokens",
        y_range=(0.0, 1.0),
        y_format=lambda value: f"{value:.0%}",
        bands=bands,
    )
    rows = [
        {"token": quoted(traced.pieces[at])}
        | {name: f"{share:.0%}" for name, share in zip(traced.names, shares, strict=True)}
        for at, shares in points
    ]
    return chart + details("Every token as a table", to_html(rows))


def experts(mixtures: Mixtures, names: Sequence[str]) -> str:
    """Return a table of all experts, what each is and whether it plays, and who cannot join."""
    rows = [
        {
            "expert": name,
            "plays": "yes" if name in names else "no",
            "blocks": str(len(expert.layout.blocks)),
            "parameters": count(expert.layout.parameters),
            "context": str(expert.context),
            "folder": _from_here(expert.path),
        }
        for name, expert in mixtures.experts.items()
    ]
    left_out = "".join(
        f'<p class="note">{html.escape(f"{name} cannot join: {why}")}</p>'
        for name, why in mixtures.left_out.items()
    )
    return to_html(rows, code=("folder",)) + left_out


def _from_here(path: Path) -> str:
    """Return a path as seen from the current folder, if it is inside."""
    here = Path.cwd()
    return str(path.relative_to(here) if path.is_relative_to(here) else path)
