"""Controlled comparisons: arms, each a plan, run over the same seeds and set beside a baseline."""

from nacre.study.design import Run, Study, load, parse
from nacre.study.page import arm_rows, write
from nacre.study.results import read_results
from nacre.study.runner import StudyError, evaluate, finished_runs, run

__all__ = [
    "Run", "Study", "StudyError", "arm_rows", "evaluate", "finished_runs", "load", "parse",
    "read_results", "run", "write",
]  # fmt: skip
