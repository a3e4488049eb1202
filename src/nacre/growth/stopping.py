"""When a stage of `budget: auto` has trained long enough: its time would bring more elsewhere.

A history is the held-out loss (nats a token) over the FLOPs of a stage, from its start (0) on. They
stand for its seconds: the same plan then ends in the same model, whatever the machine. The loss at
its start is that of the stage below, if new blocks have raised it since: to come back is no gain.
Gains are compared over equal cost: by how much the loss falls while the stage's cost doubles, and
by how much it fell at the same cost of a new stage.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence

History = Sequence[tuple[float, float]]

FRESH = 0.5
"""What the next stage gains over what this one did, where no two stages on a trunk say it."""


def has_trained_enough(history: History, below: History | None) -> bool:
    """Tell whether going on is foretold to gain less than a new stage would at the same cost.

    Going on for as long again gains what the last doubling of the stage's cost did, times how much
    less that was than the doubling before. A new stage gains what `new_stage_gain` says or, if this
    is the first (`below` is None), `FRESH` of the last doubling. False before the fourth
    evaluation: the loss falls too fast after a start to draw lines from there.
    """
    if len(history) < 5 or history[1][0] > history[-1][0] / 4:
        return False
    now, loss = history[-1]
    older = loss_at(history, now / 4) - loss_at(history, now / 2)
    last = loss_at(history, now / 2) - loss
    if last <= 0:
        return True
    going_on = last * min(1.0, last / older) if older > 0 else last
    return going_on < (FRESH * last if below is None else new_stage_gain(history, below))


def new_stage_gain(history: History, below: History) -> float:
    """Return what a new stage is foretold to gain at the cost that this one has reached.

    This one's own gain, less by the factor by which this gained less than the stage `below`; by
    `FRESH` where that is empty, because it stood on no trunk.
    """
    if not below:
        return FRESH * (history[0][1] - history[-1][1])
    cost = min(history[-1][0], below[-1][0])
    here = history[0][1] - loss_at(history, cost)
    there = below[0][1] - loss_at(below, cost)
    return here * (min(1.0, max(0.0, here / there)) if there > 0 else 1.0)


def loss_at(history: History, cost: float) -> float:
    """Return the loss at a cost, on straight lines between evaluations; at the ends, theirs."""
    index = bisect_right([reached for reached, _ in history], cost)
    if index == 0:
        return history[0][1]
    if index == len(history):
        return history[-1][1]
    (x0, y0), (x1, y1) = history[index - 1], history[index]
    return y0 + (y1 - y0) * (cost - x0) / (x1 - x0)
