"""A growth survives what happens to it: after every fault it ends in the same model."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from injection import BUG, DONE, KINDS, Kind, attempt, draw_fault, flip, hashes, short_plan

from nacre.growth.plan import Plan
from nacre.train.grow import grow
from nacre.train.verify import verify

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are injected into a forked process"),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
FAULTS = 3  # of each kind; benchmarks/faults.py makes hundreds


@pytest.fixture(scope="module")
def short() -> Plan:
    """The plan of every growth here."""
    return short_plan()


@pytest.fixture(scope="module")
def whole(short: Plan, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, str]]:
    """The hashes that a run without faults ends with."""
    out = tmp_path_factory.mktemp("faults") / "whole"
    grow(short, out)
    return hashes(out)


@pytest.mark.parametrize("kind", KINDS)
def test_after_faults_the_same_model(
    kind: Kind, short: Plan, whole: list[dict[str, str]], tmp_path: Path
) -> None:
    draw, out = random.Random(kind), tmp_path / "run"
    for _ in range(FAULTS):
        ended = attempt(short, out, draw_fault(draw, kind))
        assert ended != BUG
        if kind == "bit flip":
            flip(out, draw)
        if ended == DONE:
            break
    assert attempt(short, out, None) == DONE
    assert hashes(out) == whole
    assert [finding for finding in verify(out) if finding.wrong] == []
