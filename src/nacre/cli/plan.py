"""What a plan will cost, here or on other machines, before it runs."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from nacre.cli.console import Json, PlanArgument, Settings, app, emit, quiet_transformers, screen
from nacre.errors import ConfigError, Problem


@app.command()
def plan(
    plan: PlanArgument = "small",
    devices: Annotated[
        str | None,
        typer.Option(
            metavar="[N x]DEVICE", help="Estimate a run on these: 64xH200, RTX4090, or `here`."
        ),
    ] = None,
    tokens: Annotated[
        str | None, typer.Option(help="Scale the stages to this many tokens in all: 20B, 1e12.")
    ] = None,
    mfu: Annotated[
        float | None,
        typer.Option(help="The share of the devices' peak that training reaches; default: 0.4."),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Say what a plan will cost before it runs, per stage.

    nacre plan small

    nacre plan paper-9x3-glyph --devices 64xH200 --tokens 1e12
    """
    from nacre.growth import plan as plans

    chosen = plans.load(plan, settings or [])  # its mistakes are said without torch

    from dataclasses import asdict

    from nacre import tables
    from nacre.growth import budget, scaling
    from nacre.growth.devices import parse
    from nacre.numbers import size
    from nacre.train import checkpoint

    quiet_transformers()
    asked = None if devices is None else parse(devices)
    if mfu is not None and asked is None:
        raise ConfigError(Problem("--mfu", "of which devices?", "name them: --devices 8xH100"))
    if tokens is not None:
        chosen = scaling.scaled(chosen, scaling.parse_tokens(tokens))
    for warning in plans.warnings(chosen):
        screen.print(f"[yellow]warning:[/] {warning}", highlight=False)
    base = (
        checkpoint.load_config(checkpoint.newest(chosen.start_from)) if chosen.start_from else None
    )
    costs = budget.estimate(chosen, base=base)
    estimate = None
    if asked is not None:
        from nacre.bench import here

        estimate = here.estimate(chosen, *asked, mfu, base)
    if as_json:
        stages = [asdict(cost) | {"flops": cost.flops} for cost in costs]
        found = {"name": chosen.name, "fingerprint": chosen.fingerprint(), "stages": stages}
        emit(found if estimate is None else found | {"estimate": estimate.record()})
        return
    out = Console()
    out.print(tables.costs(costs))
    total = sum(cost.flops for cost in costs)
    disk = size(budget.disk_needed(costs))
    out.print(f"{total:.2e} FLOPs in all, about {disk} of disk at most.", highlight=False)
    note = "Not in it: the tokens of all text of the sources, 2 or 4 bytes each, and as much again"
    out.print(f"{note} while they are made.", highlight=False)
    out.print(f"One block has {costs[0].block_parameters:,} parameters.", highlight=False)
    if chosen.model.family == "gpt_neox":
        note = "The papers also count one LM-head bias a token; the stock class has none."
        out.print(note, highlight=False)
    if estimate is not None:
        for part in tables.estimate(estimate):
            out.print(part, highlight=False)
