"""Score models, compare plans, and show both."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from nacre.cli.console import Json, app, emit, quiet_transformers, screen


@app.command("eval")
def evaluate(
    checkpoints: Annotated[
        list[Path],
        typer.Argument(metavar="CKPT...", help="Stages, runs, compositions, Hugging Face folders."),
    ],
    tasks: Annotated[
        list[str] | None,
        typer.Option(
            help="Names with commas, also lm-eval's; default: `lm` with --data, what is in "
            "--data-dir, else `probes`."
        ),
    ] = None,
    data: Annotated[
        Path | None, typer.Option(help="lm: texts, a folder for each domain (`en/novels`).")
    ] = None,
    data_dir: Annotated[
        Path | None,
        typer.Option(
            help="benchmarks: their original files (`anatomy_test.csv`, `dev-v1.1.json`)."
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option(help="Examples of a task, documents of a domain, questions of a subject."),
    ] = None,
    context: Annotated[int | None, typer.Option(help="lm: tokens of a window.")] = None,
    stride: Annotated[
        int | None, typer.Option(help="lm: tokens from window to window; default: half.")
    ] = None,
    protocol: Annotated[
        str | None, typer.Option(help="`paper`: score what the model writes, as the paper did.")
    ] = None,
    runs: Annotated[
        int | None, typer.Option(help="paper: how often each answer is drawn; default: 10.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(help="File of the results; default: evaluations.jsonl of the run or folder."),
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Also run what was done.")] = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Score checkpoints: texts they have not seen, what they do in their context, benchmarks.

    nacre eval runs/novels --data heldout

    nacre eval runs/novels --tasks mmlu,arc_easy --data-dir benchmarks

    nacre eval runs/novels/stages/02 both --tasks copy,khop-1
    """
    from nacre import tables
    from nacre.evaluate.run import evaluate as run
    from nacre.terminal import Display
    from nacre.train.observer import Observer

    quiet_transformers()
    with nullcontext(Observer()) if quiet else Display(screen) as display:
        records = run(
            checkpoints, tasks or (),
            data=data, data_dir=data_dir, limit=limit, context=context, stride=stride,
            protocol=protocol, runs=runs, out=out, again=again, observer=display,
        )  # fmt: skip
    if as_json:
        emit({"results": records})
    else:
        Console().print(tables.evaluations(records))


@app.command()
def study(
    study: Annotated[Path, typer.Argument(help="A study's file, or the name of a recipe.")],
    out: Annotated[Path | None, typer.Option(help="Its folder; default: runs/NAME.")] = None,
    jobs: Annotated[int, typer.Option(help="Runs side by side; they share the threads.")] = 1,
    run: Annotated[
        bool, typer.Option(help="Make the runs that are missing, or read those there are.")
    ] = True,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the study."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Compare plans fairly: the same text and seeds, at equal tokens, FLOPs and wall-clock.

    nacre study operators --set seeds=[0]

    nacre study my-study.yaml --jobs 2

    nacre study my-study.yaml --no-run --json
    """
    from nacre import study as studies
    from nacre import tables
    from nacre.terminal import Display
    from nacre.train.observer import Observer

    quiet_transformers()
    chosen = studies.load(study, settings or [])
    out = out or Path("runs") / chosen.name
    with nullcontext(Observer()) if quiet else Display(screen) as display:
        failed: studies.StudyError | None = None
        if run:
            try:
                studies.run(chosen, out, jobs=jobs, observer=display)
            except studies.StudyError as error:
                failed = error  # said at the end: what the others show is there
            studies.evaluate(chosen, out, observer=display)
        if failed is not None and not studies.finished_runs(chosen, out):
            raise failed
        found = studies.read_results(chosen, out)
    page = studies.write(found, out)
    if as_json:
        emit({"study": str(out), "page": str(page), **found})
    else:
        shown = ("arm", "budget", "seeds", "tokens", "seconds", "peak memory", "bits per byte")
        rows = [[row[name] for name in shown] for row in studies.arm_rows(found["runs"])]
        screen.print(tables.named_rows([shown, *rows]))
        for claim in found["claims"]:
            screen.print(claim["sentence"], highlight=False, markup=False, soft_wrap=True)
        screen.print(f"page: {page}", highlight=False, soft_wrap=True)
    if failed is not None:
        raise failed


@app.command()
def report(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="A run, several, or a composition.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(help="The folder to write; default: report in RUN, of several runs here."),
    ] = None,
    as_json: Json = False,
) -> None:
    """Write a report (again): one self-contained page; beside it plots and tables for papers.

    nacre report runs/novels

    nacre report runs/novels runs/whole --out compared

    nacre report both
    """
    from nacre import report as reports

    page = reports.write(*runs, out=out)
    if as_json:
        named = {"run": str(runs[0])} if len(runs) == 1 else {"runs": list(map(str, runs))}
        emit({**named, "report": str(page)})
    else:
        print(page)
