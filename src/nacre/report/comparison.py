"""The page of several runs: their scores and their training, a line for each run."""

from __future__ import annotations

import html
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

from nacre.errors import CheckpointError, ConfigError, Problem
from nacre.evaluate import results
from nacre.report import depth, formats, scores, section
from nacre.report.canvas import MARKERS
from nacre.report.depth_charts import draw_runs
from nacre.report.files import RunFiles, load_run
from nacre.report.html import document, picture, render, write_folder
from nacre.report.scores import Scored
from nacre.report.tables import number, short_name, shortened


def write(runs: Sequence[Path], out: Path) -> Path:
    """Write a page of several runs to the folder `out`; return its `index.html`.

    It shows what at least two of them were scored on alike. Raises ConfigError for more runs than
    can be told apart, CheckpointError as `load_run` does, for damaged records, and for a run that
    has no scores or shares none.
    """
    if len(runs) > len(MARKERS):
        fix = f"name {len(MARKERS)} or fewer"
        raise ConfigError(Problem("runs", f"{len(runs)} are too many for one chart", fix))
    folders = [str(run.absolute()) for run in runs]
    files = {
        short_name(folder, folders): load_run(run)
        for folder, run in zip(folders, runs, strict=True)
    }
    models = {name: depth.stages(name, each) for name, each in files.items()}
    found = {
        name: scores.load([each.path / results.FILE], models[name]) for name, each in files.items()
    }
    for name, each in files.items():
        if not found[name]:
            raise CheckpointError(_without_scores(each.path))
    alike = scores.shared([scored for own in found.values() for scored in own])
    for name, each in files.items():
        if not any(scored.model.name == name for scored in alike):
            command = f"nacre eval {' '.join(map(str, runs))} --data DIR"
            raise CheckpointError(
                f"{each.path}: shares no score with the other runs (the same task, version and "
                f"settings); `{command}` scores them alike"
            )
    part = section.of_runs(alike, models)
    views = {name: each.views() for name, each in files.items()}
    loss = render("bits-per-byte", partial(draw_runs, views), _told(files, alike))
    text = document(
        "runs.html",
        f"{', '.join(files)}: nacre runs",
        name=html.escape(", ".join(files)),
        summary=f"{len(files)} runs, scored alike on "
        f"{len({scored.record['task'] for scored in alike})} tasks",
        scores=part.html,
        loss=picture(loss),
        held_out=_held_out(files),
        runs=formats.to_html(_rows(files)),
        nacre=html.escape(str(next(iter(files.values())).run["versions"].get("nacre", ""))),
    )
    tables = formats.files("runs", _rows(files))
    return write_folder(out, text, [*part.pictures, loss], {**tables, **part.files})


def _without_scores(folder: Path) -> str:
    """Say that a folder has no scores that count, and how to make some."""
    command = f"`nacre eval {folder} --data DIR`"
    if (folder / results.FILE).is_file():
        return (
            f"{folder}: {results.FILE} has no score of what is there now; {command} makes new ones"
        )
    return f"{folder}: holds no scores; {command} makes them"


def _held_out(files: Mapping[str, RunFiles]) -> str:
    corpora = {str(each.run["fingerprints"].get("corpora")) for each in files.values()}
    same = "Measured while training, on held-out documents of the training text"
    if len(corpora) == 1:
        return f"{same}, which is the same for all of these runs."
    return f"{same}: these runs were trained on different texts, so the lines cannot be compared."


def _told(files: Mapping[str, RunFiles], alike: Sequence[Scored]) -> str:
    ends = [
        f"{name} {each.records[-1]['validation']['bits_per_byte']:.3f} at depth "
        f"{each.records[-1]['depth']}"
        for name, each in files.items()
    ]
    return f"Held-out bits per byte over all tokens; at the end: {', '.join(ends)}."


def _rows(files: Mapping[str, RunFiles]) -> list[dict[str, str]]:
    return [
        {
            "run": name,
            "stages": number(len(each.records)),
            "depth": number(each.records[-1]["depth"]),
            "parameters": shortened(each.records[-1]["total_parameters"]),
            "active": shortened(max(record["active_parameters"] for record in each.records)),
            "tokens": shortened(sum(record["tokens"] for record in each.records)),
            "bits/byte": number(each.records[-1]["validation"]["bits_per_byte"], ".4f"),
        }
        for name, each in files.items()
    ]
