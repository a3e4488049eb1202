"""One run on several hosts: the same losses, a host that dies is replaced, no wait without end."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
from hosts import Host, available, hosts

from nacre import config
from nacre.growth import plan as plans
from nacre.train.grow import grow
from nacre.train.metrics import read_metrics

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not available(), reason="needs root, iproute2 and network namespaces"),
]
STEPS = 150  # of each stage: long enough for a host to die in one
PATIENT = 240.0


@pytest.fixture(scope="module")
def plan_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two plain stages of many short steps."""
    plan = plans.load("tiny", ["training.precision=fp32"]).model_dump(mode="json", by_alias=True)
    plan["training"] |= {"save_every": 20, "evaluate_every": 100, "validation_tokens": 512}
    plan["stages"] = [{"add_blocks": 1, "tokens": 256 * STEPS} for _ in range(2)]
    path = tmp_path_factory.mktemp("hosts") / "plan.yaml"
    config.write_yaml(plans.parse(plan), path)
    return path


@pytest.fixture(scope="module")
def alone(plan_file: Path) -> list[float]:
    """The losses of the run in one process."""
    grow(plans.load(plan_file), plan_file.parent / "alone")
    return losses(plan_file.parent / "alone")


def losses(out: Path) -> list[float]:
    lines = read_metrics(out)
    return [m["loss"] if "loss" in m else m["validation"]["loss"] for m in lines]


def wait_for_step(out: Path, step: int) -> None:
    """Wait until a run has made some steps."""
    until = time.monotonic() + PATIENT
    while len(read_metrics(out)) < step:
        assert time.monotonic() < until, "the run did not begin"
        time.sleep(0.2)


def start(each: Host, plan_file: Path, out: Path, *more: str, restarts: int = 0):
    words = ["grow", str(plan_file), "--out", str(out), "--resume", "--quiet", "--track", "none"]
    return each.torchrun([*words, *more], out.parent / "log.txt", hosts=2, restarts=restarts)


def test_two_hosts_give_the_losses_of_one(
    plan_file: Path, alone: list[float], tmp_path: Path
) -> None:
    out = tmp_path / "run"
    with hosts(2) as network:
        started = [start(each, plan_file, out) for each in network]
        assert [each.wait(PATIENT) for each in started] == [0, 0], (
            tmp_path / "log.txt"
        ).read_text()
    assert losses(out) == pytest.approx(alone, abs=1e-3)


def test_a_host_that_dies_is_replaced(plan_file: Path, alone: list[float], tmp_path: Path) -> None:
    out = tmp_path / "run"
    with hosts(3) as (first, dying, fresh):
        lasting = start(first, plan_file, out, restarts=3)
        start(dying, plan_file, out, restarts=3)
        wait_for_step(out, 50)
        dying.dies()
        replaced = start(fresh, plan_file, out, restarts=3)
        ended = [each.wait(PATIENT) for each in (lasting, replaced)]
        assert ended == [0, 0], (tmp_path / "log.txt").read_text()
    assert losses(out) == pytest.approx(alone, abs=1e-3)
    steps = [(m["stage"], m["step"]) for m in read_metrics(out) if "lr" in m]
    assert steps == [(stage, step) for stage in (1, 2) for step in range(1, STEPS + 1)]


def test_a_host_that_is_cut_off_ends_in_a_message(plan_file: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    with hosts(2) as (first, lost):
        started = [start(each, plan_file, out, "--timeout", "5") for each in (first, lost)]
        wait_for_step(out, 50)
        lost.is_cut_off()
        assert started[0].wait(60) != 0
    said = (tmp_path / "log.txt").read_text()
    assert "the other processes of the run died or do not answer" in said
    assert f"continue with nacre grow --resume --out {out}" in said
