"""What a run tells those who watch it; the terminal display and scripts derive from this."""

from __future__ import annotations

from typing import Any


class Observer:
    """Silent by default: override what you want to see. Called from the training process only."""

    def note(self, text: str) -> None:
        """Say something worth a line in the log."""

    def warn(self, text: str) -> None:
        """Say something the user should know: an option without effect, a cut document."""

    def phase(self, title: str, total: int | None = None) -> None:
        """Announce a piece of preparation, and how many units it has if known."""

    def advance(self, units: int) -> None:
        """Count finished units of the phase."""

    def stage_started(self, stage: int, stages: int, tokens: int, done: int) -> None:
        """Announce stage `stage` of `stages` with `tokens` to train on, `done` of them already."""

    def trained(self, step: dict[str, Any]) -> None:
        """Report one optimizer step: the line that goes into `metrics.jsonl`."""

    def evaluated(self, validation: dict[str, float]) -> None:
        """Report a held-out evaluation: loss, perplexity, bits per byte."""

    def stage_finished(self, record: dict[str, Any]) -> None:
        """Report a finished stage: its `stage.json`."""
