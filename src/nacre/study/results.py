"""What a study found: every run's numbers, arms at equal cost, and what becomes of its claims.

An arm is compared with another at equal tokens, FLOPs or seconds on the other's curve over budgets:
between them the logarithm of the score is a parabola of that of the cost (`at_cost`), beyond them
nothing is said. Ratios are paired by seed; their interval is Student's over seeds, of the
logarithms. No sentence of a result is written by hand.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import numpy as np
from numpy.polynomial import Polynomial

from nacre.errors import CheckpointError, FingerprintError
from nacre.evaluate import run as evaluation
from nacre.evaluate.tasks import Task
from nacre.study.design import Claim, Run, Study
from nacre.study.runner import check_plan, evaluation_tasks, finished, jobs_of
from nacre.train import files, schema
from nacre.train.metrics import read_metrics

AXES = ("tokens", "flops", "seconds")
STUDENT = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
"""Quantiles 0.975 of Student's t distribution for 1, 2, ... degrees of freedom."""
NORMAL = 1.959964  # the same of the normal distribution
EDGE = 1.02  # costs this near to the end of a curve count as that end
SCORE = ("depth", "task", "subset", "metric", "value", "n", "chance")
SAID = {
    "bits_per_byte": "bits per byte", "loss": "loss", "peak_memory_bytes": "peak memory",
    "active_parameters": "active parameters",
}  # fmt: skip


def read_results(study: Study, out: str | Path) -> dict[str, Any]:
    """Return what the finished runs of a study in the folder `out` show, as plain JSON.

    Raises `CheckpointError` if there are none, and `FingerprintError` for runs that another plan
    made or that stand on different text.
    """
    out = Path(out)
    runs = study.runs(out)
    made = [run for run in runs if finished(run)]
    for run in made:
        check_plan(run)
    if not made:
        fix = "leave --no-run out to make them"
        raise CheckpointError(f"{out}: no run of this study has finished; {fix}")
    tasks = [] if study.evaluate is None else evaluation_tasks(study.evaluate)
    same_text = _check_text(made, study)
    rows = [measure(run, study, tasks) for run in made]
    pairs = [
        comparison(rows, arm, study.baseline, budget, "bits_per_byte", axis)
        for arm in study.arms
        if arm != study.baseline
        for budget in study.budgets_of(arm)
        for axis in AXES
    ]
    claims = study.claims or default_claims(study)
    return {
        "study": study.model_dump(mode="json"),
        "machine": _machine(made),
        "same_text": same_text,
        "missing": [str(run.folder) for run in runs if run not in made],
        "runs": rows,
        "comparisons": [pair for pair in pairs if pair["ratios"]],
        "crossings": [
            crossing(rows, arm, study.baseline, axis)
            for arm in study.arms
            if arm != study.baseline and len(study.budgets_of(arm)) > 1
            for axis in AXES
        ],
        "claims": [decide(claim, study, rows) for claim in claims],
    }


def _check_text(made: Sequence[Run], study: Study) -> bool:
    """Tell whether all runs hold out the same text; refuse if not, unless texts are named."""
    named = study.evaluate is not None and study.evaluate.data is not None
    first: tuple[Run, dict[str, Any]] | None = None
    for run in made:
        record = files.read_stage(files.stages(run.folder)[-1], schema.CostedRecord)
        first = first or (run, record)
        for part in ("corpus", "tokenizer"):
            if record[part] == first[1][part]:
                continue
            if named:
                return False
            fix = f"it is not that of {first[0].folder}: make the older runs again"
            raise FingerprintError(
                f"the {part} of {run.folder}", first[1][part][:12], record[part][:12], fix
            )
    return True


def default_claims(study: Study) -> list[Claim]:
    """Return, for a study that claims nothing, that each arm is no worse than the baseline."""
    return [
        Claim(arm=arm, at=axis)
        for arm in study.arms
        if arm != study.baseline
        for axis in ("tokens", "seconds")
    ]


