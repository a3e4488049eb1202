"""Write the composition study's tables into docs/composition.md, from its scores alone.

    python benchmarks/composition_page.py docs/results/composition.jsonl

Replaces what stands between the two markers of the document.
"""

from __future__ import annotations

import json
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parent.parent / "docs" / "composition.md"
BEGIN, END = "<!-- study: begin -->\n", "<!-- study: end -->\n"
PAIRS = (("en", "ru"), ("en", "zh"), ("en", "code"))
FOUR = ("en", "ru", "zh", "code")
KINDS = ("switches", "mixed")
DEFAULT = "fixed-share"
NAMES = {"en": "English", "ru": "Russian", "zh": "Chinese", "code": "Python"}
GROWN = {"apart": "entirely apart", "trunk": "on a common trunk"}

Scores = dict[int, dict[str, float]]
"""Bits per byte by seed and text."""


class Study:
    """All scores, found by what was scored."""

    def __init__(self, path: Path) -> None:
        self.records = [json.loads(line) for line in path.read_text().splitlines()]
        self.seeds = sorted({record["seed"] for record in self.records})

    def find(self, **about: Any) -> Scores:
        """Return the scores of one model or composition, of every seed that has it."""
        found: Scores = {}
        for record in self.records:
            if all(record.get(key) == value for key, value in about.items()):
                found[record["seed"]] = record["bits_per_byte"]
        return found

    def rules(self, grown: str, experts: Sequence[str]) -> list[str]:
        """Return the rules that were scored for a composition, in order."""
        own = [r for r in self.records if r.get("grown") == grown and r["experts"] == list(experts)]
        return list(dict.fromkeys(record["rule"] for record in own))


def number(values: Sequence[float], digits: int = 3, sign: bool = False) -> str:
    """Return mean and, of several values, half of their range."""
    shown = f"{statistics.mean(values):{'+' if sign else ''}.{digits}f}"
    spread = (max(values) - min(values)) / 2
    return f"{shown} ±{spread:.{digits}f}" if len(values) > 1 else shown


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines) + "\n"


def pair_table(study: Study, grown: str, a: str, b: str) -> str:
    """Return the scores of a pair under every rule, beside experts and one model."""
    texts = [a, b, *(f"{a}-{b} {kind}" for kind in KINDS)]
    suffix = "" if grown == "apart" else "-branch"
    rows: list[tuple[str, Scores]] = [
        (f"{NAMES[a]} expert", study.find(model=f"{a}{suffix}")),
        (f"{NAMES[b]} expert", study.find(model=f"{b}{suffix}")),
        ("one model on both", study.find(model=f"{a}-and-{b}")),
    ]
    for rule in study.rules(grown, (a, b)):
        shown = f"**{rule}**" if rule == DEFAULT else f"{rule}"
        rows.append((shown, study.find(grown=grown, experts=[a, b], rule=rule)))
    head = ["bits per byte", NAMES[a], NAMES[b], "switches once", "mixed"]
    return table(
        head,
        [
            [name, *(number([score[text] for score in scores.values()]) for text in texts)]
            for name, scores in rows
            if scores
        ],
    )


def differences(study: Study, grown: str, experts: Sequence[str]) -> dict[str, list[float]]:
    """Return the default rule against what it must beat, one value a seed and text."""
    suffix = "" if grown == "apart" else "-branch"
    ours = study.find(grown=grown, experts=list(experts), rule=DEFAULT)
    alone = {expert: study.find(model=f"{expert}{suffix}") for expert in experts}
    found: dict[str, list[float]] = {"own": [], "one, own": []}
    found |= {f"best expert, {kind}": [] for kind in KINDS} | {f"one, {kind}": [] for kind in KINDS}
    for seed, scores in ours.items():
        for expert in experts:
            found["own"].append(scores[expert] - alone[expert][seed][expert])
        if len(experts) != 2:
            continue
        one = study.find(model="-and-".join(experts))[seed]
        found["one, own"] += [scores[expert] - one[expert] for expert in experts]
        for kind in KINDS:
            text = f"{experts[0]}-{experts[1]} {kind}"
            best = min(alone[expert][seed][text] for expert in experts)
            found[f"best expert, {kind}"].append(scores[text] / best - 1)
            found[f"one, {kind}"].append(scores[text] - one[text])
    return found


