"""By which files the folders that nacre writes are known.

Imports nothing: who only looks around needs no torch.
"""

PLAN, RUN, METRICS, LOCK = "plan.yaml", "run.json", "metrics.jsonl", ".lock"
STAGES = "stages"
"""Of a run."""

STAGE = "stage.json"
COMPOSITION = "composition.json"
STUDY, RESULTS = "study.yaml", "results.json"
