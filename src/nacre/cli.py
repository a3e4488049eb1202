"""The `nacre` command. Commands only: each reads its options, calls the library, prints.

People read stderr; with `--json` a command prints one JSON object on stdout. Exit code 0 only on
success, 2 for a user's mistake (one clear message, no traceback), 3 where a signal stopped a growth
whose state was saved.
"""

from __future__ import annotations

import errno
import json
import os
import sys
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console

from nacre.errors import CheckpointError, ConfigError, NacreError, Problem

app = typer.Typer(
    name="nacre",
    help="Grow language models layer by layer on a frozen substrate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
substrate_app = typer.Typer(no_args_is_help=True, help="Build and look at frozen substrates.")
tokenizer_app = typer.Typer(no_args_is_help=True, help="Build lossless Unicode tokenizers.")
app.add_typer(substrate_app, name="substrate")
app.add_typer(tokenizer_app, name="tokenizer")

screen = Console(stderr=True)

DISK_ERRORS = (
    errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOSPC, errno.EDQUOT, errno.EFBIG,
    errno.ENOTDIR, errno.EISDIR, errno.ENAMETOOLONG,
)  # fmt: skip
"""What a folder that cannot be written, or a full disk, says."""

PlanArgument = Annotated[str, typer.Argument(help="A plan file, or the name of a recipe.")]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Change a field of the plan.")
]
Sources = Annotated[
    list[str] | None,
    typer.Option("--data", help="File, folder, glob, hf:NAME or `default`; repeatable."),
]
ErrorPolicy = Annotated[
    str, typer.Option("--errors", help="Text that is not UTF-8: `strict` refuses, `replace`.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout.")]


def main(arguments: list[str] | None = None) -> None:
    """Run the command line; what a user can mend becomes one message and exit code 2.

    Idle OpenMP threads wait instead of spinning, unless OMP_WAIT_POLICY says otherwise: a spinning
    thread that shares its core with another program holds up every product of two threads.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    try:
        app(args=arguments, prog_name="nacre")
    except NacreError as error:
        fail(str(error), getattr(error, "EXIT_CODE", 2))
    except OSError as error:
        if error.errno not in DISK_ERRORS:
            raise
        fail(f"{error.filename or 'the disk'}: {error.strerror}")


def fail(message: str, code: int = 2) -> NoReturn:
    """Print an error and exit with a code."""
    screen.print("[bold red]error:[/]" if code == 2 else "[yellow]stopped:[/]", end=" ")
    screen.print(message, highlight=False, markup=False, soft_wrap=True)
    sys.exit(code)


def emit(data: Any) -> None:
    """Print JSON on stdout."""
    print(json.dumps(data, indent=2, ensure_ascii=False))


def quiet_transformers() -> None:
    """Keep transformers' own progress bars and advice off the screen."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()


