"""The tab *Run*: a run's loss, speed, memory, stages and ledger, while it goes on or afterwards."""

from __future__ import annotations

import html
from collections.abc import Iterator, Sequence
from pathlib import Path
from statistics import fmean

from nacre.errors import CheckpointError
from nacre.folders import METRICS, STAGE, STAGES
from nacre.listing import is_held
from nacre.numbers import count, size
from nacre.play.chart import Line, draw_lines
from nacre.play.markup import details, empty, notice, waiting
from nacre.report import page
from nacre.report.charts import smooth, tick
from nacre.report.files import RunFiles, StageView, load_run
from nacre.report.formats import to_html
from nacre.report.html import pairs, tiles
from nacre.report.tables import ledger_table, stage_table
from nacre.train import verify

RECENT = 20  # steps whose speed is shown


def stamp(run: Path) -> tuple[float, ...]:
    """Return what changes whenever a run writes metrics, finishes a stage, begins or stops."""
    watched = [run / METRICS, *sorted((run / STAGES).glob(f"*/{STAGE}"))]
    written = [part for path in watched if path.exists() for part in _state(path)]
    return (float(is_held(run)), *written)


def _state(path: Path) -> tuple[float, float]:
    found = path.stat()
    return float(found.st_size), found.st_mtime


def show(run: Path) -> str:
    """Return everything that the tab shows of a run, as its files are now.

    A run without any step yet, or a damaged one, is said in words.
    """
    try:
        files = load_run(run)
    except CheckpointError as error:
        return empty("Nothing to see yet", str(error))
    views = files.views()
    live = not files.finished and is_held(run)
    none = "No stage has finished yet."
    return "".join(
        [
            _status(files, views, live),
            "" if live else page.notice(files, views),
            tiles(figures(files, views)),
            loss_chart(files, views),
            speed_chart(files, views),
            f"<h2>Stages</h2>{to_html(stage_table(files.records), empty=none)}",
            f'<p class="note">{html.escape(page.memory_note(files))}</p>',
            f"<h2>Ledger</h2><p>{html.escape(page.chain(files))}</p>",
            to_html(ledger_table(files.records), ("parent", "fingerprint"), empty=none),
            details("Plan", f"<pre tabindex='0'>{html.escape(files.plan_text.strip())}</pre>"),
            details("Versions and machine", pairs(page.flat(_facts(files)))),
        ]
    )


def _facts(files: RunFiles) -> dict[str, object]:
    known = ("seed", "versions", "machine", "fingerprints")
    return {key: files.run[key] for key in known if key in files.run}


def _status(files: RunFiles, views: Sequence[StageView], live: bool) -> str:
    state, words = (
        ("live", "going on") if live
        else ("finished", "finished") if files.finished
        else ("stopped", "stopped")
    )  # fmt: skip
    about = html.escape(page.summary(files, views))
    return f'<p class="status {state}" role="status"><b>{words}</b> {about}</p>'


def figures(files: RunFiles, views: Sequence[StageView]) -> dict[str, str]:
    """Return the headline figures: where the run is, how good, how fast, how large."""
    last = views[-1]
    steps = [line for line in files.metrics if "loss" in line]
    found = {"stage": f"{last.stage} of {files.planned}"}
    if last.depth is not None:
        found["blocks"] = str(last.depth)
    if steps:
        found["training loss, nats a token"] = f"{fmean(s['loss'] for s in steps[-RECENT:]):.3f}"
    scored = [view for view in views if len(view.held_out)]
    if scored:
        found["bits per byte, held-out"] = f"{scored[-1].held_out[-1, 2]:.4f}"
    if steps:
        speed = fmean(step["tokens_per_second"] for step in steps[-RECENT:])
        found["tokens a second"] = f"{speed:,.0f}"
        if not last.finished and speed > 0:
            planned = files.plan["stages"][last.stage - 1].get("tokens")
            if isinstance(planned, int):
                left = max(0, planned - (last.end - last.start)) / speed
                found["left of this stage"] = page.duration(left)
    if files.records:
        peak = max(record["peak_memory_bytes"] for record in files.records)
        found["peak memory"] = size(peak)
        found["parameters"] = count(files.records[-1]["total_parameters"])
    return found


def loss_chart(files: RunFiles, views: Sequence[StageView]) -> str:
    """Return training and held-out loss over all tokens, the stages as bands."""
    longest = max(len(view.training) for view in views)
    window = max(1, longest // 50)
    training, mean, held_out = [], [], []
    for view in views:
        tokens, loss = view.training.T
        training += zip(tokens.tolist(), loss.tolist(), strict=True)
        mean += zip(tokens.tolist(), smooth(loss, window).tolist(), strict=True)
        held_out += [(float(row[0]), float(row[1])) for row in view.held_out]
    return draw_lines(
        [
            Line("", training, "training", faint=True),
            Line("training", mean, "training"),
            Line("held-out", held_out, "held-out", marks=len(held_out) < 40),
        ],
        title="Loss",
        about="nats a token; each band is a stage, its depth above it",
        x_label="tokens trained on, all stages",
        y_format=lambda value: f"{value:.2f}",
        bands=_bands(views),
    )


def speed_chart(files: RunFiles, views: Sequence[StageView]) -> str:
    """Return tokens a second over all tokens."""
    points: list[tuple[float, float]] = []
    for view in views:
        lines = [line for line in files.metrics if line["stage"] == view.stage]
        steps = [line for line in lines if "tokens_per_second" in line]
        points += [(view.start + line["tokens"], line["tokens_per_second"]) for line in steps]
    if not points:
        return ""
    highest = sorted(speed for _, speed in points)[int(0.99 * (len(points) - 1))]
    return draw_lines(
        [Line("tokens/s", points, "memory")],
        title="Speed",
        about="tokens trained on a second, step by step",
        x_label="tokens trained on, all stages",
        y_range=(0.0, 1.15 * highest),
        y_format=tick_rounded,
        bands=_bands(views),
    )


def tick_rounded(number: float) -> str:
    """Shorten a speed: 9.0K."""
    return tick(round(number, -2)) if number >= 1000 else f"{number:.0f}"


def _bands(views: Sequence[StageView]) -> list[tuple[float, float, str]]:
    return [
        (
            float(view.start),
            float(view.end),
            "depth ?" if view.depth is None else f"depth {view.depth}",
        )
        for view in views
        if view.end > view.start
    ]


def check(run: Path) -> Iterator[str]:
    """Check a run on disk against its ledger; yield what to show before and after."""
    yield waiting("Reading every tensor of every stage…")
    try:
        found = verify.verify(run)
    except CheckpointError as error:
        yield notice(str(error))
        return
    wrong = [finding for finding in found if finding.wrong]
    head = (
        f"{len(found)} things were checked; {len(wrong)} are wrong."
        if wrong
        else f"All {len(found)} things that were checked are as recorded."
    )
    items = "".join(
        f'<li class="{"wrong" if finding.wrong else "right"}">{html.escape(finding.what)}'
        + (f": {html.escape(finding.wrong)}" if finding.wrong else "")
        + "</li>"
        for finding in found
    )
    kind = "notice" if wrong else "good"
    yield f'<p class="{kind}" role="status">{head}</p><ul class="checks">{items}</ul>'
