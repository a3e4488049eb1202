"""After each step: what trackers get, warnings of what a person should know."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from accelerate import Accelerator

from nacre.growth.plan import Plan
from nacre.train import files
from nacre.train.grow import grow
from nacre.train.hooks import RECENT, hooks
from nacre.train.interruption import Stop
from nacre.train.observer import Observer
from nacre.train.record import Below, loss_of


class Warned(Observer):
    """Keeps the warnings."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def warn(self, text: str) -> None:
        self.said.append(text)


def after(losses: list[float | None], out: Path) -> list[str]:
    """Return what is warned of after steps with these losses; None: the step was left out."""
    observer = Warned()
    run: Any = SimpleNamespace(accelerator=SimpleNamespace(log=lambda *_, **__: None))
    log = hooks(2, out, observer, None, 1.0, Stop(), 0)[0]
    for step, loss in enumerate(losses, 1):
        line = {"skipped": "loss nan"} if loss is None else {"loss": loss}
        log(run, {"step": step, "lr": 0.1, **line})
    return observer.said


def test_a_loss_that_jumps_is_said_once(tmp_path: Path) -> None:
    calm = [3.0 + 0.01 * (step % 3) for step in range(RECENT)]
    assert after([*calm, 3.02], tmp_path) == []
    (said,) = after([*calm, 5.0, 5.0, 5.0], tmp_path)
    assert said == (
        "step 101 of stage 2: the loss jumped to 5.000, from 3.010 in the mean of the 100 before"
    )


def test_a_young_stage_does_not_jump(tmp_path: Path) -> None:
    assert after([3.0] * (RECENT - 1) + [9.0], tmp_path) == []


def test_a_stage_below_may_have_no_measured_loss(tmp_path: Path) -> None:
    record = {"stage": 0, "frozen": {}, "weights": {}, "growth": [], "fingerprint": "f"}
    for said in ({}, {"validation": None}):
        files.write_json(tmp_path / files.RECORD, record | said)
        assert loss_of(Below(tmp_path, files.read_record(tmp_path))) is None


def test_a_step_that_was_left_out_is_said(tmp_path: Path) -> None:
    assert after([3.0, None, 3.0], tmp_path) == ["step 2 of stage 2 was left out: loss nan"]


def test_trackers_count_the_steps_of_the_whole_run(
    tiny_plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    logged: list[tuple[int, dict[str, Any]]] = []
    monkeypatch.setattr(Accelerator, "log", lambda _, values, step: logged.append((step, values)))
    batch, stage = tiny_plan.training.batch_tokens, tiny_plan.stages[0]
    stages = tuple(stage.model_copy(update={"tokens": steps * batch}) for steps in (3, 2))
    grow(tiny_plan.model_copy(update={"stages": stages}), tmp_path / "run")
    trained = [(step, values["stage"]) for step, values in logged if "lr" in values]
    assert trained == [(1, 1), (2, 1), (3, 1), (4, 2), (5, 2)]
    assert [step for step, values in logged if "validation/loss" in values] == [0, 3]
