"""Which mode a trunk takes: pure arithmetic, and a measurement that leaves nothing behind."""

from __future__ import annotations

from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from conftest import Build
from hypothesis import given
from hypothesis import strategies as st

from nacre.growth import choice
from nacre.growth.cache import Identity
from nacre.growth.choice import Choice, Rates, Reader, choose, seconds
from nacre.growth.trunk import RecomputedTrunk

GB = 10**9
RATES = st.builds(Rates, *[st.floats(1e-6, 1.0)] * 3)


@st.composite
def readers(draw: st.DrawFn) -> list[Reader]:
    """Stages on growing trunks, each of which can go on from the cache of the one before."""
    found: list[Reader] = []
    below, depth = 0, draw(st.integers(1, 12))
    for _ in range(draw(st.integers(1, 5))):
        records = draw(st.integers(1, 5000))
        passes = records * draw(st.integers(1, 6)) + draw(st.integers(0, 100))
        found.append(Reader(depth, passes, records, cached_below=below))
        below, depth = depth, depth + draw(st.integers(1, 4))
    return found


def never() -> Rates:
    raise AssertionError("nothing is to be measured")


def test_seconds_of_a_known_case() -> None:
    rates = Rates(block=2.0, write=3.0, read=5.0)
    stages = [Reader(4, passes=30, records=10), Reader(6, 30, 10, cached_below=4)]
    recompute, cache = seconds(stages, rates)
    assert recompute == 30 * 4 * 2 + 30 * 6 * 2
    first = 10 * (4 * 2 + 3) + 30 * 5
    second = 10 * (2 * 2 + 3 + 5) + 30 * 5  # two new blocks, on what is read from below
    assert cache == first + second


@given(readers(), RATES)
def test_stages_cost_what_they_cost_alone_in_any_order(stages: list[Reader], rates: Rates) -> None:
    alone = [seconds([stage], rates) for stage in stages]
    assert seconds(stages, rates) == pytest.approx(tuple(map(sum, zip(*alone, strict=True))))
    assert seconds(stages[::-1], rates) == pytest.approx(seconds(stages, rates))


@given(readers(), RATES)
def test_the_cached_cost_has_each_block_once_per_record(stages: list[Reader], rates: Rates) -> None:
    same = [replace(stage, passes=100, records=50) for stage in stages]
    _, cache = seconds(same, replace(rates, write=0.0, read=0.0))
    assert cache == pytest.approx(50 * same[-1].depth * rates.block)


@given(readers(), RATES)
def test_the_cheaper_mode_is_taken(stages: list[Reader], rates: Rates) -> None:
    chosen = choose(stages, GB, GB, lambda: rates, rereads=True)
    if chosen.measured is None:
        assert chosen.mode == "recompute"
        assert len(stages) == 1
        return
    recompute, cache = seconds(stages, rates)
    assert chosen.mode == ("cache" if cache < recompute else "recompute")
    assert chosen.measured == asdict(rates) | {
        "recompute_seconds": recompute,
        "cache_seconds": cache,
    }


def test_both_modes_are_reachable_and_say_both_times() -> None:
    stages = [Reader(8, 1000, 100), Reader(10, 1000, 100, cached_below=8)]
    cheap = choose(stages, 1, 1, lambda: Rates(block=1e-3, write=1e-4, read=1e-5), rereads=True)
    dear = choose(stages, 1, 1, lambda: Rates(block=1e-5, write=1e-2, read=1e-3), rereads=True)
    assert (cheap.mode, dear.mode) == ("cache", "recompute")
    assert "this stage and 1 after it" in cheap.reason
    assert "18.0 s run for every batch, 1.0 s cached" in cheap.reason


def test_text_read_once_by_one_stage_is_not_measured() -> None:
    alone = Reader(8, passes=100, records=100)
    chosen = choose([alone], 1, GB, never, rereads=False)
    assert chosen == Choice(
        "recompute", "every window is read once, and by this stage alone", measured=None
    )
    cheap = Rates(block=1.0, write=1e-3, read=1e-3)
    assert choose(
        [alone, Reader(9, 100, 100, cached_below=8)], 1, GB, lambda: cheap, rereads=False
    ).measured
    below = replace(alone, cached_below=6)
    assert choose([below], 1, GB, lambda: cheap, rereads=False).mode == "cache"
    assert choose([alone], 1, GB, lambda: cheap, rereads=True).measured


def test_a_cache_over_budget_is_not_measured() -> None:
    twice = Reader(8, passes=200, records=100)
    chosen = choose([twice], 3 * GB // 2 + 1, 3 * GB // 2, never, rereads=True)
    assert chosen.mode == "recompute"
    assert "would take 1.5GB, 1.5GB are allowed" in chosen.reason
    assert choose([twice], GB, GB, lambda: Rates(1.0, 1e-3, 1e-3), rereads=True).mode == "cache"


@pytest.mark.parametrize(
    ("count", "text"), [(0, "0B"), (204_800, "204.8KB"), (20 * GB, "20.0GB"), (3 * 10**12, "3.0TB")]
)
def test_sizes_are_written_as_plans_write_them(count: int, text: str) -> None:
    assert choice.size(count) == text


@pytest.mark.parametrize("dtype", ["fp32", "fp8"])
def test_measuring_gives_rates_and_leaves_nothing(pico: Build, tmp_path: Path, dtype: str) -> None:
    trunk = RecomputedTrunk(pico("llama", depth=2), 2)
    identity = Identity(
        trunk="t", depth=2, corpus="c", order="o", windows=1000, context=8, width=32, dtype=dtype
    )  # type: ignore[arg-type]
    ids = torch.randint(0, 64, (4, 8))
    folder = tmp_path / "cache"
    rates = choice.measure(trunk, ids, identity, folder)
    assert min(rates.block, rates.write, rates.read) > 0
    assert max(rates.block, rates.write, rates.read) < 60
    assert list(folder.iterdir()) == []


def test_a_measurement_that_fails_leaves_nothing(pico: Build, tmp_path: Path) -> None:
    model = pico("llama", depth=1)
    model.get_input_embeddings().weight.data.fill_(torch.nan)
    identity = Identity(
        trunk="t", depth=1, corpus="c", order="o", windows=9, context=8, width=32, dtype="fp32"
    )
    with pytest.raises(ValueError, match="not finite"):
        choice.measure(RecomputedTrunk(model, 1), torch.zeros(2, 8).long(), identity, tmp_path)
    assert list(tmp_path.iterdir()) == []
