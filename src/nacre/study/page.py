"""What a study leaves for people: a page of tables, charts and sentences, made from its results."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from nacre.atomic import write_text
from nacre.folders import RESULTS
from nacre.report import formats
from nacre.report.formats import Cell, to_markdown
from nacre.report.html import png, svg
from nacre.report.tables import memory, number, shortened
from nacre.study.charts import CHARTS
from nacre.study.results import by_arm_and_budget
from nacre.train import files

PAGE = "README.md"
LARGE = 1e5  # scores from here on are shown to three digits
Row = dict[str, str]


def write(found: Mapping[str, Any], out: str | Path) -> Path:
    """Write what `read_results` returned into the folder `out`: `results.json`, charts, a page.

    Returns the page, Markdown that shows the charts beside it; they stand there as PNG and SVG, the
    tables `arms`, `equal-cost` and `scores` as CSV and LaTeX. The same results give the same files,
    byte for byte.
    """
    out = Path(out)
    out.mkdir(parents=True, exist_ok=True)
    files.write_json(out / RESULTS, found)
    pictures: list[str] = []
    for name, (draw, alt) in CHARTS.items():
        figure = draw(found)
        if figure is not None:
            (out / f"{name}.png").write_bytes(png(figure))
            (out / f"{name}.svg").write_bytes(svg(figure))
            pictures.append(f"![{alt}]({name}.png)")
    for name, rows in tables(found).items():
        for file, text in formats.files(name, rows).items():
            (out / file).write_text(text, encoding="utf-8")
    parts = [f"# {found['study']['name']}", found["study"]["about"], about(found)]
    text = "\n\n".join(filter(None, [*parts, *sections(found), *pictures]))
    write_text(out / PAGE, text + "\n")
    return out / PAGE


def about(found: Mapping[str, Any]) -> str:
    """Return a sentence on what was run, where, and what is missing."""
    study, machine = found["study"], found["machine"]
    threads = machine["threads"]
    seeds = study["seeds"]
    text = f"{len(found['runs'])} runs, seed{'s' * (len(seeds) > 1)} {', '.join(map(str, seeds))}"
    where = machine["accelerator"] or machine["processor"] or machine["device"]
    text += f"; {where}, {threads} thread{'s' * (threads != 1)} a run"
    text += f", torch {machine['torch']}"
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
    arms, compared, scored = tables(found).values()
    parts = [to_markdown(arms)]
    if compared:
        parts += [f"Against {found['study']['baseline']}, bits per byte at equal cost:"]
        parts += [to_markdown(compared)]
    parts += [to_markdown(scored)] if scored else []
    said = [claim["sentence"] for claim in found["claims"]]
    said += [crossing(each) for each in found["crossings"] if each["below"]]
    return [*parts, "\n".join(f"- {sentence}" for sentence in said)]


def tables(found: Mapping[str, Any]) -> dict[str, list[Row]]:
    """Return the tables of a study by the names of their files; some may be empty."""
    return {
        "arms": arm_rows(found["runs"]),
        "equal-cost": comparison_rows(found["comparisons"]),
        "scores": score_rows(found["runs"]),
    }


def crossing(found: Mapping[str, Any]) -> str:
    """Say at which costs an arm has fewer bits per byte than another."""
    unit = {"tokens": "tokens", "flops": "FLOPs", "seconds": "seconds"}[found["at"]]
    arm, against, below = found["arm"], found["against"], found["below"]
    seeds = f"{len(found['seeds'])} seed{'s' * (len(found['seeds']) > 1)}"
    first, last = below[0], below[-1]
    if not found["costs"]:
        lies = "always" if first["below"] else "never"
        between = f"between {first['cost']:.3g} and {last['cost']:.3g} {unit}"
        return f"{arm} is {lies} below {against}, on average over {seeds}, {between}"
    between = f"from {first['cost']:.3g} to {last['cost']:.3g} {unit}, {seeds}"
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
            "budget": _budget(budget),
            "seeds": number(len(group)),
            "tokens": shortened(fmean(run["tokens"] for run in group)),
            "FLOPs": number(fmean(run["flops"] for run in group), ".2e"),
            "seconds": number(fmean(run["seconds"] for run in group), ",.0f"),
            "peak memory": memory(fmean(run["peak_memory_bytes"] for run in group)),
            "active": shortened(group[0]["active_parameters"]),
            "total": shortened(group[0]["total_parameters"]),
            "bits per byte": spread([run["bits_per_byte"] for run in group]),
        }
        for (arm, budget), group in by_arm_and_budget(runs).items()
    ]


def comparison_rows(comparisons: Iterable[Mapping[str, Any]]) -> list[Row]:
    """Return a row for each arm and budget: its ratio to the baseline at every kind of cost."""
    rows: dict[tuple[str, float], Row] = {}
    titles = {"tokens": "equal tokens", "flops": "equal FLOPs", "seconds": "equal wall-clock"}
    for each in comparisons:
        key = each["arm"], each["budget"]
        if key not in rows:
            rows[key] = {"arm": each["arm"], "budget": _budget(each["budget"])}
            rows[key] |= dict.fromkeys(titles.values(), Cell("–", None))
        rows[key][titles[each["at"]]] = ratio(each)
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
        row: Row = {"arm": arm, "budget": _budget(budget), "task": task, "metric": metric}
        row |= {f"depth {d}": spread(by_depth.get(d, [])) for d in depths}
        known = Cell("–", None) if guess is None else number(guess, ".3g")
        rows.append(row | {"chance": known})
    return rows


def ratio(compared: Mapping[str, Any]) -> Cell:
    """Return a ratio with its interval over seeds, `0.970x (0.962 to 0.978)`."""
    text, interval = f"{compared['mean']:.3f}x", compared["interval"]
    if interval is not None:
        text += f" ({interval[0]:.3f} to {interval[1]:.3f})"
    return Cell(text, compared["mean"], interval)


def spread(values: Sequence[float | None]) -> Cell:
    """Return the mean of what was measured and, of several, the lowest and the highest."""
    known = [value for value in values if value is not None]
    if not known:
        return Cell("–", None)
    mean, low, high = fmean(known), min(known), max(known)
    digits = ".4f" if high < LARGE else ".3g"
    if len(known) == 1:
        return number(mean, digits)
    return Cell(f"{mean:{digits}} ({low:{digits}} to {high:{digits}})", mean, (low, high))


def _budget(times: float) -> Cell:
    return Cell(f"x{times:g}", times)