def measure(run: Run, study: Study, tasks: Sequence[Task] = ()) -> dict[str, Any]:
    """Return a finished run's costs, scores and curve; of `tasks` what was kept of scoring it."""
    folders = files.stages(run.folder)
    records = [files.read_stage(path, schema.CostedRecord) for path in folders]
    last = records[-1]["validation"]
    bits = last["bits_per_byte"]
    known = [evaluation.known_results(path, tasks) if tasks else [] for path in folders]
    if study.evaluate is not None and study.evaluate.data is not None:
        whole = ("lm", "", "bits_per_byte")
        found = [r for r in known[-1] if (r["task"], r["subset"], r["metric"]) == whole]
        bits = found[0]["value"] if found else None
    return {
        "arm": run.arm,
        "seed": run.seed,
        "budget": run.budget,
        "jobs": jobs_of(run.folder),
        "tokens": sum(record["tokens"] for record in records),
        "flops": sum(record["flops"] for record in records),
        "seconds": sum(_seconds(record) for record in records),
        "peak_memory_bytes": max(record["peak_memory_bytes"] for record in records),
        "active_parameters": max(record["active_parameters"] for record in records),
        "total_parameters": records[-1]["total_parameters"],
        "bits_per_byte": bits,
        "loss": last["loss"],
        "stages": [
            {key: record[key] for key in ("depth", "tokens", "flops")}
            | {"seconds": _seconds(record)}
            | {"bits_per_byte": record["validation"]["bits_per_byte"]}
            for record in records
        ],
        "curve": curve(run, records),
        "scores": [
            dict(zip(SCORE, (record["depth"], *(one[key] for key in SCORE[1:])), strict=True))
            for record, scored in zip(records, known, strict=True)
            for one in scored
        ],
    }


def _seconds(record: Mapping[str, Any]) -> float:
    """Return a stage's seconds: of training, and of storing its trunk's outputs."""
    cache = (record.get("trunk") or {}).get("cache") or {}
    return record["seconds"] + cache.get("seconds", 0.0)


def curve(run: Run, records: Sequence[Mapping[str, Any]]) -> list[dict[str, float]]:
    """Return held-out bits per byte over the run: tokens, FLOPs, seconds and score at each point.

    Evaluations within a stage and the end of each; their own time does not count.
    """
    points: list[dict[str, float]] = []
    before = dict.fromkeys(AXES, 0.0)
    lines = read_metrics(run.folder, schema.MetricLine)
    for record in records:
        seconds = _seconds(record) - record["seconds"]  # the cache is made before the first step
        per_token = record["flops"] / record["tokens"]
        tokens = 0
        for line in lines:
            if line["stage"] != record["stage"]:
                continue
            if "validation" in line:
                at = {
                    "tokens": before["tokens"] + line["tokens"],
                    "flops": before["flops"] + line["tokens"] * per_token,
                    "seconds": before["seconds"] + seconds,
                }
                points.append(at | {"bits_per_byte": line["validation"]["bits_per_byte"]})
            else:
                seconds += (line["tokens"] - tokens) / line["tokens_per_second"]
                tokens = line["tokens"]
        before["tokens"] += record["tokens"]
        before["flops"] += record["flops"]
        before["seconds"] += _seconds(record)
        points.append(before | {"bits_per_byte": record["validation"]["bits_per_byte"]})
    return points


def at_cost(curve: Sequence[tuple[float, float]], cost: float) -> float | None:
    """Return the score of a curve of (cost, score) points at a cost; None outside of its points.

    In logarithms it is a parabola through the two points around the cost and a third beside them;
    the mean of two parabolas where there is a third on either side. Through two points alone it is
    a straight line, which lies above a loss that falls ever more slowly.
    """
    points = sorted(dict(curve).items())
    if not points or not points[0][0] / EDGE <= cost <= points[-1][0] * EDGE:
        return None
    if len(points) == 1:
        return points[0][1]
    at = math.log(min(max(cost, points[0][0]), points[-1][0]))
    logs = np.log(points)
    right = max(1, int(np.searchsorted(logs[:, 0], at)))
    triples = [logs[n : n + 3] for n in (right - 2, right - 1) if 0 <= n <= len(logs) - 3]
    fits = [Polynomial.fit(*near.T, deg=len(near) - 1) for near in triples or [logs]]
    return math.exp(fmean(float(fit(at)) for fit in fits))


@dataclass(frozen=True)
class Ratio:
    """The mean of paired ratios over seeds and its 95% interval; one seed has none."""

    mean: float
    interval: tuple[float, float] | None


