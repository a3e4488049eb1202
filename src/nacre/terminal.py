"""What a person sees while a run goes on: a live bar in a terminal, plain lines in a log file."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

from rich.console import Console, Group
from rich.live import Live
from rich.progress import (
    BarColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeRemainingColumn,
)
from rich.text import Text

from nacre.train.observer import Observer

LOG_SECONDS = 15.0  # between two lines of progress where there is no terminal
SPARKS = "▁▂▃▄▅▆▇█"
SPARKLINE = 40  # cells, so that a line fits 80 columns
MEANS = 8 * SPARKLINE  # of a stage's losses that are kept at most; an even number


class Display(Observer):
    """Progress on stderr. Use as a context manager: it also shows the library's log messages."""

    def __init__(self, console: Console) -> None:
        self.console = console
        self.live = console.is_terminal
        self.bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(bar_width=24),
            TextColumn("{task.percentage:>3.0f}%"),
            TimeRemainingColumn(compact=True),
            console=console,
        )
        self.status = ""
        self.losses = Losses()
        self.task: TaskID | None = None
        self.title = ""
        self.total: int | None = None
        self.done = 0
        self.bits_per_byte: float | None = None
        self.said = 0.0
        self.view = Live(
            get_renderable=self._view, console=console, refresh_per_second=4, transient=True
        )
        self.handler = _LogHandler(self)

    def __enter__(self) -> Display:
        logger = logging.getLogger("nacre")
        logger.addHandler(self.handler)
        logger.setLevel(logging.INFO)
        if self.live:
            self.view.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.live:
            self.view.stop()
        logging.getLogger("nacre").removeHandler(self.handler)

    def note(self, text: str) -> None:
        """Print a line above the bar."""
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.live)

    def warn(self, text: str) -> None:
        """Print a warning above the bar."""
        self.console.print("[yellow]warning:[/]", end=" ")
        self.console.print(text, highlight=False, markup=False, soft_wrap=not self.live)

    def phase(self, title: str, total: int | None = None) -> None:
        """Show a new bar for a piece of preparation."""
        self._begin(title, total, 0)
        if not self.live:
            self.note(f"{title} ...")

    def advance(self, units: int) -> None:
        """Move the bar."""
        self.done += units
        if self.task is not None:
            self.bar.update(self.task, advance=units)

    def stage_started(self, stage: int, stages: int, tokens: int, done: int) -> None:
        """Show the stage's bar, counted in tokens."""
        self._begin(f"Stage {stage}/{stages}", tokens, done)
        self.bits_per_byte = None
        self.losses = Losses()

    def trained(self, step: dict[str, Any]) -> None:
        """Show losses, speed and memory; in a log file, a line now and then."""
        self.done = step["tokens"]
        loss = f"loss {step['loss']:.3f}" if "loss" in step else "left out"
        if "loss" in step:
            self.losses.add(step["loss"])
        status = f"{loss}  {step['tokens_per_second']:,.0f} tok/s"
        if self.bits_per_byte is not None:
            status += f"  held-out {self.bits_per_byte:.3f} b/B"
        self.status = f"{status}  peak {step['peak_memory_bytes'] / 1e6:,.0f} MB"
        if self.task is not None:
            self.bar.update(self.task, completed=self.done)
        if not self.live and time.monotonic() - self.said >= LOG_SECONDS:
            self.said = time.monotonic()
            total = max(1, self.total or 0)
            share = f"{100 * self.done / total:3.0f}%"
            left = f"{(total - self.done) / step['tokens_per_second']:.0f} s left"
            self.note(f"{self.title}  {share}  step {step['step']}  {status}  {left}")

    def evaluated(self, validation: dict[str, float]) -> None:
        """Remember the held-out bits per byte; the next step shows it."""
        self.bits_per_byte = validation["bits_per_byte"]

    def stage_finished(self, record: dict[str, Any]) -> None:
        """Print one line for the finished stage and take its bar away."""
        self._end()
        validation = record["validation"]
        self.note(
            f"{self.title}  depth {record['depth']}  "
            f"held-out {validation['bits_per_byte']:.4f} bits per byte  "
            f"({record['tokens']:,} tokens in {record['seconds']:.0f} s, "
            f"{record['tokens_per_second']:,.0f} tok/s)"
        )

    def _begin(self, title: str, total: int | None, done: int) -> None:
        self._end()
        self.title, self.total, self.done = title, total, done
        self.task = self.bar.add_task(title, total=total, completed=done)

    def _end(self) -> None:
        if self.task is not None:
            self.bar.remove_task(self.task)
            self.task = None
        self.status, self.losses = "", Losses()

    def _view(self) -> Group:
        lines = [Text(f"  {self.status}", no_wrap=True)] if self.status else []
        if len(self.losses.means) > 1:
            first, last = self.losses.first, self.losses.last
            curve = sparkline(self.losses.means)
            lines.append(Text(f"  {first:.2f} {curve} {last:.2f}", no_wrap=True))
        return Group(self.bar, *lines)


class Losses:
    """The losses of a stage, however many, as few means of equally many each, in order.

    `first` and `last` are single losses. What makes no whole mean yet is not among the `means`.
    """

    def __init__(self) -> None:
        self.means: list[float] = []
        self.first = self.last = 0.0
        self.each = 1  # losses in a mean
        self._sum, self._count = 0.0, 0

    def add(self, loss: float) -> None:
        """Take one more loss; where there are too many means, two become one."""
        if not self.means and not self._count:
            self.first = loss
        self.last = loss
        self._sum, self._count = self._sum + loss, self._count + 1
        if self._count == self.each:
            self.means.append(self._sum / self.each)
            self._sum, self._count = 0.0, 0
        if len(self.means) == MEANS:
            pairs = zip(self.means[::2], self.means[1::2], strict=True)
            self.means = [(a + b) / 2 for a, b in pairs]
            self.each *= 2


def sparkline(values: Sequence[float], cells: int = SPARKLINE) -> str:
    """Return a line of block characters: means of consecutive values, the lowest as the lowest."""
    count = min(cells, len(values))
    edges = [len(values) * n // count for n in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in pairwise(edges)]
    low, high = min(means), max(means)
    scale = (len(SPARKS) - 1) / (high - low) if high > low else 0.0
    return "".join(SPARKS[round((mean - low) * scale)] for mean in means)


class _LogHandler(logging.Handler):
    """Shows what the library logs in the display: warnings as such, the rest as notes."""

    def __init__(self, display: Display) -> None:
        super().__init__(logging.INFO)
        self.display = display

    def emit(self, record: logging.LogRecord) -> None:
        """Print one log record."""
        show = self.display.warn if record.levelno >= logging.WARNING else self.display.note
        show(record.getMessage())