@app.command()
def grow(
    plan: Annotated[
        str | None, typer.Argument(help="A plan file or recipe; default: the recipe `small`.")
    ] = None,
    data: Sources = None,
    out: Annotated[Path | None, typer.Option(help="The run's folder; default: runs/NAME.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
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
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Grow a model: the main job.

    nacre grow                                 a small model on text that Python carries

    nacre grow --data novels/ --out runs/novels

    nacre grow my-plan.yaml --set model.width=384
    """
    from nacre import report, tables
    from nacre.growth import plan as plans
    from nacre.train.grow import grow as run
    from nacre.train.observer import Observer

    quiet_transformers()
    chosen: plans.Plan | None = None
    options = {
        "data.sources": data, "from": start_from, "tokenizer.path": tokenizer,
        "substrate.font": str(font) if font else None, "data.errors": errors,
    }  # fmt: skip
    given = [
        f"{key}={json.dumps(value, ensure_ascii=False)}"
        for key, value in options.items()
        if value is not None
    ]
    given += settings or []
    if plan is not None or given or not resume:
        chosen = plans.load(plan or "small", given)
        for warning in plans.warnings(chosen):
            screen.print(f"[yellow]warning:[/] {warning}", highlight=False)
    if out is None:
        if chosen is None:
            raise ConfigError(Problem("--resume", "which run?", "name its folder with --out"))
        out = Path("runs") / chosen.name
    trackers = default_trackers() if track is None else tuple(t for t in track if t != "none")

    def work(observer: Observer) -> list[dict[str, Any]]:
        return run(
            chosen, out, resume=resume, overwrite=overwrite, trackers=trackers, observer=observer
        )

    if quiet:
        records = work(Observer())
    else:
        from nacre.terminal import Display

        try:
            with Display(screen) as display:
                records = work(display)
        except KeyboardInterrupt:
            if (out / "plan.yaml").exists():
                hint = f"interrupted; continue with: nacre grow --resume --out {out}"
                screen.print(hint, highlight=False, markup=False, soft_wrap=True)
            raise
    page = report.write(out)
    if as_json:
        emit({"run": str(out), "report": str(page), "stages": [brief(r) for r in records]})
    elif not quiet:
        screen.print(tables.stages(records))
        screen.print(f"report: {page}", highlight=False, soft_wrap=True)
        screen.print(
            f'try:    nacre generate {out} "Once" --depths', highlight=False, soft_wrap=True
        )


def default_trackers() -> tuple[str, ...]:
    """Return tensorboard if it is installed."""
    from importlib.util import find_spec

    return ("tensorboard",) if find_spec("tensorboard") else ()


def brief(record: dict[str, Any]) -> dict[str, Any]:
    """Return a stage record without its long lists of hashes."""
    return {k: v for k, v in record.items() if k not in ("frozen", "weights", "trainable")}


@app.command()
def plan(plan: PlanArgument = "small", settings: Settings = None, as_json: Json = False) -> None:
    """Say what a plan will cost before it runs, per stage."""
    from dataclasses import asdict

    from nacre import tables
    from nacre.growth import budget
    from nacre.growth import plan as plans
    from nacre.train import checkpoint

    chosen = plans.load(plan, settings or [])
    for warning in plans.warnings(chosen):
        screen.print(f"[yellow]warning:[/] {warning}", highlight=False)
    base = (
        checkpoint.load_config(checkpoint.newest(chosen.start_from)) if chosen.start_from else None
    )
    costs = budget.estimate(chosen, base=base)
    if as_json:
        stages = [asdict(cost) | {"flops": cost.flops} for cost in costs]
        emit({"name": chosen.name, "fingerprint": chosen.fingerprint(), "stages": stages})
        return
    out = Console()
    out.print(tables.costs(costs))
    total = sum(cost.flops for cost in costs)
    disk = tables.size(budget.disk_needed(costs))
    out.print(f"{total:.2e} FLOPs in all, about {disk} of disk at most.", highlight=False)
    out.print(f"One block has {costs[0].block_parameters:,} parameters.", highlight=False)
    if chosen.model.family == "gpt_neox":
        note = "The papers also count one LM-head bias a token; the stock class has none."
        out.print(note, highlight=False)


@app.command()
def generate(
    checkpoint: Annotated[
        Path, typer.Argument(help="A stage, any Hugging Face folder, a run, or a composition.")
    ],
    prompt: Annotated[str, typer.Argument(help="The text to continue.")] = "",
    depths: Annotated[
        bool, typer.Option("--depths", help="Continue with every stage of the run, side by side.")
    ] = False,
    weights_trace: Annotated[
        bool,
        typer.Option(
            "--weights-trace",
            help="Of a composition: who carried each token, in colours, or JSON in a pipe.",
        ),
    ] = False,
    max_new_tokens: int = 100,
    temperature: Annotated[float, typer.Option(help="0 takes the likeliest token.")] = 0.8,
    top_k: Annotated[int, typer.Option(help="0 keeps every token.")] = 50,
    top_p: float = 0.95,
    repetition_penalty: float = 1.0,
    seed: int = 0,
    as_json: Json = False,
) -> None:
    """Continue a text, as it is made, or at every depth side by side."""
    from nacre import generation as texts
    from nacre import tables

    quiet_transformers()
    sampling = texts.Sampling(max_new_tokens, temperature, top_k, top_p, repetition_penalty, seed)
    if depths and weights_trace:
        problem = Problem("--weights-trace", "does not go with --depths", "leave one of them out")
        raise ConfigError(problem)
    if weights_trace:
        traced = texts.trace(checkpoint, prompt, sampling)
        console = Console()
        if as_json or not console.is_terminal:
            emit({"prompt": prompt, "text": "".join(t["text"] for t in traced), "trace": traced})
        else:
            console.print(texts.painted(prompt, traced), soft_wrap=True)
        return
    if depths:
        continued = list(texts.generate_at_depths(checkpoint, prompt, sampling))
        if as_json:
            stages = [{**brief(record), "text": text} for record, text in continued]
            emit({"prompt": prompt, "stages": stages})
        else:
            Console().print(tables.side_by_side(prompt, continued))
        return
    pieces = texts.generate(checkpoint, prompt, sampling)
    if as_json:
        emit({"prompt": prompt, "text": "".join(pieces)})
        return
    sys.stdout.write(prompt)
    for piece in pieces:
        sys.stdout.write(piece)
        sys.stdout.flush()
    sys.stdout.write("\n")


@app.command()
def compose(
    experts: Annotated[
        list[str], typer.Argument(metavar="EXPERT...", help="Stages, runs, Hugging Face folders.")
    ],
    mix: Annotated[str | None, typer.Option(help="The rule; default: fixed-share.")] = None,
    out: Annotated[Path | None, typer.Option(help="The folder to write.")] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="An option of the rule; repeatable."),
    ] = None,
    names: Annotated[
        list[str] | None, typer.Option("--name", help="The experts' names, in order; repeatable.")
    ] = None,
    bundle: Annotated[
        bool, typer.Option("--bundle", help="Hold weights and code: loads without nacre.")
    ] = False,
    add: Annotated[
        str | None, typer.Option(help="An expert to add to the composition that is named.")
    ] = None,
    remove: Annotated[
        str | None, typer.Option(help="The name of an expert to remove from the composition.")
    ] = None,
    tune: Annotated[
        str | None,
        typer.Option(metavar="heads", help="Train the experts' heads together, on --data."),
    ] = None,
    data: Annotated[
        list[str] | None,
        typer.Option(help="Text of all kinds for --mix gate, adapter or --tune; repeatable."),
    ] = None,
    tokens: Annotated[str | None, typer.Option(help="How long to train; default: 200k.")] = None,
    lr: Annotated[float | None, typer.Option(help="Of that training.")] = None,
    report: Annotated[
        Path | None,
        typer.Option(metavar="EVALDIR", help="Say who lost what on the texts of this folder."),
    ] = None,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress.")] = False,
    as_json: Json = False,
) -> None:
    """Make experts one model by mixing their outputs; most rules need no training.

    nacre compose runs/en runs/ru --out both

    nacre compose runs/en runs/ru --mix gate --data texts/ --out gated

    nacre compose --add runs/zh both

    nacre compose --remove ru both

    nacre compose --report heldout both
    """
    from nacre import composition, config, tables
    from nacre.composition import card
    from nacre.evaluate import experts as comparison
    from nacre.evaluate import language
    from nacre.models.rules import Rule
    from nacre.terminal import Display
    from nacre.train.observer import Observer

    quiet_transformers()
    here = out is None and len(experts) == 1
    action = (
        "add" if add is not None
        else "remove" if remove is not None
        else "tune" if tune is not None and here
        else "report" if report is not None and here
        else "make"
    )  # fmt: skip
    check_compose(
        action,
        experts,
        {
            "--mix": mix, "--out": out, "--set": settings, "--bundle": bundle or None,
            "--name": names, "--remove": remove, "--tune": tune, "--data": data,
            "--tokens": tokens, "--lr": lr,
        },
    )  # fmt: skip
    given = {"sources": data, "tokens": tokens, "lr": lr}
    chosen = {key: value for key, value in given.items() if value is not None}
    tuning = config.validate(composition.Tuning, chosen, where="training") if data else None
    documents = None if report is None else language.read_documents(report)
    folder = str(out or experts[0])
    with nullcontext(Observer()) if quiet else Display(screen) as display:
        if action == "add":
            record = composition.add(str(add), folder, names[0] if names else None)
        elif action == "remove":
            record = composition.remove(str(remove), folder)
        elif action == "tune":
            record = composition.tune(folder, tuning, display)
        elif action == "make":
            record = composition.make(
                experts, folder, mix or Rule().name, config.override({}, settings or []),
                names=names, bundle=bundle,
                tuning=tuning, tune_heads=tune is not None, observer=display,
            )  # fmt: skip
        else:
            record = composition.read_record(folder)
        if documents is not None:
            try:
                found = comparison.compare(folder, documents, display)
            except NacreError as error:
                if action == "report":
                    raise
                again = f"nacre compose --report {report} {folder}"
                raise CheckpointError(
                    f"{error}; {folder} is written, `{again}` tries again"
                ) from None
            record = comparison.write_report(folder, found)
    if as_json:
        emit({"composition": folder, **record})
    if as_json or quiet:
        return
    for line in composition.summary(record):
        screen.print(line, highlight=False, markup=False, soft_wrap=True)
    if documents is not None:
        screen.print(tables.named_rows(card.report_cells(record["report"])))
        for line in card.verdicts(record["report"]):
            screen.print(line, highlight=False, markup=False, soft_wrap=True)
    trace = "" if record["mix"]["name"] == "adapter" else " --weights-trace"
    hint = f'try:    nacre generate {folder} "Once"{trace}'
    screen.print(hint, highlight=False, markup=False, soft_wrap=True)


def check_compose(action: str, experts: list[str], options: dict[str, Any]) -> None:
    """Raise ConfigError for options of `compose` that do not go with what it is to do."""
    alone = {
        "add": ("--name",),
        "remove": ("--remove",),
        "tune": ("--tune", "--data", "--tokens", "--lr"),
        "report": (),
    }
    problems: list[Problem] = []
    if action == "make":
        if options["--out"] is None:
            problems.append(Problem("--out", "where to?", "name a new folder"))
    else:
        beside = {"tune": "--tune alone", "report": "--report alone"}
        what = beside.get(action, "--add or --remove")
        problems += [
            Problem(option, f"does not go with {what}", "compose anew for that")
            for option, value in options.items()
            if value is not None and option not in alone[action]
        ]
    if options["--tune"] not in (None, "heads"):
        fix = "for a gate or an adapter: --mix gate, --mix adapter"
        problems.append(Problem("--tune", f"{options['--tune']!r} is not heads", fix))
    if action in ("make", "tune") and not options["--data"]:
        problems += [
            Problem(option, "nothing is trained without text", "name it with --data")
            for option in ("--tokens", "--lr")
            if options[option] is not None
        ]
    if action in ("add", "remove") and len(experts) != 1:
        problems.append(Problem("--add, --remove", "name one composition", "its folder"))
    if action == "add" and len(options["--name"] or ()) > 1:
        problems.append(Problem("--name", "one expert has one name", "give one"))
    if problems:
        raise ConfigError(problems)


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
    """Write a report (again): plots as PNG and one self-contained HTML page.

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


@app.command()
def doctor(as_json: Json = False) -> None:
    """Say what this machine and installation offer: versions, device, bf16, threads, disk."""
    from nacre import tables
    from nacre.doctor import examine

    found = examine(Path.cwd())
    if as_json:
        emit(found)
    else:
        Console().print(tables.facts(found))


@app.command()
def bench(
    suites: Annotated[
        list[str] | None, typer.Argument(metavar="[SUITE]...", help="Which; default: all.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Tiny shapes, seconds in all, no verdict.")
    ] = False,
    only_list: Annotated[bool, typer.Option("--list", help="Name the suites; run none.")] = False,
    out: Annotated[Path | None, typer.Option(help="Also write the JSON to this file.")] = None,
    as_json: Json = False,
) -> None:
    """Measure nacre on this machine beside what else one would run, and the physical limit."""
    from nacre import bench as benches

    if only_list:
        about = {name: text for name, (_, text) in benches.SUITES.items()}
        if as_json:
            emit(about)
        else:
            for name, text in about.items():
                print(f"{name:12}{text}")
        return
    benches.check(suites or [])
    if out is not None and (out.is_dir() or not out.parent.is_dir()):
        message = f"{out} is a folder" if out.is_dir() else f"there is no folder {out.parent}"
        raise ConfigError(Problem("--out", message, "name a file in a folder that exists"))
    from nacre.bench.table import table
    from nacre.train.checkpoint import write_json

    quiet_transformers()
    with screen.status("") as status:

        def progress(suite: str, case: str) -> None:
            status.update(f"{suite}: {case}")
            if not screen.is_terminal:
                screen.print(f"{suite}: {case}", highlight=False, soft_wrap=True)

        results = benches.run(suites or [], quick=quick, progress=progress)
    if out is not None:
        write_json(out, results.record())
    if as_json:
        emit(results.record())
        return
    for name, rows in results.suites.items():
        Console().print(table(name, rows, results.seconds[name]))


@substrate_app.command("build")
def build_substrate(
    tokenizer: Annotated[str, typer.Argument(help="A tokenizer: a folder, or hf:NAME.")],
    out: Annotated[Path, typer.Option(help="The folder to write.")],
    width: Annotated[int, typer.Option(help="Dimensions of a row.")] = 256,
    kind: Annotated[str, typer.Option(help="glyph, code, random or trained.")] = "glyph",
    fit: Annotated[
        str, typer.Option(help="glyph: the basis of `unifont`, or `vocabulary`.")
    ] = "unifont",
    font: Annotated[Path | None, typer.Option(help="glyph: another TTF or OTF.")] = None,
    as_json: Json = False,
) -> None:
    """Make the substrate of a tokenizer's vocabulary."""
    from nacre import config, tables
    from nacre import tokenizer as tokenizers
    from nacre.substrate import Substrate, SubstrateRecipe
    from nacre.substrate.table import EFFECTIVE
    from nacre.terminal import Display

    quiet_transformers()
    data = {"kind": kind, "fit": fit, "font": font}
    recipe = config.validate(SubstrateRecipe, data, where="substrate")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(Problem("--out", f"{out} is not empty", "name a new folder"))
    for name in ("fit", "font"):
        if name not in EFFECTIVE[recipe.kind] and data[name] not in (None, "unifont"):
            screen.print(f"[yellow]warning:[/] --{name} has no effect with --kind {recipe.kind}")
    tokens = tokenizers.token_strings(tokenizers.load(tokenizer))
    with Display(screen) as display:
        display.phase("Substrate", len(tokens))
        substrate = Substrate.build(recipe, tokens, width, display.advance)
    substrate.save(out)
    about = {"fingerprint": substrate.fingerprint, "width": width, **substrate.report}
    if as_json:
        emit(about)
    else:
        Console().print(tables.facts(about))


@substrate_app.command("show")
def show_substrate(
    token: Annotated[str, typer.Argument(help="Any string.")],
    substrate: Annotated[
        Path | None, typer.Option(help="A saved substrate: also shows the nearest rows.")
    ] = None,
    width: Annotated[int, typer.Option(help="Dimensions, when no substrate is named.")] = 256,
    png: Annotated[Path | None, typer.Option(help="Also write the picture as a PNG.")] = None,
    count: Annotated[int, typer.Option(min=1, help="How many nearest rows.")] = 8,
) -> None:
    """Draw a token as the model sees it, and what its row keeps of the picture."""
    from nacre import substrate as substrates

    if png is not None and not png.parent.is_dir():
        raise ConfigError(Problem("--png", f"there is no folder {png.parent}"))
    table = substrates.Substrate.load(substrate) if substrate else None
    recipe, width = (table.recipe, table.width) if table else (None, width)
    seen = substrates.picture(token, width, recipe)
    print(substrates.blocks(seen, ansi=sys.stdout.isatty()))
    if png is not None:
        substrates.save_png(seen, png)
    if table is not None:
        for number, near, cosine in substrates.nearest(table, token, count):
            print(f"{cosine:7.4f}  {number:7d}  {near!r}")


@tokenizer_app.command("build")
def build_tokenizer(
    data: Sources = None,
    out: Annotated[Path, typer.Option(help="The folder to write.")] = Path("tokenizer"),
    size: Annotated[int, typer.Option(help="Vocabulary size, 512 to 131,072.")] = 4096,
    alphabet: Annotated[
        str, typer.Option(help="Code points: of the `corpus`, or `bmp`.")
    ] = "corpus",
    errors: ErrorPolicy = "strict",
    as_json: Json = False,
) -> None:
    """Learn a lossless tokenizer from text; `AutoTokenizer` loads it."""
    from nacre import config, tables
    from nacre import tokenizer as tokenizers
    from nacre.data import corpus
    from nacre.growth.plan import Data, Tokenizer
    from nacre.terminal import Display

    quiet_transformers()
    options = config.validate(Tokenizer, {"size": size, "alphabet": alphabet}, where="tokenizer")
    source = config.validate(Data, {"sources": data or ["default"], "errors": errors}, where="data")
    if out.exists() and any(out.iterdir()):
        raise ConfigError(Problem("--out", f"{out} is not empty", "name a new folder"))
    documents = corpus.read(source.sources, errors=source.errors)
    texts = (document.text for document in documents)
    with Display(screen) as display:
        display.phase("Tokenizer", corpus.check(source.sources).total_bytes)
        tokenizer = tokenizers.build(
            texts, options.size, alphabet=options.alphabet, progress=display.advance
        )
    tokenizer.save_pretrained(out)
    about = {"size": len(tokenizer), "fingerprint": tokenizers.fingerprint(tokenizer)}
    if as_json:
        emit(about)
    else:
        Console().print(tables.facts(about))
