"""What a person sees during a run, in a log file and in a terminal of 80 columns."""

from __future__ import annotations

import io
import logging

import pytest
from rich.console import Console

from nacre import tables
from nacre.growth import budget
from nacre.growth import plan as plans
from nacre.terminal import MEANS, Display, Losses, sparkline

RECORD = {
    "stage": 2, "depth": 4, "active_parameters": 104_887_296, "total_parameters": 181_498_880,
    "tokens": 1_000_000, "seconds": 1234.5, "tokens_per_second": 12_345.6,
    "peak_memory_bytes": 12_345_678_901, "lora": None,
    "validation": {"loss": 4.5, "perplexity": 1234.5, "bits_per_byte": 1.9876},
}  # fmt: skip


def watch(terminal: bool) -> str:
    out = io.StringIO()
    console = Console(file=out, force_terminal=terminal, width=80)
    with Display(console) as display:
        display.phase("Tokenize", 100)
        display.advance(100)
        display.stage_started(2, 3, tokens=1_000_000, done=0)
        display.evaluated({"loss": 4.6, "perplexity": 99.5, "bits_per_byte": 2.0})
        for step in (1, 2):
            display.trained(
                {
                    "step": step,
                    "tokens": step * 500_000,
                    "loss": 5.5 - step,
                    "tokens_per_second": 9876.5,
                    "peak_memory_bytes": 722_000_000,
                }
            )
        display.view.refresh()
        logging.getLogger("nacre.data").warning("one document was cut")
        display.stage_finished(RECORD)
    return out.getvalue()


def test_a_log_file_stays_readable() -> None:
    text = watch(terminal=False)
    assert "\x1b" not in text
    assert "Tokenize ..." in text
    line = "Stage 2/3   50%  step 1  loss 4.500  9,876 tok/s  held-out 2.000 b/B  51 s left\n"
    assert line in text, "one line, however narrow the console is"
    assert "warning: one document was cut" in text
    assert "held-out 1.9876 bits per byte" in text


def test_a_terminal_shows_a_live_view() -> None:
    text = watch(terminal=True)
    assert "Stage 2/3" in text
    assert "9,876 tok/s  held-out 2.000 b/B  peak 722 MB" in text
    assert "4.50 █▁ 3.50" in text
    assert "\x1b[" in text


def test_a_sparkline_goes_from_the_highest_to_the_lowest() -> None:
    assert sparkline([8.0, 7, 6, 5, 4, 3, 2, 1]) == "█▇▆▅▄▃▂▁"
    assert sparkline([2.0, 2.0]) == "▁▁"
    assert sparkline([4.0, 4.0, 2.0, 2.0], cells=2) == "█▁"
    assert len(sparkline(range(1000))) == 40


def test_losses_take_little_memory_and_draw_the_same_line() -> None:
    every = [10 / (1 + step / 100) for step in range(8 * MEANS)]
    losses = Losses()
    for loss in every:
        losses.add(loss)
        assert len(losses.means) < MEANS
    assert (losses.first, losses.last) == (every[0], every[-1])
    assert sum(losses.means) / len(losses.means) == pytest.approx(sum(every) / len(every))
    assert sparkline(losses.means) == sparkline(every)


def test_the_library_logs_nowhere_else_afterwards() -> None:
    watch(terminal=False)
    assert logging.getLogger("nacre").handlers == []


def show(table: object) -> str:
    out = io.StringIO()
    Console(file=out, width=80).print(table)
    return out.getvalue()


def test_tables_fit_80_columns_uncut() -> None:
    text = show(tables.stages([RECORD | {"stage": stage} for stage in (1, 2, 10)]))
    assert "…" not in text
    for cell in ("104.9M", "181.5M", "1.9876", "1,234.50", "12,346", "12.35 GB", "1,234.5"):
        assert cell in text
    for recipe in plans.recipes():
        assert "…" not in show(tables.costs(budget.estimate(plans.load(recipe)))), recipe


def test_texts_side_by_side() -> None:
    text = show(
        tables.side_by_side("Once [b]", [(RECORD | {"depth": d}, f"text {d}") for d in (2, 4)])
    )
    assert "depth 2" in text
    assert "text 4" in text
    assert "'Once [b]'" in text
