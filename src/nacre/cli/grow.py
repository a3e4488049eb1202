"""Grow a model, and check what a run holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from nacre.cli.console import (
    Json,
    Settings,
    Sources,
    app,
    brief,
    emit,
    is_main,
    quiet_transformers,
    screen,
)
from nacre.errors import CheckpointError, ConfigError, Problem
from nacre.folders import PLAN


@app.command()
def grow(
    plan: Annotated[
        str | None, typer.Argument(help="A plan file or recipe; default: the recipe `small`.")
    ] = None,
    data: Sources = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/NAME.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in --out, or begin it.")
    ] = False,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace the run in --out.")
    ] = False,
    start_from: Annotated[
        str | None, typer.Option("--from", help="A checkpoint to grow instead of a new model.")
    ] = None,
    tokenizer: Annotated[
        str | None, typer.Option(help="An existing tokenizer: a folder, or hf:NAME.")
    ] = None,
    font: Annotated[Path | None, typer.Option(help="Draw glyphs with this TTF or OTF.")] = None,
    errors: Annotated[
        str | None, typer.Option(help="Text that is not UTF-8: `strict` refuses, `replace`.")
    ] = None,
    settings: Settings = None,
    track: Annotated[
        list[str] | None,
        typer.Option(help="Tracker known to Accelerate, or none; default: tensorboard if there."),
    ] = None,
    timeout: Annotated[
        float, typer.Option(min=1, help="Seconds that one of several processes waits for another.")
    ] = 600,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Grow a model: the main job.

    nacre grow                                 a small model on text that Python carries

    nacre grow --data novels/ --out runs/novels

    nacre grow my-plan.yaml --set model.width=384

    torchrun --nproc-per-node 2 -m nacre grow my-plan.yaml
    """
    from datetime import timedelta

    from nacre.growth import plan as plans
    from nacre.train.observer import Observer

    chosen: plans.Plan | None = None
    given = plan_settings(
        data=data, start_from=start_from, tokenizer=tokenizer, font=font, errors=errors,
        settings=settings,
    )  # fmt: skip
    if plan is not None or given or not resume:
        begun = out / PLAN if resume and out is not None else None
        usual = str(begun) if begun is not None and begun.exists() else "small"
        chosen = plans.load(plan or usual, given)
        for warning in plans.warnings(chosen):
            screen.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if out is None:
        if chosen is None:
            raise ConfigError(Problem("--resume", "which run?", "name its folder with --out"))
        out = Path("runs") / chosen.name
    trackers = default_trackers() if track is None else tuple(t for t in track if t != "none")

    def work(observer: Observer) -> list[dict[str, Any]]:
        from nacre.train.grow import grow as run  # torch: a mistake in the plan is said without it

        quiet_transformers()
        return run(
            chosen, out, resume=resume, overwrite=overwrite, trackers=trackers,
            timeout=timedelta(seconds=timeout), observer=observer,
        )  # fmt: skip

    if not is_main():
        work(Observer())
        return
    if quiet:
        records = work(Observer())
    else:
        from nacre.terminal import Display

        try:
            with Display(screen) as display:
                records = work(display)
        except KeyboardInterrupt:
            if (out / PLAN).exists():
                hint = f"interrupted; continue with: nacre grow --resume --out {out}"
                screen.print(hint, highlight=False, markup=False, soft_wrap=True)
            raise
    from nacre import report, tables

    page = report.write(out)
    if as_json:
        emit({"run": str(out), "report": str(page), "stages": [brief(r) for r in records]})
    elif not quiet:
        screen.print(tables.stages(records))
        screen.print(f"report: {page}", highlight=False, soft_wrap=True)
        screen.print(
            f'try:    nacre generate {out} "Once" --depths', highlight=False, soft_wrap=True
        )


def plan_settings(**options: Any) -> list[str]:
    """Return options of `grow`, by name, as settings of its plan."""
    fields = {
        "data": "data.sources", "start_from": "from", "tokenizer": "tokenizer.path",
        "font": "substrate.font", "errors": "data.errors",
    }  # fmt: skip
    given = [
        f"{field}={json.dumps(options[name], ensure_ascii=False, default=str)}"
        for name, field in fields.items()
        if options[name] is not None
    ]
    return [*given, *(options["settings"] or ())]


def default_trackers() -> tuple[str, ...]:
    """Return tensorboard if it is installed."""
    from importlib.util import find_spec

    return ("tensorboard",) if find_spec("tensorboard") else ()


@app.command()
def verify(
    run: Annotated[Path, typer.Argument(help="A run's folder.")], as_json: Json = False
) -> None:
    """Read everything that a run holds and check it: tensors, lineage, tokens, saved states."""
    from dataclasses import asdict

    from nacre.terminal import Display
    from nacre.train.verify import verify as check

    quiet_transformers()
    with Display(screen) as display:
        found = check(run, display)
    wrong = [finding for finding in found if finding.wrong]
    if as_json:
        emit({"run": str(run), "whole": not wrong, "checked": [asdict(each) for each in found]})
    else:
        for finding in found:
            print(f"{finding.what}: {finding.wrong or 'whole'}")
    if wrong:
        raise CheckpointError(f"{run}: {len(wrong)} of {len(found)} parts are damaged")
