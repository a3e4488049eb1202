from __future__ import annotations

import itertools
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nacre.data import Loader, TokenStore, tokenize, validation_batches
from nacre.data.loader import permute
from nacre.errors import CheckpointError, DataError, FingerprintError


def make_store(folder: Path, documents: list[list[int]], holdout: float = 0.1) -> TokenStore:
    """Store documents of the token ids 1 to 999; 0 ends each."""
    ids = {str(number): number for number in range(1000)}
    inner = Tokenizer(models.WordLevel(ids, unk_token="0"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="0")
    folder.mkdir()
    rows = [json.dumps({"text": " ".join(map(str, row))}) for row in documents]
    (folder / "in.jsonl").write_text("\n".join(rows))
    return tokenize([str(folder / "in.jsonl")], tokenizer, folder / "store", holdout=holdout)


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    documents = [[number % 999 + 1] * (number % 13 + 1) for number in range(150)]
    return make_store(tmp_path_factory.mktemp("data") / "a", documents)


def take(loader: Loader, count: int) -> list[tuple[np.ndarray, dict]]:
    return list(itertools.islice(loader, count))  # type: ignore[arg-type]


def make(store: TokenStore, **changes) -> Loader:
    return Loader(store, **({"split": "train", "context": 8, "batch_size": 4, "seed": 3} | changes))


def test_batches_are_windows_of_the_stream(store):
    loader = make(store)
    tokens = store.tokens("train")
    for batch, state in take(loader, 3):
        assert batch.shape == (4, 9)
        assert batch.dtype == np.int64
        ids = loader.window_ids(state["position"] - 4, 4)
        for row, window in zip(batch, ids, strict=True):
            assert row.tolist() == tokens[window * 8 : window * 8 + 9].tolist()


def test_an_epoch_has_every_window_once_and_the_next_another_order(store):
    loader = make(store, batch_size=1)
    epochs = [loader.window_ids(epoch * loader.windows, loader.windows) for epoch in range(3)]
    for ids in epochs:
        assert sorted(ids.tolist()) == list(range(loader.windows))
    assert loader.windows == (len(store.tokens("train")) - 1) // 8 > 40
    assert len({tuple(ids.tolist()) for ids in [*epochs, np.arange(loader.windows)]}) == 4


def test_every_token_but_the_first_is_predicted_once_an_epoch(store):
    loader = make(store, batch_size=1)
    predicted = np.concatenate([batch[0, 1:] for batch, _ in take(loader, loader.windows)])
    stream = store.tokens("train")[1 : loader.windows * 8 + 1]
    assert np.array_equal(np.sort(predicted), np.sort(stream))


def test_a_batch_may_span_two_epochs(store):
    loader = make(store)
    ids = loader.window_ids(loader.windows - 2, 5)
    assert ids[:2].tolist() == loader.window_ids(loader.windows - 2, 2).tolist()
    assert ids[2:].tolist() == loader.window_ids(loader.windows, 3).tolist()


@pytest.mark.parametrize("after", [0, 1, 7, 40])
def test_resuming_continues_exactly(store, after):
    whole = take(make(store), after + 10)
    state = whole[after - 1][1] if after else make(store).state(0)
    again = take(make(store, start=json.loads(json.dumps(state))), 10)
    for (batch, state), (other, other_state) in zip(whole[after:], again, strict=True):
        assert np.array_equal(batch, other)
        assert torch.equal(torch.from_numpy(batch), torch.from_numpy(other))
        assert state == other_state


def test_another_batch_size_continues_at_the_same_window(store):
    whole = np.concatenate([batch for batch, _ in take(make(store), 12)])
    state = take(make(store), 2)[-1][1]
    rest = np.concatenate([batch for batch, _ in take(make(store, batch_size=5, start=state), 8)])
    assert np.array_equal(whole[8:48], rest)


def test_the_order_depends_on_the_seed_alone(store, tmp_path):
    assert make(store).window_ids(0, 30).tolist() == make(store).window_ids(0, 30).tolist()
    assert make(store).window_ids(0, 30).tolist() != make(store, seed=4).window_ids(0, 30).tolist()
    rows = [[7] * (number % 13 + 1) for number in range(150)]
    alike = make_store(tmp_path / "b", rows)
    if make(alike).windows == make(store).windows:
        assert make(alike).window_ids(0, 9).tolist() == make(store).window_ids(0, 9).tolist()


def test_iterating_twice_starts_at_the_same_place(store):
    loader = make(store)
    for (batch, _), (other, _) in zip(take(loader, 3), take(loader, 3), strict=True):
        assert np.array_equal(batch, other)


@pytest.mark.parametrize(
    ("field", "value"),
    [("store", "f" * 64), ("context", 9), ("seed", 4), ("split", "validation")],
)
def test_a_state_of_something_else_is_refused(store, field, value):
    state = make(store).state(4) | {field: value}
    with pytest.raises(
        FingerprintError, match=f"the data cursor's {field} does not match"
    ) as caught:
        make(store, start=state)
    assert str(value) in str(caught.value)
    assert "resume" in str(caught.value)


@pytest.mark.parametrize("position", [-1, "4", None])
def test_a_damaged_state_is_refused(store, position):
    with pytest.raises(CheckpointError, match="position is"):
        make(store, start=make(store).state(0) | {"position": position})


def test_a_context_longer_than_the_corpus(store):
    count = len(store.tokens("train"))
    make(store, context=count - 1)
    with pytest.raises(DataError) as caught:
        make(store, context=count)
    assert f"has {count:,} tokens" in str(caught.value)
    assert f"window of context {count:,} needs {count + 1:,}" in str(caught.value)
    assert "the context is longer than the corpus" in str(caught.value)
    assert "more text or a smaller context" in str(caught.value)


def test_nothing_held_out(tmp_path):
    small = make_store(tmp_path / "a", [[1], [2], [3]])
    assert small.counts["validation"].tokens == 0
    with pytest.raises(DataError, match="only 0 tokens are held out"):
        make(small, context=2)
    with pytest.raises(DataError, match="more text or a larger holdout"):
        next(validation_batches(small, context=2, batch_size=1))


@pytest.mark.parametrize("change", [{"context": 0}, {"batch_size": 0}])
def test_sizes_must_be_positive(store, change):
    with pytest.raises(ValueError, match="must be at least 1"):
        make(store, **change)


@pytest.mark.parametrize("context", [1, 3, 8, 10_000])
def test_validation_predicts_every_token_once_in_order(store, context):
    batches = list(validation_batches(store, context=context, batch_size=3))
    tokens = store.tokens("validation")
    assert all(batch.dtype == np.int64 for batch in batches)
    predicted = np.concatenate([row[1:] for batch in batches for row in batch])
    given_ = np.concatenate([row[:-1] for batch in batches for row in batch])
    assert predicted.tolist() == tokens[1:].tolist()
    assert given_.tolist() == tokens[:-1].tolist()
    assert all(batch.shape == (3, context + 1) for batch in batches[:-2])


def test_validation_stops_at_the_limit(store):
    def predicted(limit: int | None, context: int = 8) -> int:
        batches = validation_batches(store, context=context, batch_size=3, limit_tokens=limit)
        return sum(batch[:, 1:].size for batch in batches)

    everything = len(store.tokens("validation")) - 1
    assert predicted(30) == 24
    assert predicted(24) == 24
    assert predicted(1) == 8  # at least one window
    assert predicted(None) == predicted(everything) == predicted(10**9) == everything
    assert predicted(5, context=10_000) == everything  # shorter than one window


@settings(max_examples=60, deadline=None)
@given(size=st.integers(1, 3000), seed=st.integers(-5, 2**70), epoch=st.integers(0, 2**40))
def test_the_order_is_a_permutation(size, seed, epoch):
    order = permute(np.arange(size, dtype=np.uint64), size, seed, epoch)
    assert np.array_equal(np.sort(order), np.arange(size))


def test_the_order_never_changes():
    assert permute(np.arange(10, dtype=np.uint64), 10, 0, 0).tolist() == [
        3,
        4,
        0,
        2,
        5,
        8,
        9,
        7,
        1,
        6,
    ]
    far = np.array([0, 10**12 - 1], np.uint64)
    assert permute(far, 10**12, 1, 2).tolist() == [34774860197, 542885964856]


def test_the_order_looks_random():
    size = 20_000
    order = permute(np.arange(size, dtype=np.uint64), size, 5, 1)
    assert abs(np.corrcoef(np.arange(size), order)[0, 1]) < 0.03
    assert (np.diff(order) == 1).sum() < 10
    assert abs((order[: size // 2] < size // 2).mean() - 0.5) < 0.02
    firsts = [permute(np.zeros(1, np.uint64), 10, seed, 0)[0] for seed in range(1000)]
    assert np.bincount(firsts, minlength=10).min() > 60


@pytest.mark.parametrize("count", [1, 7, 40, 500])
@pytest.mark.parametrize("position", [0, 5, 130])
def test_distinct_windows_stand_in_the_order_of_their_first_use(store, position, count):
    loader = make(store)
    distinct = loader.distinct(position, count).tolist()
    assert distinct == list(dict.fromkeys(loader.window_ids(position, count).tolist()))
    if count > 2 * loader.windows:
        assert sorted(distinct) == list(range(loader.windows))
