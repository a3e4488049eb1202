"""What a study leaves for people: a page of tables, charts and sentences, made from its results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nacre.atomic import write_text
from nacre.folders import RESULTS
from nacre.numbers import count, size
from nacre.study.charts import CHARTS
from nacre.study.results import by_arm_and_budget
from nacre.train import checkpoint

PAGE = "README.md"
Row = dict[str, str]


def write(found: Mapping[str, Any], out: str | Path) -> Path:
    """Write what `read_results` returned into the folder `out`: `results.json`, charts, a page.

    Returns the page, Markdown that shows the charts beside it. The same results give the same
    files, byte for byte.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_json(out / RESULTS, found)
    pictures: list[str] = []
    for name, (draw, alt) in CHARTS.items():
        figure = draw(found)
        if figure is not None:
            figure.savefig(out / f"{name}.png", metadata={"Software": None})
            pictures.append(f"![{alt}]({name}.png)")
    parts = [f"# {found['study']['name']}", found["study"]["about"], about(found)]
    text = "\n\n".join(filter(None, [*parts, *sections(found), *pictures]))
    write_text(out / PAGE, text + "\n")
    return out / PAGE


def about(found: Mapping[str, Any]) -> str:
    """Return a sentence on what was run, where, and what is missing."""
    study, machine = found["study"], found["machine"]
    seeds = study["seeds"]
    text = f"{len(found['runs'])} runs, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    where = machine["accelerator"] or machine["processor"] or machine["device"]
    text += f"; {where}, {machine['threads']} threads a run, torch {machine['torch']}"
    text += f", transformers {machine['transformers']}"
    text += " (not all runs on the same: wall-clock does not compare)" * machine["mixed"]
    jobs = machine.get("jobs", [])
    if len(jobs) > 1:
        text += f" (made {' and '.join(map(str, jobs))} side by side: wall-clock does not compare)"
    missing = len(found["missing"])
    lack = f" {missing} {'run is' if missing == 1 else 'runs are'} missing." if missing else ""
    return f"{text}.{lack}"


def sections(found: Mapping[str, Any]) -> list[str]:
    """Return the tables and the verdicts of a study as Markdown."""
    parts = [table(arm_rows(found["runs"]))]
    if found["comparisons"]:
        parts += [f"Against {found['study']['baseline']}, bits per byte at equal cost:"]
        parts += [table(comparison_rows(found["comparisons"]))]
    scored = score_rows(found["runs"])
    parts += [table(scored)] if scored else []
    said = [claim["sentence"] for claim in found["claims"]]
    said += [crossing(each) for each in found["crossings"] if each["below"]]
    return [*parts, "\n".join(f"- {sentence}" for sentence in said)]


def crossing(found: Mapping[str, Any]) -> str:
    """Say at which costs an arm has fewer bits per byte than another."""
    unit = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}[found["at"]]
    arm, against, below = found["arm"], found["against"], found["below"]
    seeds = f"{len(found['seeds'])} seed{'s' * (len(found['seeds']) > 1)}"
    first, last = below[0], below[-1]
    between = f"from {first['cost']:.3g} to {last['cost']:.3g} {unit}, {seeds}"
    if not found["costs"]:
        lies = "below" if first["below"] else "not below"
        return f"{arm} lies {lies} {against} in the mean everywhere {between}"
    costs = ", ".join(f"{cost:.3g}" for cost in found["costs"])
    begins = "below" if first["below"] else "above"
    return (
        f"{arm} begins {begins} {against} in the mean and crosses it at {costs} {unit} ({between})"
    )


def arm_rows(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each arm and budget: its costs and score, the mean over seeds."""
    return [
        {
            "arm": arm,
            "budget": f"x{budget:g}",
            "seeds": str(len(group)),
            "tokens": count(fmean(run["tokens"] for run in group)),
            "FLOPs": f"{fmean(run['flops'] for run in group):.2e}",
            "seconds": f"{fmean(run['seconds'] for run in group):,.0f}",
            "peak memory": size(fmean(run["peak_memory_bytes"] for run in group)),
            "active": count(group[0]["active_parameters"]),
            "total": count(group[0]["total_parameters"]),
            "bits per byte": spread([run["bits_per_byte"] for run in group]),
        }
        for (arm, budget), group in by_arm_and_budget(runs).items()
    ]


def comparison_rows(comparisons: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each arm and budget: its ratio to the baseline at every kind of cost."""
    rows: dict[tuple[str, float], Row] = {}
    titles = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal wall-clock"}
    for each in comparisons:
        row = rows.setdefault(
            (each["arm"], each["budget"]),
            {"arm": each["arm"], "budget": f"x{each['budget']:g}"}
            | dict.fromkeys(titles.values(), "–"),
        )
        row[titles[each["at"]]] = ratio(each)
    return list(rows.values())


def score_rows(runs: Sequence[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each arm, whole task and metric: the mean over seeds at every depth."""
    depths = sorted({score["depth"] for run in runs for score in run["scores"]})
    values: dict[tuple[str, float, str, str], dict[int, list[float]]] = {}
    chance: dict[tuple[str, str], float | None] = {}
    for run in runs:
        for one in run["scores"]:
            if not one["subset"]:
                key = (run["arm"], run["budget"], one["task"], one["metric"])
                values.setdefault(key, {}).setdefault(one["depth"], []).append(one["value"])
                chance[one["task"], one["metric"]] = one["chance"]
    rows: list[Row] = []
    for (arm, budget, task, metric), by_depth in values.items():
        guess = chance[task, metric]
        row = {"arm": arm, "budget": f"x{budget:g}", "task": task, "metric": metric}
        row |= {f"depth {d}": spread(by_depth.get(d, [])) for d in depths}
        rows.append(row | {"chance": "–" if guess is None else f"{guess:.3g}"})
    return rows


def ratio(compared: Mapping[str, Any]) -> str:
    """Return a ratio with its interval over seeds, `0.970x (0.962 to 0.978)`."""
    if compared["interval"] is None:
        return f"{compared['mean']:.3f}x"
    low, high = compared["interval"]
    return f"{compared['mean']:.3f}x ({low:.3f} to {high:.3f})"


def spread(values: Sequence[float | None]) -> str:
    """Return the mean of what was measured and, of several, the lowest and the highest."""
    known = [value for value in values if value is not None]
    if not known:
        return "–"
    text = f"{fmean(known):.4f}"
    return text if len(known) == 1 else f"{text} ({min(known):.4f} to {max(known):.4f})"


def table(rows: Sequence[Row]) -> str:
    """Return rows of equal columns as a Markdown table."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)
