"""What a run left on disk, read for a report: nothing is trained, loaded or hashed here."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from nacre import config
from nacre.errors import CheckpointError, ConfigError
from nacre.folders import METRICS, PLAN
from nacre.train import schema
from nacre.train.files import RECORD, read_run, read_stage, stages
from nacre.train.metrics import read_metrics
from nacre.untrusted import read_text

Series = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class StageView:
    """One stage that has begun, on the axis of all tokens of the run.

    `training` is [steps, 2]: tokens, loss (nats a token). `held_out` is [evaluations, 3]: tokens,
    loss, bits per byte; a finished stage's last row comes from its record. `depth` is None while
    it cannot be known: the first stage over a checkpoint, before it has finished.
    """

    stage: int
    depth: int | None
    lora: bool
    finished: bool
    start: int
    end: int
    training: Series
    held_out: Series


@dataclass(frozen=True)
class RunFiles:
    """What a run folder says: its plan, `run.json`, metrics and the records of finished stages."""

    path: Path
    plan: dict[str, Any]
    plan_text: str
    run: dict[str, Any]
    metrics: list[dict[str, Any]]
    records: list[dict[str, Any]]

    @property
    def planned(self) -> int:
        """How many stages the plan has."""
        return len(self.plan["stages"])

    @property
    def finished(self) -> bool:
        """True when every planned stage has its record."""
        return len(self.records) >= self.planned

    def depth(self, stage: int) -> int | None:
        """Return the number of blocks after a stage, or None if only its record could tell."""
        if stage <= len(self.records):
            return self.records[stage - 1]["depth"]
        if not self.records and self.plan.get("from"):
            return None
        known = self.records[-1]["depth"] if self.records else 0
        return known + sum(s["add_blocks"] for s in self.plan["stages"][len(self.records) : stage])

    def views(self) -> list[StageView]:
        """Return the stages that have begun, in order."""
        views: list[StageView] = []
        start = 0
        begun = {line["stage"] for line in self.metrics} | {r["stage"] for r in self.records}
        for stage in sorted(begun):
            lines = [line for line in self.metrics if line["stage"] == stage]
            training = [(start + m["tokens"], m["loss"]) for m in lines if "loss" in m]
            scores = [(m["tokens"], m["validation"]) for m in lines if "validation" in m]
            record = self.records[stage - 1] if stage <= len(self.records) else None
            if record is not None:
                scores.append((record["tokens"], record["validation"]))
            held_out = [(start + n, v["loss"], v["bits_per_byte"]) for n, v in scores]
            end = start + (record or max(lines, key=lambda m: m["tokens"]))["tokens"]
            views.append(
                StageView(
                    stage=stage,
                    depth=self.depth(stage),
                    lora=bool(self.plan["stages"][stage - 1].get("lora")),
                    finished=record is not None,
                    start=start,
                    end=end,
                    training=np.array(training, dtype=np.float64).reshape(-1, 2),
                    held_out=np.array(held_out, dtype=np.float64).reshape(-1, 3),
                )
            )
            start = end
        return views


def load_run(run: str | Path) -> RunFiles:
    """Read a run folder's files; a last metrics line that is cut off is left out.

    Raises `CheckpointError` for a folder that is no run, damaged files, or nothing to show yet.
    """
    path = Path(run)
    if not path.is_dir():
        raise CheckpointError(f"{path}: no such folder; name the --out folder of `nacre grow`")
    if not (path / PLAN).is_file():
        hint = "name the --out folder of `nacre grow`"
        if (path / RECORD).is_file():
            hint = f"this is one stage; name its run: {path.absolute().parent.parent}"
        raise CheckpointError(f"{path}: is no run ({PLAN} is missing); {hint}")
    records = [read_stage(stage) for stage in stages(path)]
    metrics = read_metrics(path, schema.MetricLine)
    if not records and not metrics:
        raise CheckpointError(
            f"{path}: nothing to report yet: no stage has finished and {METRICS} has no "
            f"line (continue the run: nacre grow --resume --out {path})"
        )
    try:
        plan = config.read_yaml(path / PLAN)
    except ConfigError as error:
        raise CheckpointError(str(error)) from None
    if not isinstance(plan.get("stages"), list) or not plan["stages"]:
        raise CheckpointError(f"{path / PLAN}: is no plan of nacre: it has no stages")
    begun = max([len(records), *(line["stage"] for line in metrics)])
    named = plan["stages"][:begun]
    sound = all(isinstance(each, dict) and "add_blocks" in each for each in named)
    if len(named) < begun or not sound:
        message = f"is not the plan of this run: it does not have {begun} stages"
        raise CheckpointError(f"{path / PLAN}: {message}")
    text = read_text(path / PLAN)
    return RunFiles(path, plan, text, read_run(path), metrics, records)
