"""Stored trunk outputs: what training reads is what the trunk computes, however it was made."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import Build
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.modules.module import register_module_forward_hook
from transformers import PreTrainedModel, PreTrainedTokenizerFast
from transformers.models.llama.modeling_llama import LlamaDecoderLayer

from nacre.data import Loader, TokenStore, tokenize
from nacre.errors import CheckpointError
from nacre.growth import outputs
from nacre.growth.cache import Dtype
from nacre.growth.outputs import Below, Identities, Outputs, Reading, numbered
from nacre.growth.trunk import RecomputedTrunk

CONTEXT, BATCH, WIDTH = 8, 5, 32
CPU = torch.device("cpu")
NAMES = {1: "one block", 2: "two blocks"}
"""Stands for the fingerprint of the trunk's first blocks."""


def make_store(folder: Path, seed: int) -> TokenStore:
    """Store documents of the token ids 1 to 63; 0 ends each."""
    ids = {str(number): number for number in range(64)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="0")
    folder.mkdir()
    draw = random.Random(seed)
    rows = [
        json.dumps({"text": " ".join(str(draw.randrange(1, 64)) for _ in range(9))})
        for _ in range(30)
    ]
    (folder / "in.jsonl").write_text("\n".join(rows))
    return tokenize([str(folder / "in.jsonl")], tokenizer, folder / "store", holdout=0.25)


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data") / "a", seed=1)


@pytest.fixture(scope="module")
def other_store(tmp_path_factory: pytest.TempPathFactory) -> TokenStore:
    return make_store(tmp_path_factory.mktemp("data") / "b", seed=2)


def reading(store: TokenStore, first: int = 0, count: int = 40, **changes: Any) -> Reading:
    """What a stage reads; 40 windows are one epoch and a half."""
    shape: dict[str, Any] = {"context": CONTEXT, "batch_size": BATCH, "seed": 3} | changes
    limit = shape.pop("validation_tokens", 10**6)
    loader = Loader(store, "train", **shape)
    return Reading(loader, first, count, batch_windows=BATCH, validation_tokens=limit)


def identities(read: Reading, depth: int = 2, dtype: Dtype = "fp32") -> Identities:
    return outputs.identities(read, NAMES[depth], depth, WIDTH, dtype)


@dataclass
class Built:
    """A cache of a trunk of `depth` blocks, and what made it."""

    folder: Path
    model: PreTrainedModel
    read: Reading
    wanted: Identities

    def outputs(self) -> Outputs:
        return Outputs(self.folder, self.wanted, self.read)


@pytest.fixture
def build(pico: Build, store: TokenStore, tmp_path: Path) -> Callable[..., Built]:
    def make(
        name: str = "cache",
        depth: int = 2,
        read: Reading | None = None,
        dtype: Dtype = "fp32",
        below: Below | None = None,
    ) -> Built:
        model, read = pico("llama", depth=3), read or reading(store)
        wanted = identities(read, depth, dtype)
        view = RecomputedTrunk(model, depth, below.depth if below else 0)
        said = outputs.build(tmp_path / name, wanted, read, view, below, CPU)
        assert said == []
        return Built(tmp_path / name, model, read, wanted)

    return make


def find(built: Built, wanted: Identities, read: Reading) -> Below | None:
    return outputs.find_below(built.folder, wanted, read, NAMES.__getitem__)


def test_the_text_has_what_these_tests_need(store: TokenStore) -> None:
    read = reading(store)
    assert BATCH < read.loader.windows < 40 < 2 * read.loader.windows
    *_, last = read.held_out()
    assert last.shape[0] == 1
    assert 1 < last.shape[1] < CONTEXT + 1
    assert len(read.windows()) % BATCH, "the last batch that is stored is a short one"


