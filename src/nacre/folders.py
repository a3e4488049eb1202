"""By which files the folders that nacre writes are known.

Imports nothing: who only looks around needs no torch.
"""

PLAN, RUN, METRICS, LOCK = "plan.yaml", "run.json", "metrics.jsonl", ".lock"
"""Of a run."""

STAGE = "stage.json"
COMPOSITION = "composition.json"
STUDY = "study.yaml"