def paired(ratios: Sequence[float]) -> Ratio:
    """Return the geometric mean of ratios, one a seed, and Student's 95% interval of it."""
    logs = [math.log(ratio) for ratio in ratios]
    mean = fmean(logs)
    if len(logs) == 1:
        return Ratio(math.exp(mean), None)
    half = student(len(logs) - 1) * stdev(logs) / math.sqrt(len(logs))
    return Ratio(math.exp(mean), (math.exp(mean - half), math.exp(mean + half)))


def student(freedom: int) -> float:
    """Return quantile 0.975 of Student's t; beyond the table by Fisher's expansion."""
    if freedom <= len(STUDENT):
        return STUDENT[freedom - 1]
    z = NORMAL
    first, second = (z**3 + z) / 4, (5 * z**5 + 16 * z**3 + 3 * z) / 96
    return z + first / freedom + second / freedom**2


def comparison(
    rows: Sequence[Mapping[str, Any]], arm: str, against: str, budget: float, measure: str, at: str
) -> dict[str, Any]:
    """Return an arm's score over another's at equal cost `at`, seed by seed and in the mean."""
    ratios: dict[int, float] = {}
    beyond = False
    for row in rows:
        if (row["arm"], row["budget"]) != (arm, budget) or row[measure] is None:
            continue
        others = [r for r in rows if (r["arm"], r["seed"]) == (against, row["seed"])]
        curve = [(other[at], other[measure]) for other in others if other[measure] is not None]
        there = at_cost(curve, row[at])
        beyond |= bool(curve) and there is None
        if there is not None:
            ratios[row["seed"]] = row[measure] / there
    return _compared(arm, against, budget, measure, at, ratios, beyond)


def resource(
    rows: Sequence[Mapping[str, Any]], arm: str, against: str, budget: float, measure: str
) -> dict[str, Any]:
    """Return what an arm needs over what another does, whatever the budgets: memory, parameters."""
    ratios: dict[int, float] = {}
    for row in rows:
        if (row["arm"], row["budget"]) == (arm, budget):
            others = [r[measure] for r in rows if (r["arm"], r["seed"]) == (against, row["seed"])]
            if others:
                ratios[row["seed"]] = row[measure] / fmean(others)
    return _compared(arm, against, budget, measure, None, ratios, beyond=False)


def _compared(
    arm: str, against: str, budget: float, measure: str, at: str | None,
    ratios: Mapping[int, float], beyond: bool,
) -> dict[str, Any]:  # fmt: skip
    whole = paired(list(ratios.values())) if ratios else None
    return {
        "arm": arm, "against": against, "budget": budget, "measure": measure, "at": at,
        "ratios": {str(seed): ratio for seed, ratio in ratios.items()},
        "mean": whole.mean if whole else None,
        "interval": whole.interval if whole else None,
        "beyond": beyond,
    }  # fmt: skip


