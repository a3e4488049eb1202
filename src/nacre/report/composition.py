"""The page of a composition: it and its experts side by side, and who lost what."""

from __future__ import annotations

import html
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from nacre import composition
from nacre.composition import card
from nacre.errors import CheckpointError
from nacre.evaluate import results
from nacre.report import formats, scores, section
from nacre.report.formats import Cell
from nacre.report.grid_charts import draw_differences
from nacre.report.html import Picture, document, figure, render, write_folder
from nacre.report.scores import Model
from nacre.report.section import Section
from nacre.report.tables import number


def write(folder: Path, out: Path | None = None) -> Path:
    """Write a composition's report to `out`, or `COMPOSITION/report/`; return its `index.html`.

    It shows what the composition and an expert were scored on alike, and what `nacre compose
    --report` found. Raises CheckpointError and FingerprintError for experts that are gone or
    changed, for damaged records, and where there is neither.
    """
    record = composition.read_record(folder)
    places = [folder / expert["path"] for expert in record["experts"]]
    fingerprint = results.fingerprint(folder)  # finds experts that are gone or changed
    models = [
        Model(expert["name"], results.fingerprint(place), expert["depth"])
        for expert, place in zip(record["experts"], places, strict=True)
    ]
    whole = Model(_name(folder, models), fingerprint, None)
    files = [results.home(place) for place in (folder, *places)]
    found = scores.load(files, [*models, whole])
    alike = scores.shared(found, of=whole.name)
    if not alike and not record.get("report"):
        where = " ".join(map(str, (folder, *places)))
        raise CheckpointError(
            f"{folder}: it and its experts share no score (the same task, version and settings); "
            f"`nacre eval {where} --data DIR --context {record['context']}` makes them"
        )
    has = {scored.model for scored in alike}
    part = section.of_composition(alike, [model for model in (*models, whole) if model in has])
    lost = _lost(record.get("report"))
    text = document(
        "composition.html",
        f"{whole.name}: a nacre composition",
        name=html.escape(folder.absolute().name),
        summary=html.escape(" · ".join(composition.summary(record))),
        scores=part.html,
        lost=lost.html,
        experts=formats.to_html(_experts(record)),
    )
    tables = {**formats.files("experts", _experts(record)), **lost.files, **part.files}
    pictures = [*part.pictures, *lost.pictures]
    return write_folder(out or folder / "report", text, pictures, tables)


def _name(folder: Path, experts: list[Model]) -> str:
    """Return what the composition is called beside its experts."""
    name = folder.absolute().name
    return name if name not in {expert.name for expert in experts} else f"{name} (composition)"


def _lost(report: Mapping[str, Any] | None) -> Section:
    """Return what `nacre compose --report` found: differences, the table, a sentence a row."""
    if not report:
        return Section()
    rows = _differences(report)
    said = "; ".join(card.verdicts(report))
    drawn: Picture = render("differences", partial(draw_differences, report), f"{said}.")
    items = "".join(f"<li>{html.escape(line)}</li>" for line in card.verdicts(report))
    context, stride = report["settings"]["context"], report["settings"]["stride"]
    note = (
        f"Bits per byte in windows of {context:,} tokens that advance by {stride:,}; the "
        "difference is to the best expert of the row, its interval a paired bootstrap over "
        "documents."
    )
    text = f"<h2>Who lost what</h2>\n{figure(drawn)}\n{formats.to_html(rows)}\n<ul>{items}</ul>"
    return Section(
        f'{text}\n<p class="note">{note}</p>', [drawn], formats.files("differences", rows)
    )


def _differences(report: Mapping[str, Any]) -> list[dict[str, str]]:
    """Return the table of the composition's card, its numbers with every digit."""
    heads, *rows = card.report_cells(report)
    found: list[dict[str, str]] = []
    for cells, row in zip(rows, report["rows"], strict=True):
        texts, *numbers, difference, interval = cells
        values = (row["documents"], row["composition"], *row["experts"].values())
        exact = [
            texts,
            *(Cell(text, value) for text, value in zip(numbers, values, strict=True)),
            Cell(difference, row["difference"], row["interval"]),
            interval,
        ]
        found.append(dict(zip(heads, exact, strict=True)))
    return found


def _experts(record: Mapping[str, Any]) -> list[dict[str, str]]:
    return [
        {
            "expert": expert["name"],
            "family": expert["family"],
            "blocks": number(expert["depth"]),
            "width": number(expert["width"]),
            "parameters": number(expert["parameters"], ","),
        }
        for expert in record["experts"]
    ]
