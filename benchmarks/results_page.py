"""Write docs/results.md, docs/experiments.md and the README's table from what studies found.

    nacre study benchmarks/studies/NAME.yaml --out runs/NAME
    cp runs/NAME/results.json docs/results/NAME.json
    python benchmarks/results_page.py

The studies of RESULTS are confirmed with seeds; every other file of a study in docs/results is a
search, and goes into the log of experiments with all of its arms, the bad ones too.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nacre.numbers import count
from nacre.report.formats import to_markdown
from nacre.study import charts, page
from nacre.study.results import by_arm_and_budget

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
README = ROOT / "README.md"
RESULTS = ("growth", "russian", "deep", "wide", "six-arms", "khop")
HEADLINES = {
    ("growth", "grow"): "`grow`: two new blocks at a time; what was trained is frozen for good",
    ("growth", "grow-under"): "`grow-under`: the same, but the two blocks on top always train",
    ("growth", "stack"): "`stack`: two trained blocks, copied into six that all train",
    ("deep", "grow"): "`grow` with twelve blocks",
    ("russian", "grow"): "`grow` on Russian works",
}
"""What the README shows: arms of studies, and what they are."""
BUDGETS = {1.0: "1 token a parameter", 5.0: "5", 20.0: "20"}


def main() -> None:
    found = {}
    for path in sorted((DOCS / "results").glob("*.json")):
        data = json.loads(path.read_text(encoding="utf-8"))
        if "comparisons" in data:
            found[path.stem] = data
    confirmed = [study(name, found[name]) for name in RESULTS if name in found]
    text = "\n\n".join(["# Results", INTRODUCTION, *confirmed])
    (DOCS / "results.md").write_text(text + "\n", encoding="utf-8")
    searched = [search(name, each) for name, each in found.items() if name not in RESULTS]
    text = "\n\n".join(["# Experiments", LOG, *searched])
    (DOCS / "experiments.md").write_text(text + "\n", encoding="utf-8")
    README.write_text(with_headlines(README.read_text(encoding="utf-8"), found), encoding="utf-8")


INTRODUCTION = """What growth brings beside training end to end, measured here. Each section is a
[study](studies.md): its plans stand in `benchmarks/studies`, its numbers in `docs/results`, and
`python benchmarks/results_page.py` made this page from them. A verdict is computed, and says
*undecided* where the seeds do not settle it."""

LOG = """Every plan that was tried on the way to the default one, the bad ones too, one seed each
unless it says more: enough to choose what to confirm with seeds ([results](results.md)), not to
conclude. The last two columns set an arm against the end-to-end run at the same FLOPs and tokens,
interpolated between that run's budgets; below 1 is better. `python benchmarks/results_page.py` made
this page."""


def with_headlines(text: str, found: Mapping[str, Any]) -> str:
    """Return the README with its table of ratios at equal FLOPs, between its marks."""
    rows = []
    for (name, arm), what in HEADLINES.items():
        budgets = {
            each["budget"]: each
            for each in found[name]["comparisons"]
            if (each["arm"], each["at"]) == (arm, "flops")
        }
        seeds = found[name]["study"]["seeds"]
        cells = {head: judged(budgets.get(budget), seeds) for budget, head in BUDGETS.items()}
        rows.append({"at equal FLOPs": what, **cells})
    before, rest = text.split("<!-- growth -->\n")
    _, after = rest.split("<!-- /growth -->\n")
    return f"{before}<!-- growth -->\n{to_markdown(rows)}\n<!-- /growth -->\n{after}"


def judged(comparison: Mapping[str, Any] | None, seeds: Sequence[int]) -> str:
    """Return a ratio with what its 95% interval says of it; nothing where seeds are missing."""
    if comparison is None:
        return "–"
    interval = comparison["interval"]
    low, high = interval if interval and len(comparison["ratios"]) == len(seeds) else (0, math.inf)
    word = "**ahead**" if high < 1 else "behind" if low > 1 else "undecided"
    return f"{comparison['mean']:.3f} {word}"


def study(name: str, found: Mapping[str, Any]) -> str:
    """Return the section of a confirmed study, and draw its charts beside the page."""
    pictures = []
    for kind, (draw, alt) in charts.CHARTS.items():
        figure = draw(found)
        if figure is not None:
            target = DOCS / "images" / f"{name}-{kind}.png"
            figure.savefig(target, metadata={"Software": None})
            pictures.append(f"![{alt}](images/{target.name})")
    head = [f"## {name}", found["study"]["about"].strip(), page.about(found)]
    return "\n\n".join([*filter(None, head), *page.sections(found), *pictures])


def search(name: str, found: Mapping[str, Any]) -> str:
    """Return the section of a search: a row an arm and budget, in the order of its file."""
    compared = {(c["arm"], c["budget"], c["at"]): c for c in found["comparisons"]}
    rows = []
    order = list(found["study"]["arms"])
    groups = by_arm_and_budget(found["runs"])
    for arm, budget in sorted(groups, key=lambda key: (key[1], order.index(key[0]))):
        runs = groups[arm, budget]
        against = [compared.get((arm, budget, at)) for at in ("flops", "tokens")]
        rows.append(
            {
                "arm": arm,
                "plan": described(found["study"]["arms"][arm]),
                "budget": f"x{budget:g}",
                "tokens": count(runs[0]["tokens"]),
                "FLOPs": f"{runs[0]['flops']:.2e}",
                "bits per byte": page.spread([run["bits_per_byte"] for run in runs]),
                "at equal FLOPs": page.ratio(against[0]) if against[0] else "–",
                "at equal tokens": page.ratio(against[1]) if against[1] else "–",
            }
        )
    head = [f"## {name}", found["study"]["about"].strip(), page.about(found)]
    return "\n\n".join([*filter(None, head), to_markdown(rows)])


def described(arm: Mapping[str, Any]) -> str:
    """Return an arm's plan in a line: what each stage adds, how, and what else is its own."""
    parts = []
    for stage in arm["stages"]:
        words = [f"+{stage['add_blocks']}"] if stage.get("add_blocks") else []
        words += [stage["init"]] if "init" in stage else []
        words += [f"under {stage['under']}"] if "under" in stage else []
        if "train" in stage:
            train = stage["train"]
            words.append(f"train {train if isinstance(train, str) else train['blocks']}")
        words += [f"LoRA {stage['lora']['rank']}"] if stage.get("lora") else []
        words += [f"lr {stage['lr']}"] if "lr" in stage else []
        words += [stage["schedule"]] if "schedule" in stage else []
        words += ["auto"] if stage.get("budget") == "auto" else []
        parts.append(f"{' '.join(words)}: {stage['tokens']}")
    own = {k: v for k, v in arm.items() if k not in ("stages", "budgets", "about")}
    return "; ".join([*parts, *settings(own)])


def settings(own: Mapping[str, Any], path: str = "") -> list[str]:
    """Return nested settings as `training.lr=4e-3`."""
    return [
        text
        for key, value in own.items()
        for text in (
            settings(value, f"{path}{key}.")
            if isinstance(value, dict)
            else [f"{path}{key}={value}"]
        )
    ]


if __name__ == "__main__":
    main()