def test_training_reads_what_the_trunk_computes(build: Callable[..., Built]) -> None:
    built = build()
    view, loader = RecomputedTrunk(built.model, 2), built.read.loader
    stored = built.outputs()
    streamed = list(itertools.islice(stored.stream(loader), 40 // BATCH))
    for (batch, state, h_BTD), (plain, at) in zip(streamed, loader, strict=False):
        assert np.array_equal(batch, plain)
        assert state == at
        assert h_BTD is not None
        assert torch.equal(h_BTD, view(torch.from_numpy(batch[:, :-1])))
    stored.close()


def test_windows_go_through_the_trunk_in_batches_of_training(build: Callable[..., Built]) -> None:
    sizes: list[int] = []

    def count(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(module, LlamaDecoderLayer):
            sizes.append(len(inputs[0]))

    handle = register_module_forward_hook(count)
    try:
        read = build(depth=1).read
    finally:
        handle.remove()
    batches = -(-len(read.windows()) // BATCH)
    assert sizes[:batches] == [BATCH] * batches, "also the last, which has fewer"
    assert sum(sizes[batches:]) == read.held_out_windows()


def test_a_stream_starts_where_a_loader_does(
    build: Callable[..., Built], store: TokenStore
) -> None:
    built = build()
    stored = built.outputs()
    whole = list(itertools.islice(stored.stream(built.read.loader), 10))
    resumed = Loader(
        store, "train", context=CONTEXT, batch_size=BATCH, seed=3, start=whole[5][1]
    )  # fmt: skip
    for (batch, state, h_BTD), expected in zip(stored.stream(resumed), whole[6:], strict=False):
        assert np.array_equal(batch, expected[0])
        assert state == expected[1]
        assert torch.equal(h_BTD, expected[2])  # type: ignore[arg-type]
    stored.close()


def test_held_out_text_comes_with_its_outputs(build: Callable[..., Built]) -> None:
    built = build()
    view, stored = RecomputedTrunk(built.model, 2), built.outputs()
    pairs = [(b, stored.held_out(n, b)) for n, b in numbered(built.read.held_out())]
    assert sum(len(batch) for batch, _ in pairs) == built.read.held_out_windows()
    assert pairs[-1][1].shape[1] < CONTEXT
    for batch, h_BTD in pairs:
        assert torch.equal(h_BTD, view(torch.from_numpy(batch[:, :-1])))
    stored.close()


def test_a_window_the_stage_was_not_said_to_read_is_an_error(
    build: Callable[..., Built], store: TokenStore
) -> None:
    stored = build(read=reading(store, count=8)).outputs()
    with pytest.raises(AssertionError, match="the cache holds what the stage reads"):
        list(itertools.islice(stored.stream(reading(store).loader), 3))
    stored.close()


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_bytes_are_those_on_disk(build: Callable[..., Built], dtype: Dtype) -> None:
    built = build(dtype=dtype)
    files = list(built.folder.glob("*/segment-*.bin"))
    assert {file.parent.name for file in files} == {"train", "validation"}
    assert built.wanted.bytes == sum(file.stat().st_size for file in files)
    windows = built.wanted.train.windows
    assert built.wanted.bytes_of(windows) == built.wanted.bytes
    record = CONTEXT * {"fp32": 4 * WIDTH, "bf16": 2 * WIDTH, "fp8": WIDTH + 4}[dtype]
    assert built.wanted.bytes_of(windows + 10) == built.wanted.bytes + 10 * record


@pytest.mark.parametrize("dtype", ["fp32", "bf16", "fp8"])
def test_from_below_only_the_new_blocks_run(
    build: Callable[..., Built], store: TokenStore, dtype: Dtype
) -> None:
    one = build("one", depth=1, dtype=dtype)
    read = reading(store, first=16, count=24)
    wanted = identities(read, dtype=dtype)
    below = find(one, wanted, read)
    assert below is not None
    assert below.depth == 1
    two = build("two", read=read, dtype=dtype, below=below)
    below.close()
    whole = build("whole", read=read, dtype=dtype)
    made, expected = two.outputs(), whole.outputs()
    slots = np.arange(wanted.train.windows)
    difference = (made.train.read(slots) - expected.train.read(slots)).abs().max().item()
    # What was stored in between was rounded once more, but for fp32.
    assert difference <= {"fp32": 0.0, "bf16": 0.05, "fp8": 0.5}[dtype]
    assert torch.equal(made.train.read(slots), expected.train.read(slots)) == (dtype == "fp32")
    made.close()
    expected.close()


def test_advance_counts_every_window_once(
    build: Callable[..., Built], pico: Build, store: TokenStore, tmp_path: Path
) -> None:
    read = reading(store)
    view = RecomputedTrunk(pico("llama"), 2)
    counted: list[int] = []
    wanted = identities(read)
    arguments = (wanted, read, view, None, CPU, counted.append)
    outputs.build(tmp_path / "cache", *arguments)
    total = wanted.train.windows + wanted.held_out.windows
    assert sum(counted) == total
    counted.clear()
    outputs.build(tmp_path / "cache", *arguments)
    assert sum(counted) == total, "what was there counts too"
    assert len([units for units in counted if units]) == 2, "and at once"


def test_what_was_wrong_is_said_and_mended(
    build: Callable[..., Built], store: TokenStore, tmp_path: Path
) -> None:
    built = build()
    segment = built.folder / "train" / "segment-00000.bin"
    expected = segment.read_bytes()
    segment.write_bytes(expected[:100] + bytes([expected[100] ^ 1]) + expected[101:])
    view = RecomputedTrunk(built.model, 2)
    (said,) = outputs.build(built.folder, built.wanted, built.read, view, None, CPU)
    assert "1 damaged segments" in said
    assert segment.read_bytes() == expected
    more = reading(store, count=12)
    said = outputs.build(built.folder, identities(more), more, view, None, CPU)
    assert any("another order" in line for line in said)


def test_the_cache_of_the_same_windows_is_found(build: Callable[..., Built]) -> None:
    one = build(depth=1)
    below = find(one, identities(one.read), one.read)
    assert below is not None
    windows = one.read.windows()
    assert below.slots[windows].tolist() == list(range(len(windows)))
    below.close()


def change(**fields: Any) -> Callable[[Reading], Identities]:
    def wanted(read: Reading) -> Identities:
        found = identities(read)
        return Identities(replace(found.train, **fields), replace(found.held_out, **fields))

    return wanted


@pytest.mark.parametrize(
    "changes",
    [{"dtype": "bf16"}, {"corpus": "another"}, {"context": 16}, {"width": 64}],
    ids=lambda changes: next(iter(changes)),
)
def test_a_cache_of_something_else_is_not_used(
    build: Callable[..., Built], changes: dict[str, Any]
) -> None:
    one = build(depth=1)
    assert find(one, change(**changes)(one.read), one.read) is None


def test_a_cache_of_another_trunk_is_not_used(build: Callable[..., Built]) -> None:
    one = build(depth=1)
    wanted = identities(one.read)
    assert outputs.find_below(one.folder, wanted, one.read, lambda depth: "changed") is None
    two = build("two", depth=2)
    assert outputs.find_below(
        two.folder, identities(two.read, depth=1), two.read, NAMES.__getitem__
    ) is None, "it holds more blocks than the trunk has"  # fmt: skip


def test_a_cache_of_another_order_is_not_used(
    build: Callable[..., Built], store: TokenStore, other_store: TokenStore
) -> None:
    one = build(depth=1, read=reading(store, count=12))
    for read in (
        reading(store, count=16),  # windows that it lacks
        reading(store, first=4, count=12),
        reading(store, count=12, seed=4),
        reading(store, count=12, validation_tokens=16),  # other held-out windows
        reading(other_store, count=12),
    ):
        assert find(one, identities(read), read) is None
    within = reading(store, first=4, count=8)
    below = find(one, identities(within), within)
    assert below is not None
    below.close()


def test_half_a_cache_is_not_used(build: Callable[..., Built]) -> None:
    one = build(depth=1)
    wanted = identities(one.read)
    segment = one.folder / "validation" / "segment-00000.bin"
    content = segment.read_bytes()
    segment.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    with pytest.raises(CheckpointError, match="is damaged"):
        find(one, wanted, one.read)
    segment.unlink()
    with pytest.raises(CheckpointError, match="is missing"):
        find(one, wanted, one.read)
    (one.folder / "validation" / "manifest.json").unlink()
    assert find(one, wanted, one.read) is None
    assert outputs.find_below(one.folder / "none", wanted, one.read, NAMES.__getitem__) is None


@pytest.mark.parametrize("order", ["", "shuffled", "seed 3, windows 0 + many", "seed 3"])
def test_an_order_that_cannot_be_read_covers_nothing(store: TokenStore, order: str) -> None:
    assert reading(store).covered_by(order) is None


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 200), st.integers(1, 90), st.integers(0, 200), st.integers(1, 90)
)  # fmt: skip
def test_an_order_covers_what_it_reads(
    store: TokenStore, first: int, count: int, other_first: int, other_count: int
) -> None:
    one, two = reading(store, first, count), reading(store, other_first, other_count)
    slots = two.covered_by(one.order())
    held, read = one.windows(), two.windows()
    assert (slots is not None) == (set(read.tolist()) <= set(held.tolist()))
    if slots is not None:
        assert held[slots[read]].tolist() == read.tolist()


def seen(windows: Iterator[int]) -> list[int]:
    return list(dict.fromkeys(windows))


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 200), st.integers(1, 150))
def test_windows_are_stored_once_in_order_of_first_use(
    store: TokenStore, first: int, count: int
) -> None:
    read = reading(store, first, count)
    assert read.windows().tolist() == seen(iter(read.loader.window_ids(first, count).tolist()))
