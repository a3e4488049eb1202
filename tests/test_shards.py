from __future__ import annotations

import itertools
import json
import logging
import os
import random
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nacre import tokenizer as tokenizers_
from nacre.data import TokenStore, encoding, shards, tokenize
from nacre.data.holdout import assign, content_hash
from nacre.errors import CheckpointError, ConfigError, DataError

SHARED = Path(__file__).parents[2] / "shared" / "data"
WORDS = ["the", "a", "pearl", "shell", "layer", "grows", "under", "water", "and", "12", "years,"]


def story(seed: int, sentences: int = 12) -> str:
    rng = random.Random(seed)
    lines = [" ".join(rng.choices(WORDS, k=9)) + f" {seed}." for _ in range(sentences)]
    return "\n\n".join("\n".join(lines[at : at + 3]) for at in range(0, sentences, 3)) + "\n"


def write(folder: Path, texts: list[str]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}) + "\n" for text in texts]
    (folder / "a.jsonl").write_text("".join(lines), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return tokenizers_.build(map(story, range(20)), 512)


@pytest.fixture(scope="module")
def byte_level() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(
        map(story, range(20)),
        trainers.BpeTrainer(
            vocab_size=400,
            special_tokens=["<eos>"],
            initial_alphabet=alphabet,
            show_progress=False,
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")


def documents(
    store: TokenStore, split: shards.Split, tokenizer: PreTrainedTokenizerFast
) -> list[str]:
    tokens, begins = store.tokens(split), store.documents(split)
    assert begins[0] == 0
    assert begins[-1] == len(tokens) == store.counts[split].tokens
    assert len(begins) == store.counts[split].documents + 1
    parts = [tokens[begin:end] for begin, end in itertools.pairwise(begins)]
    assert all(part[-1] == store.end for part in parts)
    assert sum(int((part == store.end).sum()) for part in parts) == len(parts)
    return [tokenizer.decode(part[:-1].tolist()) for part in parts]  # type: ignore[misc]


def test_every_document_comes_back_on_one_side(tmp_path, tokenizer):
    texts = [story(seed) for seed in range(60)]
    store = tokenize([str(write(tmp_path / "in", texts))], tokenizer, tmp_path / "out", holdout=0.2)
    train, held_out = (documents(store, split, tokenizer) for split in shards.SPLITS)
    assert sorted(train + held_out) == sorted(texts)
    assert not set(train) & set(held_out)
    assert 4 <= len(held_out) <= 20
    assert [text for text in texts if text in set(train)] == train  # in the order of reading
    for split, part in zip(shards.SPLITS, (train, held_out), strict=True):
        assert store.counts[split].bytes == sum(len(text.encode()) for text in part)


def test_the_split_depends_on_the_content_alone(tmp_path, tokenizer, byte_level):
    texts = [story(seed) for seed in range(60)]
    shuffled = random.Random(1).sample(texts, 60)
    sides = []
    for number, (some, with_) in enumerate(
        [(texts, tokenizer), (shuffled, tokenizer), (texts[:40], tokenizer), (texts, byte_level)]
    ):
        folder = tmp_path / str(number)
        store = tokenize([str(write(folder / "in", some))], with_, folder / "out", holdout=0.2)
        sides.append(set(documents(store, "validation", with_)))
    assert sides[0] == sides[1] == sides[3]
    assert sides[2] == sides[0] & set(texts[:40])


def test_copies_land_on_one_side(tmp_path, tokenizer):
    texts = [story(seed) for seed in range(40)] * 2
    store = tokenize([str(write(tmp_path / "in", texts))], tokenizer, tmp_path / "out", holdout=0.2)
    train, held_out = (documents(store, split, tokenizer) for split in shards.SPLITS)
    assert not set(train) & set(held_out)
    assert len(held_out) == 2 * len(set(held_out))


def test_the_smallest_hash_is_held_out_when_none_is_below(tmp_path, tokenizer):
    texts = [story(seed) for seed in range(30)] * 2
    store = tokenize([str(write(tmp_path / "in", texts))], tokenizer, tmp_path / "o", holdout=1e-9)
    assert documents(store, "validation", tokenizer) == [min(texts, key=content_hash)] * 2


@pytest.mark.parametrize("kind", ["built", "byte-level"])
def test_one_document_is_cut_near_its_end_at_a_paragraph(
    tmp_path, tokenizer, byte_level, kind, caplog
):
    text = story(5, sentences=900)
    (tmp_path / "a.txt").write_text(text, encoding="utf-8", newline="")
    chosen = tokenizer if kind == "built" else byte_level
    with caplog.at_level(logging.INFO, "nacre"):
        store = tokenize([str(tmp_path / "a.txt")], chosen, tmp_path / "out", holdout=0.05)
    (head,), (tail,) = (documents(store, split, chosen) for split in shards.SPLITS)
    assert head + tail == text
    assert head.endswith("\n\n")
    assert 0.03 < len(tail) / len(text) < 0.07
    assert store.counts["train"].bytes == len(head.encode())
    assert store.counts["validation"].bytes == len(tail.encode())
    assert "their last 5% is held out" in caplog.text


def test_two_files_both_keep_their_larger_part(tmp_path, tokenizer):
    texts = [story(1, 600), story(2, 600), story(2, 600)]
    store = tokenize([str(write(tmp_path / "in", texts))], tokenizer, tmp_path / "out", holdout=0.1)
    train, held_out = (documents(store, split, tokenizer) for split in shards.SPLITS)
    assert [head + tail for head, tail in zip(train, held_out, strict=True)] == texts
    assert all(0.85 < len(head) / len(text) < 0.95 for head, text in zip(train, texts, strict=True))
    assert train[1:] == [train[1]] * 2  # a copy is cut at the same place


def test_a_cut_without_line_ends_and_tiny_documents():
    strings = ["a", "b", b"<end>", "\n"]
    hashes = np.array([5, 6], np.uint64)
    tokens = np.array([0] * 100 + [2] + [1, 2], np.uint16)
    found = assign(hashes, np.array([101, 2]), tokens, strings, 0.02)
    assert found.cuts == {5: 98}
    assert not found.holds_out(5)
    lonely = assign(hashes[:1], np.array([2]), tokens[-2:], strings, 0.02)
    assert lonely.cuts == {}
    assert not lonely.holds_out(5)
    tokens[97] = 3  # a line end near the place
    assert assign(hashes, np.array([101, 2]), tokens, strings, 0.02).cuts == {5: 98}
    tokens[97], tokens[98] = 0, 3
    assert assign(hashes, np.array([101, 2]), tokens, strings, 0.02).cuts == {5: 99}


def test_long_documents_give_the_same_tokens_in_pieces(tmp_path, tokenizer, monkeypatch):
    texts = [story(seed, 40) + "\r\n \n x" for seed in range(30)]
    source = [str(write(tmp_path / "in", texts))]
    whole = tokenize(source, tokenizer, tmp_path / "whole")
    monkeypatch.setattr(encoding, "_PART", 50)
    monkeypatch.setattr(encoding, "_BATCH", 333)
    pieces = tokenize(source, tokenizer, tmp_path / "pieces")
    assert whole.fingerprint == pieces.fingerprint
    for split in shards.SPLITS:
        assert np.array_equal(whole.tokens(split), pieces.tokens(split))
    one_by_one = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert whole.counts["train"].tokens + whole.counts["validation"].tokens == sum(
        len(ids) + 1 for ids in one_by_one
    )


def test_special_names_in_a_text_stay_text(tmp_path, tokenizer, byte_level):
    texts = [story(seed) + "<|endoftext|> <eos> <|pad|>" for seed in range(12)]
    for number, chosen in enumerate((tokenizer, byte_level)):
        folder = tmp_path / str(number)
        store = tokenize([str(write(folder / "in", texts))], chosen, folder / "out")
        both = documents(store, "train", chosen) + documents(store, "validation", chosen)
        assert sorted(both) == sorted(texts)


@pytest.mark.parametrize(
    ("size", "dtype"), [(512, "uint16"), (65_536, "uint16"), (65_537, "uint32")]
)
def test_the_type_follows_the_vocabulary(tmp_path, size, dtype):
    ids = {"<eos>": 0, "a": size - 2, "b": size - 1}
    inner = Tokenizer(models.WordLevel(ids, unk_token="<eos>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    chosen = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>")
    source = [str(write(tmp_path / "in", ["a b " * number for number in range(1, 20)]))]
    store = tokenize(source, chosen, tmp_path / "out")
    assert store.vocabulary_size == size
    tokens = store.tokens("train")
    assert tokens.dtype == dtype
    assert isinstance(tokens, np.memmap)
    assert not tokens.flags.writeable
    assert set(tokens.tolist()) == {0, size - 2, size - 1}


def test_the_same_is_used_again_and_a_change_is_not(tmp_path, tokenizer, byte_level, monkeypatch):
    source = write(tmp_path / "in", [story(seed) for seed in range(30)])
    out = tmp_path / "out"

    def made(chosen=tokenizer, **settings) -> tuple[bool, TokenStore]:
        before = (out / "store.json").stat().st_ino if out.exists() else None
        store = tokenize([str(source)], chosen, out, **settings)
        return (out / "store.json").stat().st_ino != before, store

    first, store = made()
    again, same = made()
    assert (first, again) == (True, False)
    assert same == store == TokenStore.open(out)
    assert made(byte_level)[0]
    assert made()[1].fingerprint == store.fingerprint
    assert made(holdout=0.3)[0]
    assert made(errors="replace")[0]
    assert made()[0]
    write(source, [story(seed) for seed in range(31)])
    changed, other = made()
    assert changed
    assert other.fingerprint != store.fingerprint
    os.utime(source / "a.jsonl", (1, 1))
    assert made()[1].fingerprint == other.fingerprint  # same content, made again


def test_the_default_corpus_is_a_source(tmp_path, tokenizer, monkeypatch):
    texts = tuple((f"topic {seed}", story(seed)) for seed in range(30))
    monkeypatch.setattr("nacre.data.embedded.texts", lambda: texts)
    store = tokenize(["default"], tokenizer, tmp_path / "out")
    assert store.counts["train"].documents + store.counts["validation"].documents == 30


def test_progress_counts_the_bytes(tmp_path, tokenizer):
    texts = [story(seed) + "é" for seed in range(30)]
    seen: list[int] = []
    tokenize([str(write(tmp_path / "in", texts))], tokenizer, tmp_path / "o", progress=seen.append)
    assert sum(seen) == (tmp_path / "in" / "a.jsonl").stat().st_size


def test_nothing_is_left_of_a_failure(tmp_path, tokenizer):
    source = write(tmp_path / "in", [story(1)])
    with (source / "a.jsonl").open("a") as file:
        file.write("no json\n")
    with pytest.raises(DataError, match="line 2: it is no JSON"):
        tokenize([str(source)], tokenizer, tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_failure_keeps_the_store_that_was_there(tmp_path, tokenizer):
    source = write(tmp_path / "in", [story(seed) for seed in range(30)])
    store = tokenize([str(source)], tokenizer, tmp_path / "out")
    (source / "a.jsonl").write_text("no json\n")
    with pytest.raises(DataError):
        tokenize([str(source)], tokenizer, tmp_path / "out")
    assert TokenStore.open(tmp_path / "out") == store


def test_a_folder_with_something_else_is_left_alone(tmp_path, tokenizer):
    source = write(tmp_path / "in", [story(seed) for seed in range(30)])
    with pytest.raises(ConfigError, match="holds something that is no token store"):
        tokenize([str(source)], tokenizer, source)
    (tmp_path / "empty").mkdir()
    assert tokenize([str(source)], tokenizer, tmp_path / "empty").counts["train"].documents


@pytest.mark.parametrize("holdout", [0, -0.1, 0.6, 1])
def test_holdout_has_bounds(tmp_path, tokenizer, holdout):
    with pytest.raises(ConfigError, match=r"holdout: .* is not above 0 and at most 0.5"):
        tokenize(["default"], tokenizer, tmp_path / "out", holdout=holdout)


def test_sources_without_any_text(tmp_path, tokenizer, monkeypatch):
    monkeypatch.setattr("nacre.data.embedded.texts", lambda: ())
    with pytest.raises(DataError, match="there is no text in the sources"):
        tokenize(["default"], tokenizer, tmp_path / "out")


def test_damage_is_noticed_and_mended(tmp_path, tokenizer, caplog):
    source = write(tmp_path / "in", [story(seed) for seed in range(30)])
    out = tmp_path / "out"
    store = tokenize([str(source)], tokenizer, out)
    manifest = (out / "store.json").read_text()

    def refusal() -> str:
        with pytest.raises(CheckpointError) as caught:
            TokenStore.open(out).verify()
        assert tokenize([str(source)], tokenizer, out) == store
        return str(caught.value)

    with (out / "train.tokens").open("r+b") as file:
        file.truncate(100)
    assert "train.tokens has 100 bytes instead of" in refusal()
    tokens = bytearray((out / "train.tokens").read_bytes())
    tokens[len(tokens) // 2] ^= 1
    (out / "train.tokens").write_bytes(tokens)
    assert "its tokens are not what was written; delete the folder" in refusal()
    (out / "validation.documents").unlink()
    assert "validation.documents is missing; delete the folder" in refusal()
    (out / "store.json").write_text("{")
    assert "store.json is damaged" in refusal()
    (out / "store.json").write_text(manifest.replace('"format": 1', '"format": 0'))
    assert "another format" in refusal()
    (out / "store.json").write_text(manifest.replace('"end"', '"and"'))
    assert "lacks 'end'" in refusal()
    assert "tokenizing again" in caplog.text
    with pytest.raises(CheckpointError, match="is no token store"):
        TokenStore.open(tmp_path / "in")


def test_the_manifest_says_what_it_was_made_from(tmp_path, tokenizer):
    source = write(tmp_path / "in", [story(seed) for seed in range(30)])
    store = tokenize([str(source)], tokenizer, tmp_path / "out", holdout=0.1)
    manifest = json.loads((tmp_path / "out" / "store.json").read_text())
    assert manifest["tokenizer"] == store.tokenizer == tokenizers_.fingerprint(tokenizer)
    assert manifest["key"]["sources"][0][0] == str(source / "a.jsonl")
    assert (manifest["key"]["holdout"], manifest["key"]["errors"]) == (0.1, "strict")
    assert set(manifest["counts"]["train"]) == {"documents", "tokens", "bytes"}
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "store.json",
        *(f"{split}.{kind}" for split in shards.SPLITS for kind in ("tokens", "documents")),
    }


@pytest.mark.skipif(
    not SHARED.is_dir() and os.environ.get("CI") != "true", reason="../shared/data is absent"
)
def test_real_text_in_three_languages(tmp_path):
    paths = [
        SHARED / "en/novels/Burnett_Garden_1911.txt",
        SHARED / "ru/novels/Pushkin_Pikovaya.txt",
        SHARED / "parallel/ntrex.zh",
    ]
    texts = [path.read_bytes().decode() for path in paths]
    (tmp_path / "in").mkdir()
    for path, text in zip(paths, texts, strict=True):
        (tmp_path / "in" / f"{path.name}.txt").write_bytes(text.encode())
    tokenizer = tokenizers_.build(texts, 4096)
    assert len(tokenizer) == 4096
    store = tokenize([str(tmp_path / "in")], tokenizer, tmp_path / "out")
    train, held_out = (documents(store, split, tokenizer) for split in shards.SPLITS)
    joined = [head + tail for head, tail in zip(train, held_out, strict=True)]
    assert sorted(joined) == sorted(texts)
    assert all(head.endswith("\n") for head in train)


@pytest.mark.parametrize(
    "change",
    [{"end": 10**6}, {"end": -1}, {"vocabulary_size": "512"}, {"fingerprint": 5}, {"key": []},
     {"tokenizer": "\ud800"},
     {"vocabulary_size": 2**40}],
)  # fmt: skip
def test_a_manifest_of_other_kinds_is_refused(change, tokenizer, tmp_path):
    store = tokenize([str(write(tmp_path / "in", [story(n) for n in range(9)]))], tokenizer,
                     tmp_path / "store", holdout=0.3)  # fmt: skip
    path = store.folder / "store.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(CheckpointError, match="delete the folder to tokenize again"):
        TokenStore.open(store.folder)
