"""After each step: warnings of what a person should know."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

from nacre.train import files
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
    log = hooks(2, out, observer, None, 1.0, Stop())[0]
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
