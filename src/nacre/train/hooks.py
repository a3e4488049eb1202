"""What happens after each step of a stage: metrics, warnings, evaluation, saved states."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from nacre import processes
from nacre.growth.stopping import has_trained_enough
from nacre.train import files, state
from nacre.train.interruption import Interrupted, Stop
from nacre.train.loop import Hook, StageRun, evaluate
from nacre.train.metrics import append_metrics, sync_metrics
from nacre.train.observer import Observer
from nacre.train.record import Below, loss_of

RECENT = 100
"""How many losses a new one is compared with."""
SPIKE = 6.0
"""How many standard deviations above their mean a loss is worth a warning."""


def hooks(
    number: int, out: Path, observer: Observer, below: Below | None, flops_per_token: float,
    stop: Stop, steps_before: int,
) -> list[Hook]:  # fmt: skip
    """Return what happens after each step: metrics, evaluation, saved state, in this order.

    Trackers count the steps of a run: `steps_before` are those of its finished stages.
    """
    recent: deque[float] = deque(maxlen=RECENT)

    def watch(run: StageRun, line: Mapping[str, Any]) -> None:
        """Say that a step was left out, or that the loss has jumped."""
        where = f"step {line['step']} of stage {number}"
        if "skipped" in line:
            observer.warn(f"{where} was left out: {line['skipped']}")
            return
        mean = np.mean(recent) if len(recent) == RECENT else math.inf
        if line["loss"] > mean and line["loss"] > mean + SPIKE * np.std(recent, ddof=1):
            usual = f"{mean:.3f} in the mean of the {RECENT} before"
            observer.warn(f"{where}: the loss jumped to {line['loss']:.3f}, from {usual}")
            recent.clear()
        recent.append(line["loss"])

    def log(run: StageRun, metrics: dict[str, Any]) -> None:
        if not processes.is_main():
            return
        line = {"stage": number, **metrics}
        append_metrics(out, line)
        numbers = {k: v for k, v in line.items() if k not in ("step", "skipped")}
        run.accelerator.log(numbers, step=steps_before + metrics["step"])
        observer.trained(line)
        watch(run, line)

    def validate(run: StageRun, metrics: dict[str, Any]) -> None:
        if metrics["step"] % run.training.evaluate_every == 0 and metrics["step"] < run.steps:
            validation = report_validation(run, out, number, observer, steps_before)
            run.progress.notice(validation["loss"])
            decided = run.stage.budget == "tokens" or run.progress.end is not None
            if not decided and enough(run, below, flops_per_token):
                run.cut_short()
                observer.note(f"stage {number} ends at step {run.steps}: a new one gains more")

    def save(run: StageRun, metrics: dict[str, Any]) -> None:
        if run.finished:
            return
        asked = asked_to_stop(stop, run.accelerator.device)
        if not (metrics["step"] % run.training.save_every == 0 or asked):
            return
        progress = {"stage": number, "processes": processes.count(), **run.progress.record()}
        if processes.is_main():
            sync_metrics(out)
        state.save(out / "state", run.state(), progress)
        if asked:
            raise Interrupted(
                f"stopped by {asked} after step {metrics['step']} of stage {number}; its "
                f"state is saved: continue with nacre grow --resume --out {out}"
            )

    return [log, validate, save]


def steps_of(stages: Sequence[Path], batch_tokens: int) -> int:
    """Return the optimizer steps of the finished stages of a run."""
    return sum(files.read_stage(stage)["tokens"] for stage in stages) // batch_tokens


def asked_to_stop(stop: Stop, device: torch.device) -> str | None:
    """Return the signal that has asked any of the processes to stop; None if there was none."""
    (asking,) = processes.total(float(stop.requested is not None), device=device)
    return next(filter(None, processes.gather(stop.requested))) if asking else None


def enough(run: StageRun, below: Below | None, flops_per_token: float) -> bool:
    """Tell whether a stage of `budget: auto` has trained long enough."""
    history = [(tokens * flops_per_token, loss) for tokens, loss in run.progress.history]
    if below is None:
        return has_trained_enough(history, None)
    history[0] = (0.0, _start(history[0][1], loss_of(below)))
    return has_trained_enough(history, gains(below.record))


def gains(record: Mapping[str, Any]) -> list[tuple[float, float]]:
    """Return the history of a stage on a trunk, by FLOPs; nothing of one that stood on nothing."""
    if not record.get("parent") or not record.get("history"):
        return []
    each = record["plain_flops_per_token"]
    start, *later = record["history"]
    first = (0.0, _start(start[1], record["loss_below"]))
    return [first, *((tokens * each, loss) for tokens, loss in later)]


def _start(loss: float, below: float | None) -> float:
    """Return the loss that a stage's gain is counted from: the one below's, if blocks raised it."""
    return loss if below is None else min(loss, below)


def report_validation(
    run: StageRun, out: Path, number: int, observer: Observer, steps_before: int
) -> dict[str, float]:
    """Evaluate on the held-out text, record the result and show it; for trackers as `hooks`."""
    validation = evaluate(run)
    step = run.progress.step
    if processes.is_main():
        at = {"stage": number, "step": step, "tokens": run.progress.tokens}
        append_metrics(out, {**at, "validation": validation})
    numbers = {f"validation/{k}": v for k, v in validation.items()}
    run.accelerator.log(numbers, step=steps_before + step)
    observer.evaluated(validation)
    return validation
