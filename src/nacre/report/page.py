"""The page of one run: an HTML file with its charts inside, for any screen, light or dark."""

from __future__ import annotations

import html
import shlex
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

from nacre.numbers import count, size
from nacre.report import formats, section
from nacre.report.charts import CHARTS
from nacre.report.files import RunFiles, StageView, load_run
from nacre.report.formats import to_html
from nacre.report.html import document, pairs, picture, render, tiles, write_folder
from nacre.report.tables import ledger_table, stage_table


def write(run: str | Path, out: Path | None = None) -> Path:
    """Write a run's report to `out`, or `RUN/report/`, and return its `index.html`.

    Beside the page stand the charts `loss`, `bits-per-byte` and `resources` and those of the scores
    that `nacre eval` kept, as PNG and SVG, and the tables `stages`, `ledger` and `scores`, as CSV
    and LaTeX. Raises CheckpointError as `load_run` does, for damaged records, and if the folder
    cannot be written.
    """
    files = load_run(run)
    scores = section.of_run(files)
    views = files.views()
    drawn = {
        name: render(name, partial(draw, files, views), describe(name, files, views))
        for name, draw in CHARTS.items()
    }
    text = page(files, views, {name: picture(chart) for name, chart in drawn.items()}, scores.html)
    pictures = [*drawn.values(), *scores.pictures]
    tables = formats.files("stages", stage_table(files.records))
    tables |= formats.files("ledger", ledger_table(files.records))
    return write_folder(out or files.path / "report", text, pictures, {**tables, **scores.files})


def describe(name: str, files: RunFiles, views: Sequence[StageView]) -> str:
    """Say in words what a chart shows, for those who do not see it."""
    if name == "loss":
        return (
            f"Training and held-out loss over {views[-1].end:,} tokens, {len(views)} stages marked."
        )
    if name == "bits-per-byte":
        values = [f"{v.held_out[-1, 2]:.3f}" for v in views if len(v.held_out)]
        return f"Held-out bits per byte, stage by stage: {', '.join(values) or 'none yet'}."
    active = [count(record["active_parameters"]) for record in files.records]
    total = [count(record["total_parameters"]) for record in files.records]
    memory = [size(record["peak_memory_bytes"]) for record in files.records]
    if not active:
        return "Parameters and memory by stage: no stage has finished yet."
    return (
        f"By stage: active parameters {', '.join(active)}; total parameters {', '.join(total)}; "
        f"peak memory {', '.join(memory)}."
    )


def page(
    files: RunFiles, views: Sequence[StageView], pictures: Mapping[str, str], scores: str = ""
) -> str:
    """Return the whole page; whatever comes from the run is escaped."""
    run, none = files.run, "No stage has finished yet."
    ledger = ledger_table(files.records)
    return document(
        "run.html",
        f"{run['name']}: a nacre run",
        name=html.escape(str(run["name"])),
        summary=html.escape(summary(files, views)),
        notice=notice(files, views),
        tiles=tiles(figures(files)) if files.records else "",
        loss=pictures["loss"],
        bits=pictures["bits-per-byte"],
        resources=pictures["resources"],
        memory=memory_note(files),
        scores=scores,
        stages=to_html(stage_table(files.records), empty=none),
        ledger=to_html(ledger, code=("parent", "fingerprint"), empty=none),
        chain=html.escape(chain(files)),
        plan=html.escape(files.plan_text.strip()),
        versions=pairs(run["versions"]),
        machine=pairs({k: v for k, v in run["machine"].items() if v is not None}),
        identity=pairs({"seed": run["seed"], "plan": run["plan"]} | flat(run["fingerprints"])),
        nacre=html.escape(str(run["versions"].get("nacre", ""))),
    )


def summary(files: RunFiles, views: Sequence[StageView]) -> str:
    """Return one line: how far the run is and how much it read."""
    stages = f"{files.planned} stage{'s' if files.planned != 1 else ''}"
    if not files.finished:
        stages = f"{len(files.records)} of {stages} finished"
    seconds = sum(record["seconds"] for record in files.records)
    parts = [stages, f"{views[-1].end:,} tokens"]
    if files.records:
        parts.append(f"{duration(seconds)} of training")
    return " · ".join([*parts, *_places(files)])


def _places(files: RunFiles) -> list[str]:
    machine = files.run["machine"]
    place = machine.get("accelerator") or machine.get("processor")
    return [f"on {place}"] if place else []


def notice(files: RunFiles, views: Sequence[StageView]) -> str:
    """Return a paragraph that says what an unfinished run still lacks, or nothing."""
    if files.finished:
        return ""
    last = views[-1]
    text = f"This run is not finished: {len(files.records)} of {files.planned} stages done."
    if not last.finished:
        done, planned = last.end - last.start, files.plan["stages"][last.stage - 1]["tokens"]
        text += f" Stage {last.stage} has read {done:,} of its {planned:,} tokens."
    command = f"nacre grow --resume --out {shlex.quote(str(files.path))}"
    return (
        f'<p class="notice">{html.escape(text)} Continue it with '
        f"<code>{html.escape(command)}</code>.</p>"
    )


def figures(files: RunFiles) -> dict[str, str]:
    """Return the headline figures of the last finished stage."""
    last = files.records[-1]
    return {
        "bits per byte, held-out": f"{last['validation']['bits_per_byte']:.3f}",
        "perplexity, held-out": f"{last['validation']['perplexity']:,.2f}",
        "blocks": str(last["depth"]),
        "parameters": count(last["total_parameters"]),
        "most active in a stage": count(max(r["active_parameters"] for r in files.records)),
        "peak memory": size(max(r["peak_memory_bytes"] for r in files.records)),
    }


def memory_note(files: RunFiles) -> str:
    """Say which memory was measured."""
    if files.run["machine"].get("accelerator"):
        return "Peak memory is what was allocated on the device."
    return "Peak memory is the resident memory of the whole process, Python and libraries included."


def chain(files: RunFiles) -> str:
    """Say whether the ledgers of the stages fit together; the files are not hashed again."""
    records = files.records
    if not records:
        return "No stage has finished, so there is no ledger yet."
    if len(records) == 1:
        return "One stage has finished; there is no stage below to compare it with."
    for below, record in pairwise(records):
        known = below["frozen"] | below["weights"]
        changed = [name for name, value in record["frozen"].items() if known.get(name) != value]
        if changed or record["parent"] != below["fingerprint"]:
            what = "the parent differs"
            if changed:
                what = f"{len(changed)} of {len(record['frozen'])} frozen tensors differ"
            return f"The ledgers do not fit together: at stage {record['stage']} {what}."
    return (
        "Every frozen tensor has the hash that the stage below recorded, and every stage names the "
        "one below as its parent. This compares the ledgers; the weights are not hashed again."
    )


def flat(values: Mapping[str, Any], before: str = "") -> dict[str, str]:
    """Return nested mappings as one, with their keys joined by spaces."""
    result: dict[str, str] = {}
    for name, value in values.items():
        if isinstance(value, Mapping):
            result |= flat(value, f"{before}{name} ")
        elif value is not None:
            result[f"{before}{name}"] = str(value)
    return result


def duration(seconds: float) -> str:
    """Write seconds the way people say them."""
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"