def decide(claim: Claim, study: Study, rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return a claim with its numbers, its verdict and a sentence.

    It holds where the whole interval is at most the bound, does not where the whole interval is
    above, and is undecided otherwise, also where a seed of the study has no ratio: those that are
    slow, say, must not drop out. Active parameters are the same in every seed: they need no
    interval.
    """
    against = claim.against or study.baseline
    budget = claim.budget or study.budgets_of(claim.arm)[-1]
    compares_loss = claim.measure in ("bits_per_byte", "loss")
    found = (
        comparison(rows, claim.arm, against, budget, claim.measure, claim.at)
        if compares_loss
        else resource(rows, claim.arm, against, budget, claim.measure)
    )
    absent = [seed for seed in study.seeds if str(seed) not in found["ratios"]]
    exact = claim.measure == "active_parameters"
    verdict, because = _verdict(found, claim.at_most, absent, exact=exact)
    where = f" at equal {claim.at.replace('flops', 'FLOPs')}" if compares_loss else ""
    sentence = (
        f"{claim.arm} (x{budget:g}) has at most {claim.at_most:g} times the "
        f"{SAID[claim.measure]} of {against}{where}: {verdict} ({because})"
    )
    return found | {"at_most": claim.at_most, "verdict": verdict, "sentence": sentence}


def _verdict(
    found: Mapping[str, Any], bound: float, absent: Sequence[int], *, exact: bool
) -> tuple[str, str]:
    why = f"{found['against']} was not run at that cost" if found["beyond"] else "not run"
    if found["mean"] is None:
        return "undecided", why
    seeds = len(found["ratios"])
    measured = f"{found['mean']:.3f} times over {seeds} seed{'s' * (seeds > 1)}"
    if exact:
        return ("holds" if found["mean"] <= bound else "does not hold"), measured
    if absent:
        listed = ", ".join(map(str, absent))
        return "undecided", f"{measured}; seed{'s' * (len(absent) > 1)} {listed}: {why}"
    if found["interval"] is None:
        return "undecided", f"{measured}: one seed says nothing of the spread"
    low, high = found["interval"]
    measured += f", 95% interval {low:.3f} to {high:.3f}"
    if high <= bound:
        return "holds", measured
    return ("does not hold" if low > bound else "undecided"), measured


def crossing(rows: Sequence[Mapping[str, Any]], arm: str, against: str, at: str) -> dict[str, Any]:
    """Return where the curves of two arms over their budgets cross, in the mean over `seeds`.

    Those are the seeds with which all budgets of both were run.

    `below` says for every cost at which either was run and both are known whether the arm has fewer
    bits per byte there; `costs` are where that changes, the gap between two being a straight line.
    """
    seeds = _whole_seeds(rows, (arm, against))
    rows = [row for row in rows if row["seed"] in seeds]
    one, other = mean_curve(rows, arm, at), mean_curve(rows, against, at)
    gaps = [
        (x, math.log(a / b))
        for x in sorted({x for x, _ in [*one, *other]})
        if (a := at_cost(one, x)) is not None and (b := at_cost(other, x)) is not None
    ]
    costs = [
        x0 * (x1 / x0) ** (g0 / (g0 - g1))
        for (x0, g0), (x1, g1) in pairwise(gaps)
        if (g0 < 0) != (g1 < 0)
    ]
    below = [{"cost": x, "below": gap < 0} for x, gap in gaps]
    return {
        "arm": arm, "against": against, "at": at, "below": below, "costs": costs, "seeds": seeds,
    }  # fmt: skip


def _whole_seeds(rows: Sequence[Mapping[str, Any]], arms: Sequence[str]) -> list[int]:
    """Return the seeds with which every budget that these arms were run at was run."""
    made: dict[int, set[tuple[str, float]]] = {}
    for row in rows:
        if row["arm"] in arms and row["bits_per_byte"] is not None:
            made.setdefault(row["seed"], set()).add((row["arm"], row["budget"]))
    everything = set[tuple[str, float]]().union(*made.values())
    return [seed for seed, found in made.items() if found == everything]


def mean_curve(rows: Sequence[Mapping[str, Any]], arm: str, at: str) -> list[tuple[float, float]]:
    """Return the mean cost and bits per byte of each of an arm's budgets, ascending."""
    scored = [row for row in rows if row["arm"] == arm and row["bits_per_byte"] is not None]
    return [
        (fmean(row[at] for row in group), fmean(row["bits_per_byte"] for row in group))
        for _, group in sorted(by_arm_and_budget(scored).items())
    ]


def by_arm_and_budget(
    rows: Sequence[Mapping[str, Any]],
) -> dict[tuple[str, float], list[Mapping[str, Any]]]:
    """Return the runs of each arm and budget: they differ in their seeds."""
    groups: dict[tuple[str, float], list[Mapping[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["arm"], row["budget"]), []).append(row)
    return groups


def _machine(runs: Sequence[Run]) -> dict[str, Any]:
    """Return the machine and versions of the runs; `mixed` says that they are not all the same.

    `jobs` are the numbers of runs that were made side by side.
    """
    found = [files.read_run(run.folder) for run in runs]
    made = [each for record in found for each in (record, *record.get("earlier", []))]
    kinds = {str((each["machine"], each["versions"])) for each in made}
    jobs = sorted({number for run in runs for number in jobs_of(run.folder)})
    more = {"mixed": len(kinds) > 1, "jobs": jobs}
    return found[0]["machine"] | found[0]["versions"] | more
