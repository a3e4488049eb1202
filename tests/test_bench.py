"""`nacre bench`: arithmetic of rows, order and budget of comparisons, memory, suites, command."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import operator
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from conftest import Command
from rich.console import Console

from nacre import bench
from nacre.bench import (
    depth,
    evaluation,
    gpu,
    growth,
    head,
    measure,
    paper,
    stages,
    substrate,
    tokenizer,
)
from nacre.bench.depth import Cost
from nacre.bench.measure import QUICK, Row, Sample, Target, compare, fresh_process, peak_memory
from nacre.bench.stages import Shape, Steps
from nacre.bench.table import HEADS, cells, table, value
from nacre.bench.trainer import TrainerSteps, arguments
from nacre.errors import ConfigError
from nacre.growth import budget, plan
from nacre.models import stock

MEGABYTE = 1 << 20


class Clock:
    """A clock that only moves when a candidate says how long it worked."""

    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now

    def work(self, name: str, seconds: Iterator[float], calls: list[str]) -> Callable[[], None]:
        def run() -> None:
            calls.append(name)
            self.now += next(seconds)

        return run


def row(**changed: object) -> Row:
    values = {
        "suite": "s", "case": "c", "unit": "s", "better": "lower", "measured": 2.0, **changed,
    }  # fmt: skip
    return Row(**values)  # pyright: ignore[reportArgumentType]


def test_ratio_says_how_many_times_better_in_both_directions() -> None:
    assert row(peer=6.0).ratio == 3.0
    assert row(peer=6.0, better="higher").ratio == pytest.approx(1 / 3)
    assert row(limit=0.5).limit_ratio == 4.0
    assert row(limit=8.0, better="higher").limit_ratio == 4.0
    assert row().ratio is None
    assert row().limit_ratio is None


@pytest.mark.parametrize(
    ("target", "changed", "met"),
    [
        (None, {}, None),
        (Target("measured", 2.0), {}, True),
        (Target("measured", 1.9), {}, False),
        (Target("measured", 2.0), {"better": "higher"}, True),
        (Target("measured", 2.1), {"better": "higher"}, False),
        (Target("ratio", 3.0), {"peer": 6.0}, True),
        (Target("ratio", 3.1), {"peer": 6.0}, False),
        (Target("ratio", 0.25), {"peer": 6.0, "better": "higher"}, True),
        (Target("ratio", 3.0), {}, None),
        (Target("peer", 1.25), {"peer": 1.6}, True),
        (Target("peer", 1.24), {"peer": 1.6}, False),
        (Target("peer", 1.25), {"peer": 2.5, "better": "higher"}, True),
        (Target("peer", 1.24), {"peer": 2.5, "better": "higher"}, False),
        (Target("peer", 2.0), {}, None),
        (Target("limit", 4.0), {"limit": 0.5}, True),
        (Target("limit", 3.9), {"limit": 0.5}, False),
        (Target("limit", 4.0), {"limit": 8.0, "better": "higher"}, True),
        (Target("limit", 4.0), {}, None),
    ],
)
def test_met(target: Target | None, changed: dict[str, object], met: bool | None) -> None:
    assert row(target=target, **changed).met is met


def test_a_record_is_plain_and_carries_the_verdict() -> None:
    record = row(peer=6.0, limit=1.0, target=Target("ratio", 3.0)).record()
    assert json.loads(json.dumps(record)) == record
    assert (record["ratio"], record["limit_ratio"], record["met"]) == (3.0, 2.0, True)
    assert record["target"] == {"of": "ratio", "value": 3.0}


def test_median_spread_and_rate() -> None:
    sample = Sample((4.0, 1.0, 2.0, 3.0, 100.0))
    assert sample.median == 3.0
    assert sample.spread == 1.0, "quartiles 2 and 4; the outlier does not count"
    assert Sample((5.0,)).spread == 0.0
    assert Sample((1.0, 2.0, 4.0)).per(8.0) == Sample((8.0, 4.0, 2.0))


def test_candidates_take_turns_and_the_warm_up_does_not_count() -> None:
    clock, calls = Clock(), []
    work = {
        "a": clock.work("a", iter([50.0, 1.0, 2.0, 3.0, 4.0]), calls),
        "b": clock.work("b", iter([60.0, 10.0, 10.0, 10.0, 10.0]), calls),
    }
    found = compare(work, 4, 1000.0, clock=clock)
    assert calls == ["a", "b"] * 5
    assert found == {"a": Sample((1.0, 2.0, 3.0, 4.0)), "b": Sample((10.0,) * 4)}


@pytest.mark.parametrize(
    ("budget", "rounds"), [(7.9, 3), (8.0, 3), (8.1, 4), (10.1, 5), (1000.0, 6)]
)
def test_the_budget_ends_it_after_three_rounds_at_the_earliest(budget: float, rounds: int) -> None:
    clock, calls = Clock(), []
    work = {name: clock.work(name, iter([1.0] * 9), calls) for name in "ab"}
    found = compare(work, 6, budget, clock=clock)
    assert [len(sample.values) for sample in found.values()] == [rounds, rounds]


def test_a_hopeless_candidate_is_called_once() -> None:
    clock, calls = Clock(), []
    work = {
        "slow": clock.work("slow", iter([90.0]), calls),
        "fast": clock.work("fast", iter([1.0] * 9), calls),
    }
    found = compare(work, 5, 30.0, clock=clock)
    assert calls == ["slow", "fast", "fast", "fast", "fast"]
    assert found == {"slow": Sample((90.0,)), "fast": Sample((1.0,) * 3)}


def test_matrix_rate_counts_two_flops_a_multiplication(monkeypatch: pytest.MonkeyPatch) -> None:
    products: list[tuple[int, ...]] = []
    clock = Clock()
    real = torch.mm

    def counted(left: torch.Tensor, right: torch.Tensor, *, out: torch.Tensor) -> torch.Tensor:
        products.append((*left.shape, right.shape[1]))
        clock.now += 0.02
        return real(left, right, out=out)

    monkeypatch.setattr(torch, "mm", counted)
    rate = measure.matrix_rate(torch.float32, 3, 5, 7, clock=clock)
    assert rate == pytest.approx(2 * 3 * 5 * 7 / 0.02)
    assert set(products) == {(3, 5, 7)}


def test_matrix_rate_of_this_machine_is_believable() -> None:
    assert 1e6 < measure.matrix_rate(torch.float32, 128, 128, 128) < 1e16


def test_peak_memory_sees_what_a_call_takes_and_gives_back() -> None:
    peak = peak_memory(functools.partial, operator.mul, b"1", 64 * MEGABYTE)
    assert 62 * MEGABYTE < peak < 80 * MEGABYTE


def test_a_fresh_process_has_its_environment_and_passes_errors_on() -> None:
    assert (
        fresh_process(os.getenv, "RAYON_NUM_THREADS", environment={"RAYON_NUM_THREADS": "7"}) == "7"
    )
    assert fresh_process(os.getpid) != os.getpid()
    with pytest.raises(ValueError, match="invalid literal"):
        fresh_process(int, "no number")


@pytest.mark.parametrize("name", head.candidates("cpu"))
def test_every_loss_of_the_head_suite_is_the_same_function(name: str) -> None:
    shape = (700, 16, 300)
    found = head.step(name, shape, "cpu")()
    assert found == pytest.approx(head.reference(shape, "cpu"), abs=1e-2)
    h, weight, targets = head.inputs(shape, "cpu")
    plain = torch.nn.functional.cross_entropy(h @ weight.T, targets)
    assert head.reference(shape, "cpu") == pytest.approx(plain.item(), rel=1e-6)


def test_the_substrate_vocabulary_has_the_size_asked_for_and_no_token_twice() -> None:
    for size in (100, 65_536):
        tokens = substrate.vocabulary(size)
        assert len(set(tokens)) == len(tokens) == size
        assert {len(token) for token in tokens} == {1, 2}
    assert tokens[:3] == ["\0", "\1", "\2"]
    assert "水" in tokens


def test_the_three_tokenizers_have_one_size_and_keep_the_text() -> None:
    text = "Sense and sensibility, the truth and 12 houses.\n" * 200 + "".join(
        map(chr, range(33, 127))
    )
    found = tokenizer.learn([text], 512)
    assert found["nacre"].get_vocab_size() <= 512
    ids = found["bare"].encode(text).ids
    assert "".join(map(found["bare"].id_to_token, ids)) == text
    assert any(" " in found["bare"].id_to_token(i)[1:] for i in ids), "merges cross words"
    assert not any(
        " " in found["nacre"].id_to_token(i)[1:] for i in found["nacre"].encode(text).ids
    )


@pytest.mark.parametrize("name", bench.SUITES)
def test_quick_suites_give_finite_rows_without_a_verdict(name: str) -> None:
    said: list[tuple[str, str]] = []
    results = bench.run([name], quick=True, progress=lambda *at: said.append(at))
    rows = results.suites[name]
    assert rows
    assert {suite for suite, _ in said} == {name}
    for found in rows:
        assert found.suite == name
        assert found.target is found.met is None
        numbers = [found.peer, found.limit]
        assert all(math.isfinite(n) and n > 0 for n in numbers if n is not None)
        assert math.isfinite(found.measured)
        assert found.measured > 0 or found.unit == "nats"
        assert 0 <= found.spread < math.inf
    assert results.seconds[name] > 0


def test_evaluation_asks_as_the_benchmarks_do_and_leaves_out_what_it_lacks(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    words = [f"w{number}" for number in range(50)]
    kind = evaluation.Kind("commonsense_qa", words=10, options=5, option_words=2)
    asked = evaluation.requests(kind, 2, words)
    assert [(i.args[0].split("\n")[0], i.args[1], i.idx) for i in asked[:2]] == [
        ("Question: w0 w1 w2 w3 w4", " A", 0), ("Question: w0 w1 w2 w3 w4", " B", 1),
    ]  # fmt: skip
    assert len(asked) == 10
    lengths = [len(i.args[0].split("\n")[0].split()) for i in asked[::5]]
    assert lengths == [6, 10], "the word before them, and lengths vary"
    said: list[str] = []
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    assert list(evaluation.suite(dataclasses.replace(QUICK, say=said.append))) == []
    assert said == ["left out: it needs lm-eval (in a clone of nacre: pip install -e '.[eval]')"]


SHAPE = Shape(width=32, depth=3, top=1, vocabulary=512, tokens=128, context=32)
BLOCK = 4 * 32 * 32 + 3 * 32 * 128 + 2 * 32
HEAD = 512 * 32


def test_flops_of_a_stage_by_hand() -> None:
    forward = 2 * BLOCK + 2 * 32 * 32
    crown = 3 * (forward + 2 * HEAD)
    assert stages.flops(SHAPE.stage("cache"), trunk_runs=False) == crown
    assert stages.flops(SHAPE.stage("recompute"), trunk_runs=True) == crown + 2 * forward
    assert stages.flops(SHAPE.whole(), trunk_runs=False) == 3 * (3 * forward + 2 * HEAD)


def test_flops_of_the_paper_count_six_trunk_blocks_and_three_new_ones() -> None:
    loaded = plan.load(paper.RECIPE)
    found = stages.flops(loaded, trunk_runs=True)
    block, head_, attention = 12_592_128, 65_536 * 1024, 2 * 1024 * 1024
    assert found == 6 * (3 * block + head_) + 2 * 6 * block + (6 + 9) * attention


@pytest.fixture
def steps(tmp_path: Path) -> Iterator[Callable[[str], Steps]]:
    """Open the last stage of SHAPE in a trunk mode, on one corpus."""
    stages.reset()
    store = stages.random_store(tmp_path / "data", 512, 32, windows=8)
    accelerator = stages.make_accelerator(SHAPE.whole(), "cpu")
    opened: list[Steps] = []

    def open_(mode: str) -> Steps:
        opened.append(Steps(SHAPE.stage(mode), store, tmp_path / mode, accelerator))
        return opened[-1]

    yield open_
    for one in opened:
        one.close()
    stages.reset()


def test_measured_steps_are_those_of_the_engine(steps: Callable[[str], Steps]) -> None:
    cached, recomputed = steps("cache"), steps("recompute")
    assert cached.record["mode"] == "cache"
    assert recomputed.record["mode"] == "recompute"
    assert [cached() for _ in range(5)] == [recomputed() for _ in range(5)]
    parts = stock.find_parts(cached.run.model)
    assert all(p.is_meta for block in parts.blocks[:2] for p in block.parameters())
    trained = {name.split(".layers.")[-1].split(".")[0] for name in cached.run.trained_weights()}
    assert trained == {"2", "model", "lm_head"}, "the newest block, the final norm, the head"


def test_a_trainer_takes_one_step_a_call_and_spares_what_is_frozen(tmp_path: Path) -> None:
    stages.reset()
    model = stock.build(budget.model_config(SHAPE.whole(), 512, 3))
    stock.lower(model, 2).requires_grad_(False)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    windows = torch.arange(8 * 32).view(8, 32) % 512
    one = TrainerSteps(model, arguments(tmp_path, 4, "cpu", steps=100), windows)
    for count in (1, 2, 3):
        one()
        assert one.trainer.state.global_step == count
    one.close()
    assert not one.thread.is_alive()
    assert one.trainer.state.global_step == 3, "closing trains no more"
    moved = {name for name, tensor in model.state_dict().items() if not tensor.equal(before[name])}
    assert all(name.startswith(("model.layers.2.", "model.norm", "lm_head")) for name in moved)
    assert len(moved) == 11
    stages.reset()


def test_what_a_trainer_raises_is_raised(tmp_path: Path) -> None:
    stages.reset()
    model = stock.build(budget.model_config(SHAPE.whole(), 512, 1))
    one = TrainerSteps(model, arguments(tmp_path, 4, "cpu", steps=9), torch.full((8, 32), 9999))
    with pytest.raises(IndexError):
        one()
    one.close()
    stages.reset()


def test_depth_judges_the_deepest_cached_trunk_alone() -> None:
    costs = {
        2: [Cost((1.0, 1.2, 1.1), 100, 10), Cost((1.0,), 140, 30)],
        24: [Cost((1.1,), 120, 20), Cost((1.1,), 130, 20)],
    }
    seconds, deep_seconds, peak, deep_peak = depth._rows("cache", costs, "cpu")
    assert (seconds.measured, deep_seconds.measured) == (1.05, 1.1)
    assert (peak.measured, deep_peak.measured) == (120, 125)
    assert seconds.target is peak.target is None
    assert deep_seconds.met is True, "1.1 over 1.05 is below 1.05x"
    assert deep_peak.peer == 120
    slow = {2: [Cost((1.0,), 100, 0)], 24: [Cost((1.06,), 105, 0)]}
    assert [row.met for row in depth._rows("cache", slow, "cpu")] == [None, False, None, True]
    assert not any(row.target for row in depth._rows("recompute", slow, "cpu"))


def test_flops_of_a_growth_with_and_without_cache(tmp_path: Path) -> None:
    shape = growth.TINY
    forward = 2 * (4 * 32 * 32 + 3 * 32 * 128 + 2 * 32) + 2 * 32 * 32
    crown, tokens = 3 * (forward + 2 * 512 * 32), shape.steps * shape.batch
    made = {"windows": 5, "from_depth": 0}
    first = {"tokens": tokens, "trunk": {"mode": "recompute"}}
    for mode, trunk, expected in (
        ("recompute", {"mode": "recompute"}, (2 * crown + forward) * tokens),
        ("cache", {"mode": "cache", "cache": made}, 2 * crown * tokens + forward * 5 * 32),
    ):
        arm = growth.Arm(1.0, (), [first, {"tokens": tokens, "trunk": trunk}])
        planned = growth.planned(shape, tmp_path, mode)
        assert growth.flops(shape, planned, arm) == expected


def test_gpu_suites_write_json(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "gpu.json"
    assert gpu.main([str(out), "--quick", "head", "substrate"]) == 0
    assert "head: 64 x 16 x 512, time" in capsys.readouterr().out
    found = json.loads(out.read_text())
    assert set(found) == {"machine", "date", "quick", "suites", "seconds"}
    assert list(found["suites"]) == list(found["seconds"]) == ["head", "substrate"]


def test_gpu_script_runs_from_anywhere_without_an_installation(tmp_path: Path) -> None:
    script = Path(__file__).parents[1] / "benchmarks" / "gpu.sh"
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$PWD" "$PYTHONPATH" "$@"\n')
    python.chmod(0o755)
    environment = {"PATH": os.environ["PATH"], "OUT": "out", "PYTHON": str(python)}
    command = [str(script), "--quick", "head"]
    said = subprocess.run(
        command, env=environment, cwd=tmp_path, check=True, capture_output=True, text=True
    ).stdout.split()
    root = str(script.parents[1])
    assert said[:4] == [root, f"{root}/src", "-m", "nacre.bench.gpu"]
    assert said[4:] == [str(tmp_path / "out" / "gpu.json"), "--quick", "head"]
    assert (tmp_path / "out").is_dir()


def test_gpu_says_in_one_line_what_is_not_installed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(gpu, "NEEDED", ("torch", "no_such_a", "no_such_b"))
    assert gpu.main([str(tmp_path / "gpu.json")]) == 1
    assert capsys.readouterr().err == "not installed: no_such_a, no_such_b\n"


def test_both_sides_of_generate_write_the_same_text() -> None:
    (found,) = bench.run(["generate"], quick=True).suites["generate"]
    assert found.note == "both wrote the same text"


def test_unknown_suites_come_in_one_message() -> None:
    with pytest.raises(ConfigError) as error:
        bench.run(["haed", "head", "zzz"])
    assert "unknown suite 'haed' (did you mean 'head'?)" in str(error.value)
    assert f"unknown suite 'zzz' (known: {', '.join(bench.SUITES)})" in str(error.value)


def test_named_suites_run_once_and_none_means_all() -> None:
    assert bench.check(["generate", "head", "generate"]) == ["generate", "head"]
    assert bench.check([]) == list(bench.SUITES)


@pytest.mark.parametrize(
    ("number", "unit", "text"),
    [
        (2.5e-5, "s", "25 µs"), (0.0123, "s", "12.3 ms"), (1.7, "s", "1.7 s"),
        (123.4, "s", "123 s"), (5e5, "B", "0.50 MB"), (2.1e9, "B", "2.10 GB"),
        (8.04, "MB/s", "8.04 MB/s"), (1234.5, "tokens/s", "1,234 tokens/s"),
    ],
)  # fmt: skip
def test_values(number: float, unit: str, text: str) -> None:
    assert value(number, unit) == text


def test_a_table_says_peer_limit_target_and_verdict() -> None:
    full = row(
        spread=0.1, peer=6.0, peer_name="other", limit=0.5, limit_name="sum",
        target=Target("ratio", 5.0), note="a note",
    )  # fmt: skip
    assert dict(zip(HEADS, cells(full), strict=True)) == {
        "case": "c", "measured": "2 s ±5%", "peer": "6 s other", "limit": "4.00x",
        "ratio": "3.00x", "target": ">= 5x missed",
    }  # fmt: skip
    assert cells(row(target=Target("measured", 2.0)))[-1] == "<= 2 s met"
    assert cells(row(better="higher", target=Target("measured", 9.0)))[-1] == ">= 9 s missed"
    assert cells(row(peer=2.0, target=Target("peer", 1.05)))[-1] == "<= 1.05x peer met"
    assert cells(row(limit=1.0, target=Target("limit", 2.0)))[-1] == "<= 2x limit met"
    console = Console(width=120)
    with console.capture() as seen:
        console.print(table("head", [full], 3.0))
    assert seen.get().startswith("head (3 s)")
    assert "limit in s: sum" in seen.get()
    assert "a note" in seen.get()


def test_command_lists_the_suites(command: Command) -> None:
    code, out, _ = command("bench", "--list")
    assert code == 0
    assert [line.split()[0] for line in out.splitlines()] == list(bench.SUITES)
    code, out, _ = command("bench", "--list", "--json")
    assert list(json.loads(out)) == list(bench.SUITES)


def test_command_prints_json_and_writes_the_same(command: Command, tmp_path: Path) -> None:
    code, out, err = command(
        "bench", "substrate", "--quick", "--json", "--out", tmp_path / "bench.json"
    )
    assert code == 0
    found = json.loads(out)
    assert set(found) == {"machine", "date", "quick", "suites", "seconds"}
    assert found["quick"] is True
    assert found["machine"]["device"]
    (line,) = found["suites"]["substrate"]
    assert line["measured"] > 0
    assert line["unit"] == "s"
    assert line["met"] is None
    assert "substrate: 256 tokens x 64" in err
    assert json.loads((tmp_path / "bench.json").read_text()) == found
    assert [path.name for path in tmp_path.iterdir()] == ["bench.json"]


def test_command_prints_a_table(command: Command) -> None:
    code, out, _ = command("bench", "--quick", "substrate")
    assert code == 0
    assert out.startswith("substrate (")
    for head_ in HEADS:
        assert head_ in out
    assert "256 tokens x 64" in out


def test_command_refuses_before_it_measures(command: Command, tmp_path: Path) -> None:
    code, out, err = command("bench", "tokeniser", "--quick")
    assert code == 2
    assert out == ""
    assert "SUITE: unknown suite 'tokeniser' (did you mean 'tokenizer'?)" in err
    code, _, err = command("bench", "head", "--out", tmp_path / "none" / "bench.json")
    assert code == 2
    assert f"--out: there is no folder {tmp_path / 'none'}" in err
    code, _, err = command("bench", "head", "--out", tmp_path)
    assert code == 2
    assert f"--out: {tmp_path} is a folder" in err
