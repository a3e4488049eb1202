"""When a stage has trained long enough: what going on is foretold to gain, and a new stage."""

from __future__ import annotations

import math

import pytest

from nacre.growth.stopping import FRESH, has_trained_enough, loss_at, new_stage_gain

START = (0.0, 8.0)


def curve(loss: list[float]) -> list[tuple[float, float]]:
    """Return a history: the start, then a loss a second."""
    return [START, *((float(second), value) for second, value in enumerate(loss, 1))]


def test_between_evaluations_a_loss_lies_on_a_line() -> None:
    history = curve([6.0, 5.0])
    assert [loss_at(history, s) for s in (0.0, 0.5, 1.0, 1.75, 2.0, 9.0)] == [8, 7, 6, 5.25, 5, 5]


def test_a_first_stage_goes_on_while_each_doubling_gains_as_much() -> None:
    steady = curve([6 - math.log2(second) for second in range(1, 9)])
    assert not has_trained_enough(steady, None)


def test_a_first_stage_ends_when_a_doubling_gains_less_than_a_new_stage_would() -> None:
    flat = curve([6.0, 5.0, 4.8, 4.6, 4.58, 4.56, 4.54, 4.52])
    older, last = 5.0 - 4.6, 4.6 - 4.52
    assert last * last / older < FRESH * last
    assert has_trained_enough(flat, None)


def test_a_stage_that_no_longer_gains_ends() -> None:
    assert has_trained_enough(curve([6.0, 5.0, 5.1, 5.0, 5.0, 5.0, 5.0, 5.01]), None)


@pytest.mark.parametrize("evaluations", range(4))
def test_four_evaluations_are_needed(evaluations: int) -> None:
    assert not has_trained_enough(curve([6.0] * evaluations), None)
    assert not has_trained_enough([], None)


def test_a_stage_on_a_trunk_is_compared_with_the_one_below() -> None:
    below = [(0.0, 5.0), (1.0, 4.6), (2.0, 4.5), (4.0, 4.4)]
    history = [(0.0, 4.4), (1.0, 4.2), (2.0, 4.15), (3.0, 4.12), (4.0, 4.1)]
    assert new_stage_gain(history, below) == pytest.approx(0.3 * 0.3 / 0.6)
    assert new_stage_gain(history, []) == pytest.approx(FRESH * 0.3)
    assert has_trained_enough(history, below), "0.05 * 0.05 / 0.05 is less than 0.15"
    hopeless = [(0.0, 9.0), (4.0, 1.0)]
    assert new_stage_gain(history, hopeless) == pytest.approx(0.3 * 0.3 / 8)
    assert not has_trained_enough(history, hopeless)


def test_a_stage_that_gained_more_than_the_one_below_foretells_its_own_gain() -> None:
    below, history = [(0.0, 5.0), (4.0, 4.9)], [(0.0, 4.9), (4.0, 4.5)]
    assert new_stage_gain(history, below) == pytest.approx(0.4)
    assert new_stage_gain(history, [(0.0, 5.0), (4.0, 5.1)]) == pytest.approx(0.4)