Judge = Callable[[list[float]], bool]
CLAIMS: list[tuple[str, str, Judge, bool]] = [
    ("own domain against that expert: at most +0.005", "own", lambda d: max(d) <= 0.005, False),
    ("switching once, against the better expert: 20% fewer", "best expert, switches",
     lambda d: max(d) <= -0.2, True),
    ("mixed, against the better expert: 20% fewer", "best expert, mixed",
     lambda d: max(d) <= -0.2, True),
    ("own domain against one model, equal compute: fewer", "one, own", lambda d: max(d) < 0, False),
    ("switching once, against one model: not worse", "one, switches", lambda d: max(d) <= 0, False),
    ("mixed, against one model: not worse", "one, mixed", lambda d: max(d) <= 0, False),
]  # fmt: skip


def claims(study: Study) -> str:
    """Return what the default rule was to reach, what it reached, and whether it holds."""
    rows: list[list[str]] = []
    for text, key, judge, share in CLAIMS:
        for grown in ("apart",) if key.startswith("one") else GROWN:  # else compute is not equal
            for a, b in PAIRS:
                values = differences(study, grown, (a, b))[key]
                if values:
                    rows.append(claim(text, f"{a}, {b}; {GROWN[grown]}", values, judge, share))
    for grown in GROWN:
        values = differences(study, grown, FOUR)["own"]
        if values:
            text = "own domain with four experts: at most +0.01"
            rows.append(claim(text, GROWN[grown], values, lambda d: max(d) <= 0.01, False))
    return table(["target, bits per byte", "experts", "least", "mean", "most", ""], rows)


def claim(text: str, where: str, values: list[float], judge: Judge, share: bool) -> list[str]:
    """Return one row: the least, mean and largest value, and whether every one of them holds."""
    shown = [min(values), statistics.mean(values), max(values)]
    cells = [f"{100 * value:+.1f}%" if share else f"{value:+.4f}" for value in shown]
    return [text, where, *cells, "holds" if judge(values) else "missed"]


def four_table(study: Study) -> str:
    """Return the scores of four experts on each one's own domain."""
    rows: list[list[str]] = []
    for grown, suffix in (("apart", ""), ("trunk", "-branch")):
        alone = {expert: study.find(model=f"{expert}{suffix}") for expert in FOUR}
        values = [[score[expert] for score in alone[expert].values()] for expert in FOUR]
        rows.append([f"each expert alone, {GROWN[grown]}", *map(number, values)])
        for rule in study.rules(grown, FOUR):
            scores = study.find(grown=grown, experts=list(FOUR), rule=rule).values()
            shown = f"**{rule}**" if rule == DEFAULT else rule
            rows.append([shown, *(number([score[expert] for score in scores]) for expert in FOUR)])
    return table(["bits per byte", *(NAMES[expert] for expert in FOUR)], rows)


def page(study: Study) -> str:
    """Return everything that stands between the markers."""
    seeds = f"{len(study.seeds)} seeds" if len(study.seeds) > 1 else "one seed"
    parts = [f"Means over {seeds}, ± half of the range.\n"]
    for grown, words in GROWN.items():
        for a, b in PAIRS:
            if study.rules(grown, (a, b)):
                parts.append(f"{NAMES[a]} and {NAMES[b]}, experts grown {words}:\n")
                parts.append(pair_table(study, grown, a, b))
    parts += ["Four experts, on each one's own text:\n", four_table(study)]
    parts += [
        f"What `{DEFAULT}` was to reach; a target holds if it does for every domain and seed:\n",
        claims(study),
    ]
    return "\n".join(parts)


def main() -> None:
    study = Study(Path(sys.argv[1]))
    before, begin, rest = DOCUMENT.read_text(encoding="utf-8").partition(BEGIN)
    after = rest.partition(END)[2]
    assert begin, f"{DOCUMENT} has lost its markers"
    DOCUMENT.write_text(before + BEGIN + "\n" + page(study) + "\n" + END + after, encoding="utf-8")


if __name__ == "__main__":
    main()
