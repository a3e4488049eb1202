"""One run in several processes: the same batches, the same losses, whatever is sharded."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from launching import launch

from nacre import processes
from nacre.errors import FirstFailed, NacreError
from nacre.growth import plan as plans
from nacre.growth.plan import Plan
from nacre.train import files
from nacre.train.grow import grow
from nacre.train.metrics import read_metrics
from nacre.train.observer import Observer
from nacre.train.verify import verify

pytestmark = [
    pytest.mark.skipif(not hasattr(os, "fork"), reason="the processes are forked"),
    pytest.mark.skipif(
        torch.cuda.is_available(), reason="CUDA survives no fork: hide it, CUDA_VISIBLE_DEVICES="
    ),
    pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning"),
]
TOLERANCE = 1e-4  # nats; sums of gradients in another order


def short(shard: str = "none") -> Plan:
    """Three short stages: plain, on a cached trunk, with adapters on it."""
    settings = ["training.precision=fp32", f"training.shard={shard}"]
    plan = plans.load("tiny", settings).model_dump(mode="json", by_alias=True)
    plan["training"] |= {"save_every": 2, "evaluate_every": 4, "validation_tokens": 1000}
    plan["data"]["order"] = "restart"
    for stage, own in zip(plan["stages"], ({}, {"trunk": "cache"}, {}), strict=True):
        stage |= {"tokens": 256 * 6, **own}
    return plans.parse(plan)


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run in one process that the others must equal."""
    out = tmp_path_factory.mktemp("processes") / "alone"
    grow(short(), out)
    return out


def losses(out: Path) -> list[float]:
    """Every training and held-out loss of a run, in order."""
    lines = read_metrics(out)
    return [m["loss"] if "loss" in m else m["validation"]["loss"] for m in lines]


def records(out: Path) -> list[dict[str, Any]]:
    return [files.read_record(stage) for stage in files.stages(out)]


@pytest.mark.parametrize(("count", "shard"), [(2, "none"), (4, "crown"), (2, "all")])
def test_the_losses_are_those_of_one_process(
    count: int, shard: str, alone: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    assert launch(count, lambda: grow(short(shard), out)) == [0] * count
    assert losses(out) == pytest.approx(losses(alone), abs=TOLERANCE)
    for ours, one in zip(records(out), records(alone), strict=True):
        assert ours["processes"] == count
        for name in ("tokens", "active_parameters", "trainable", "trunk_mode", "cursor"):
            assert ours[name] == one[name]
        assert ours["frozen"].keys() == one["frozen"].keys()
        assert ours["validation"]["loss"] == pytest.approx(one["validation"]["loss"], abs=TOLERANCE)
    assert [finding for finding in verify(out) if finding.wrong] == []


class Stops(Observer):
    """Ends its process as a failure would, after some steps of a stage."""

    def __init__(self, stage: int, step: int) -> None:
        self.at = (stage, step)

    def trained(self, step: dict[str, Any]) -> None:
        if (step["stage"], step["step"]) == self.at:
            os._exit(9)


@pytest.mark.parametrize(("before", "after", "stage"), [(2, 1, 1), (2, 4, 3), (1, 2, 2)])
def test_a_run_goes_on_with_another_number_of_processes(
    before: int, after: int, stage: int, alone: Path, tmp_path: Path
) -> None:
    out, plan = tmp_path / "run", short("all")
    ended = launch(before, lambda: grow(plan, out, observer=Stops(stage, 5)))
    assert ended[0] == 9
    assert len(files.stages(out)) == stage - 1
    assert launch(after, lambda: grow(None, out, resume=True)) == [0] * after
    assert losses(out) == pytest.approx(losses(alone), abs=TOLERANCE)
    steps = [(m["stage"], m["step"]) for m in read_metrics(out) if "lr" in m]
    assert steps == [(stage, step) for stage in (1, 2, 3) for step in range(1, 7)]


def test_what_the_first_process_says_ends_all(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "run"
    out.mkdir()
    (out / "thesis.tex").touch()

    def work() -> None:
        processes.on_main(lambda: grow_nothing())

    def grow_nothing() -> None:
        raise NacreError("nothing grows here")

    def connected(work: Callable[[], None]) -> None:
        from nacre.growth.plan import Training
        from nacre.train.device import accelerating

        with accelerating(Training(), 32):
            try:
                work()
            except FirstFailed:
                os._exit(3)
            except NacreError:
                os._exit(4)

    assert launch(2, lambda: connected(work)) == [4, 3]


def test_share_gives_every_process_as_many(tmp_path: Path) -> None:
    assert list(processes.share("abc")) == [("a", True), ("b", True), ("c", True)]

    def work() -> None:
        from nacre.growth.plan import Training
        from nacre.train.device import accelerating

        with accelerating(Training(), 32):
            mine = list(processes.share("abc"))
            other = (
                [("a", True), ("c", True)] if processes.is_main() else [("b", True), ("c", False)]
            )
            assert mine == other
            assert processes.total(1.5, 2, device=__import__("torch").device("cpu")) == [3.0, 4.0]
            assert processes.gather(processes.rank()) == [0, 1]

    assert launch(2, work) == [0, 0]
