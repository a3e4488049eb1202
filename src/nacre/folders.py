"""By which files the folders that nacre writes are known.

Imports nothing of nacre: who only looks around needs no torch.
"""

from pathlib import Path

PLAN, RUN, METRICS, LOCK = "plan.yaml", "run.json", "metrics.jsonl", ".lock"
STAGES = "stages"
"""Of a run."""

STAGE = "stage.json"
COMPOSITION = "composition.json"
STUDY, RESULTS = "study.yaml", "results.json"


def stages(run: Path) -> list[Path]:
    """Return the finished stages of a run, in order; raise `ValueError` if one is missing."""
    found = sorted(
        (int(path.parent.name), path.parent)
        for path in (run / STAGES).glob(f"*/{STAGE}")
        if path.parent.name.isdecimal()
    )
    for expected, (number, _) in enumerate(found, 1):
        if number != expected:
            raise ValueError(f"stage {expected} is missing below stage {found[-1][0]}")
    return [path for _, path in found]
