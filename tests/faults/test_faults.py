"""A growth survives what happens to it: after every fault it ends in the same model and metrics."""

from __future__ import annotations

import os
import random
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from injection import (
    BUG,
    DONE,
    FLIPPED,
    MENDABLE,
    REGIONS,
    SAVE_EVERY,
    Attempt,
    Fault,
    Kind,
    attempt,
    draw_fault,
    flip,
    places,
    redone,
    result,
    short_plan,
)  # fmt: skip

from nacre.growth.plan import Plan
from nacre.train import files
from nacre.train.verify import verify

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="faults are injected into a forked process"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="CUDA survives no fork: hide it, CUDA_VISIBLE_DEVICES="
    ),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]


@dataclass(frozen=True)
class Whole:
    """A growth that nothing happened to: its plan, how it went, what it ended in."""

    plan: Plan
    went: Attempt
    seconds: float
    result: dict[str, Any]
    modes: list[str]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Whole:
    place = tmp_path_factory.mktemp("faults")
    plan, started = short_plan(place), time.perf_counter()
    went = attempt(plan, place / "whole", None)
    assert went.code == DONE, went.said
    seconds = time.perf_counter() - started
    return Whole(plan, went, seconds, result(place / "whole"), modes(place / "whole"))


def modes(out: Path) -> list[str]:
    """Return how every stage's trunk ran: one is chosen by measuring."""
    records = [files.read_record(stage) for stage in files.stages(out)]
    return [record["trunk_mode"] for record in records]


def check(whole: Whole, out: Path) -> None:
    ended = attempt(whole.plan, out, None)
    assert ended.code == DONE, ended.said
    assert result(out) == whole.result
    assert [finding for finding in verify(out) if finding.wrong] == []


@pytest.mark.parametrize("region", REGIONS)
def test_after_faults_in_a_region_the_same_model(region: str, whole: Whole, tmp_path: Path) -> None:
    draw, out = random.Random(region), tmp_path / "run"
    kinds: list[Kind] = ["kill", "short write", draw.choice(["ENOSPC", "EIO"])]
    reached: tuple[int, int] | None = None
    for kind in kinds:
        if region not in places(kind, whole.went):
            continue
        fault = draw_fault(draw, kind, region, whole.went, whole.seconds)
        ended = attempt(whole.plan, out, fault)
        assert ended.code != BUG, ended.said
        assert ended.came or ended.code == DONE, ended.said
        assert ended.came or kind != "kill" or modes(out) != whole.modes, "the region was reached"
        if ended.steps:
            assert reached is None or redone(reached, ended.steps[0]) <= SAVE_EVERY
            reached = ended.steps[-1]
        if ended.code == DONE:
            break
    check(whole, out)


def test_after_kills_at_random_times_the_same_model(whole: Whole, tmp_path: Path) -> None:
    draw, out = random.Random(0), tmp_path / "run"
    for _ in range(3):
        fault = Fault("kill at a random time", seconds=draw.uniform(0, whole.seconds))
        assert attempt(whole.plan, out, fault).code in (DONE, -9)
    check(whole, out)


@pytest.mark.parametrize("what", FLIPPED)
def test_after_flipped_bits_the_same_model_or_a_refusal(
    what: str, whole: Whole, tmp_path: Path
) -> None:
    draw, out = random.Random(what), tmp_path / "run"
    # In the second stage, whose trunk is cached, after its first two saved states.
    lines = int(0.37 * whole.went.counts["a step"]["lines"])
    assert attempt(whole.plan, out, Fault("kill", "a step", lines)).came
    for _ in range(4):
        flipped = flip(out, what, draw)
        assert flipped is not None
        found = [finding for finding in verify(out) if finding.wrong]
        # Killed as soon as the step is reached, to flip another bit in the same place.
        ended = attempt(whole.plan, out, Fault("kill", "a step", 1))
        assert ended.came or (ended.code == MENDABLE and found), ended.said
        if not ended.came:
            path, held = flipped
            path.write_bytes(held)
    check(whole, out)
