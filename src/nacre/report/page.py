"""The page of a report: one HTML file with its charts inside, for any screen, light or dark."""

from __future__ import annotations

import base64
import html
import io
import shlex
from collections.abc import Mapping, Sequence
from importlib import resources
from itertools import pairwise
from pathlib import Path
from string import Template
from typing import Any

from matplotlib.figure import Figure

from nacre.errors import CheckpointError
from nacre.report.charts import CHARTS, DARK, LIGHT, Theme
from nacre.report.files import RunFiles, StageView, load_run
from nacre.report.tables import count, ledger_table, size, stage_table
from nacre.train import checkpoint


def write(run: str | Path) -> Path:
    """Write `RUN/report/` anew, as a whole or not at all, and return its `index.html`.

    Beside the page stand `loss.png`, `bits-per-byte.png` and `resources.png`. Raises
    `CheckpointError` as `load_run` does, and if the folder cannot be written.
    """
    files = load_run(run)
    views = files.views()
    target = files.path / "report"
    try:
        with checkpoint.new_folder(target) as partial:
            pictures: dict[str, str] = {}
            for name, draw in CHARTS.items():
                images = {
                    (theme, wide): png(draw(files, views, theme, wide))
                    for theme in (LIGHT, DARK)
                    for wide in (True, False)
                }
                (partial / f"{name}.png").write_bytes(images[LIGHT, True])
                pictures[name] = picture(images, describe(name, files, views))
            (partial / "index.html").write_text(page(files, views, pictures), encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target / "index.html"


def png(figure: Figure) -> bytes:
    """Render a figure; nothing in the bytes depends on the time or the version of a library."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def picture(images: Mapping[tuple[Theme, bool], bytes], text: str) -> str:
    """Return a `<picture>` that holds a chart for light and dark, wide and narrow screens."""
    media = {
        (DARK, False): "(prefers-color-scheme: dark) and (max-width: 40rem)",
        (DARK, True): "(prefers-color-scheme: dark)",
        (LIGHT, False): "(max-width: 40rem)",
    }
    sources = "".join(
        f'<source media="{rule}" srcset="{_data(images[key])}">' for key, rule in media.items()
    )
    fallback = f'<img src="{_data(images[LIGHT, True])}" alt="{html.escape(text)}">'
    return f"<picture>{sources}{fallback}</picture>"


def _data(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


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


def page(files: RunFiles, views: Sequence[StageView], pictures: Mapping[str, str]) -> str:
    """Return the whole page; whatever comes from the run is escaped."""
    template = resources.files("nacre.report").joinpath("page.html").read_text(encoding="utf-8")
    run = files.run
    ledger = ledger_table(files.records)
    return Template(template).substitute(
        name=html.escape(str(run["name"])),
        summary=html.escape(summary(files, views)),
        notice=notice(files, views),
        tiles=tiles(files),
        loss=pictures["loss"],
        bits=pictures["bits-per-byte"],
        resources=pictures["resources"],
        memory=memory_note(files),
        stages=table(stage_table(files.records)),
        ledger=table(ledger, code=("parent", "fingerprint")),
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


def tiles(files: RunFiles) -> str:
    """Return the headline figures of the last finished stage."""
    if not files.records:
        return ""
    last = files.records[-1]
    figures = {
        "bits per byte, held-out": f"{last['validation']['bits_per_byte']:.3f}",
        "perplexity, held-out": f"{last['validation']['perplexity']:,.2f}",
        "blocks": str(last["depth"]),
        "parameters": count(last["total_parameters"]),
        "most active in a stage": count(max(r["active_parameters"] for r in files.records)),
        "peak memory": size(max(r["peak_memory_bytes"] for r in files.records)),
    }
    cells = "".join(
        f"<div><dt>{name}</dt><dd>{value}</dd></div>" for name, value in figures.items()
    )
    return f'<dl class="tiles">{cells}</dl>'


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


def table(rows: Sequence[Mapping[str, str]], code: Sequence[str] = ()) -> str:
    """Return a table that scrolls sideways on a narrow screen, or a line that says it is empty."""
    if not rows:
        return "<p>No stage has finished yet.</p>"
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in rows[0])
    body = "".join(
        "<tr>"
        + "".join(
            f"<td><code>{html.escape(cell)}</code></td>"
            if name in code
            else f"<td>{html.escape(cell)}</td>"
            for name, cell in row.items()
        )
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


def pairs(values: Mapping[str, Any]) -> str:
    """Return names and values as a definition list."""
    items = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in values.items()
    )
    return f'<dl class="pairs">{items}</dl>'


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
