from __future__ import annotations

import json
import logging
import os
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import zstandard
from filelock import FileLock

from nacre import tokenizer as tokenizers
from nacre.data import Loader, TokenStore, check, encoding, holdout, hub, tokenize
from nacre.errors import DataError

WORDS = ["the", "a", "pearl", "shell", "layer", "grows", "under", "water", "and", "12", "years,"]


def story(seed: int, words: int = 80) -> str:
    return " ".join(random.Random(seed).choices(WORDS, k=words)) + f" {seed}.\n"


TOKENIZER = tokenizers.build(map(story, range(20)), 512)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """Return a folder of five shards of twenty documents and a long text."""
    folder = tmp_path / "in"
    folder.mkdir()
    for shard in range(5):
        rows = [json.dumps({"text": story(20 * shard + row)}) + "\n" for row in range(20)]
        (folder / f"{shard}.jsonl").write_text("".join(rows), encoding="utf-8")
    (folder / "2.txt").write_text(story(777, 2000), encoding="utf-8")
    return folder


@pytest.fixture
def often(monkeypatch) -> None:
    """Encode little at a time, and save after every batch."""
    monkeypatch.setattr(encoding, "_SAVE_EVERY", 0.0)
    monkeypatch.setattr(encoding, "_BATCH", 2000)


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def cut_off(source: str, out: Path, after: int) -> None:
    """Tokenize until `after` bytes of the sources have been read, and stop there."""
    done = 0

    def progress(count: int) -> None:
        nonlocal done
        done += count
        if done > after:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tokenize([source], TOKENIZER, out, progress=progress)


@pytest.mark.usefixtures("often")
def test_tokenizing_goes_on_where_it_was_cut_off(tmp_path, shards, caplog):
    caplog.set_level(logging.INFO, "nacre")
    whole = tokenize([str(shards)], TOKENIZER, tmp_path / "whole")
    total = check([str(shards)]).total_bytes
    assert total is not None
    out = tmp_path / "out"
    before = 0
    for part in range(1, 6):
        cut_off(str(shards), out, total * part // 6)
        assert not out.exists()
        (saved,) = tmp_path.glob(".out.*/progress.json")
        done = json.loads(saved.read_text())["progress"]["all_documents"]
        assert before <= done < 101  # the long text is done whole or not
        before = done
    assert before > 50
    assert "the same again goes on from there" in caplog.text
    caplog.clear()
    seen: list[int] = []
    store = tokenize([str(shards)], TOKENIZER, out, progress=seen.append)
    assert f"tokenizing goes on after {before} documents" in caplog.text
    assert sum(seen) == total
    assert store.fingerprint == whole.fingerprint
    assert store.counts == whole.counts
    assert names(tmp_path) == {"in", "whole", "out"}
    assert len(names(out)) == 5


@pytest.mark.usefixtures("often")
def test_work_over_other_text_is_not_taken_up(tmp_path, shards, caplog):
    caplog.set_level(logging.INFO, "nacre")
    cut_off(str(shards), tmp_path / "out", 20_000)
    os.utime(shards / "0.jsonl", (1, 1))
    tokenize([str(shards)], TOKENIZER, tmp_path / "out")
    assert "goes on" not in caplog.text.replace("the same again goes on", "")
    assert names(tmp_path) == {"in", "out"}


@pytest.mark.usefixtures("often")
def test_files_that_lost_their_end_are_not_taken_up(tmp_path, shards, caplog):
    caplog.set_level(logging.INFO, "nacre")
    cut_off(str(shards), tmp_path / "out", 20_000)
    (tokens,) = tmp_path.glob(".out.*/everything")
    os.truncate(tokens, 10)
    store = tokenize([str(shards)], TOKENIZER, tmp_path / "out")
    store.verify()
    assert "tokenizing goes on after" not in caplog.text


@pytest.mark.usefixtures("often")
def test_the_work_of_another_process_is_left_alone(tmp_path, shards):
    cut_off(str(shards), tmp_path / "out", 20_000)
    (place,) = tmp_path.glob(".out.????????")
    with FileLock(place.with_name(f"{place.name}.lock")):
        tokenize([str(shards)], TOKENIZER, tmp_path / "out")
        assert (place / "progress.json").exists()


@pytest.mark.usefixtures("often")
def test_a_data_set_that_changed_meanwhile(tmp_path, monkeypatch):
    rows = [{"text": story(seed)} for seed in range(60)]

    def stops():
        yield from rows[:40]
        raise ConnectionError("gone")

    monkeypatch.setattr(hub, "open_rows", lambda _: stops())
    with pytest.raises(DataError, match=r"broke off \(gone\)"):
        tokenize(["hf:some/name"], TOKENIZER, tmp_path / "out")
    monkeypatch.setattr(hub, "open_rows", lambda _: rows[::-1])
    message = "hf:some/name: it has changed since its tokenizing was cut off"
    with pytest.raises(DataError, match=message):
        tokenize(["hf:some/name"], TOKENIZER, tmp_path / "out")
    store = tokenize(["hf:some/name"], TOKENIZER, tmp_path / "out")
    assert store.counts["train"].documents + store.counts["validation"].documents == 60
    assert names(tmp_path) == {"out"}


@pytest.mark.usefixtures("often")
def test_one_cursor_over_shards_and_epochs(tmp_path, shards):
    """Batches taken up at any place, in a store that was itself cut off, are the uninterrupted."""
    whole = tokenize([str(shards)], TOKENIZER, tmp_path / "whole")
    cut_off(str(shards), tmp_path / "out", 40_000)
    store = tokenize([str(shards)], TOKENIZER, tmp_path / "out")
    settings = {"context": 16, "batch_size": 24, "seed": 3}
    uninterrupted = Loader(whole, "train", **settings)
    count = 3 * uninterrupted.windows // 24 + 2
    expected = [batch for _, (batch, _) in zip(range(count), uninterrupted, strict=False)]
    epoch = np.concatenate(expected)[: uninterrupted.windows, :-1]
    tokens = whole.tokens("train")[: 16 * uninterrupted.windows].reshape(-1, 16)
    assert sorted(map(tuple, epoch.tolist())) == sorted(map(tuple, tokens.tolist()))
    state = None
    found = []
    for _ in range(count):
        batch, state = next(iter(Loader(store, "train", **settings, start=state)))
        found.append(batch)
    assert all(map(np.array_equal, expected, found))


def test_a_long_text_is_read_in_pieces(tmp_path, monkeypatch):
    """Characters and byte order marks at the edges of blocks come out whole; so do the tokens."""
    text = "é🦋 三 x\n" * 300
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbf" + text.encode())
    (tmp_path / "b.txt").write_bytes(text.encode() + b"\xe4\xb8")
    whole = tokenize([str(tmp_path / "a.txt")], TOKENIZER, tmp_path / "whole")
    for block in (1, 2, 3, 7, 1000):
        monkeypatch.setattr("nacre.data.bytestream._BLOCK", block)
        store = tokenize([str(tmp_path / "a.txt")], TOKENIZER, tmp_path / str(block))
        assert store.fingerprint == whole.fingerprint
        with pytest.raises(DataError, match=f"invalid UTF-8 at byte {len(text.encode())} "):
            tokenize([str(tmp_path / "b.txt")], TOKENIZER, tmp_path / "b")
        broken = tokenize([str(tmp_path / "b.txt")], TOKENIZER, tmp_path / "b", errors="replace")
        assert sum(counts.bytes for counts in broken.counts.values()) == len(text.encode()) + 3


def test_the_split_is_the_same_in_blocks(monkeypatch):
    draw = np.random.default_rng(0)
    hashes = draw.integers(0, 2**64, 500, np.uint64)
    hashes[::4], hashes[1::4] = hashes[0], hashes[1]  # two texts that are a quarter each
    lengths = draw.integers(5, 50, 500)
    lengths[::4], lengths[1::4] = 40, 30
    tokens = np.tile(np.arange(3, dtype=np.uint16), int(lengths.sum()))
    whole = holdout.assign(hashes, lengths, tokens, ["a", "b", "\n"], 0.05)
    assert whole.large == {int(hashes[0]), int(hashes[1])} == set(whole.cuts)
    monkeypatch.setattr(holdout, "_BLOCK", 7)
    assert holdout.assign(hashes, lengths, tokens, ["a", "b", "\n"], 0.05) == whole


MB = 1 << 20
UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
from nacre import tokenizer as tokenizers
from nacre.data import encoding, tokenize

out, headroom = Path(sys.argv[1]), int(sys.argv[2])
encoding._BATCH = 200_000
tokenizer = tokenizers.load(out / "tokenizer")
tokenize([str(out / "small")], tokenizer, out / "1")  # what only the first time takes
status = dict(line.split(":") for line in open("/proc/self/status"))
limit = (int(status["VmData"].split()[0]) << 10) + headroom
resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
try:
    bytearray(headroom * 5 // 4)
except MemoryError:
    print("limited")
tokenize([str(out / "large")], tokenizer, out / "2")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="limits memory as Linux does")
def test_a_corpus_larger_than_memory(tmp_path):
    """Each of three files is larger than what is left under the limit, in one document or many."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghij", k=150)) for _ in range(40)]  # quick to encode

    def text(size: int) -> str:
        return " ".join(draw.choices(words, k=size // 151)) + "\n"

    def write(folder: Path, megabytes: int) -> None:
        folder.mkdir()
        with (folder / "a.txt").open("w") as file:
            file.writelines(text(MB) for _ in range(megabytes))
        line = json.dumps({"text": text(MB // 64)}).encode() + b"\n"
        (folder / "b.jsonl.zst").write_bytes(zstandard.compress(line * 64 * megabytes))
        rows = pa.table({"text": [text(MB // 64) for _ in range(64 * megabytes)]})
        pq.write_table(rows, folder / "c.parquet", use_dictionary=False, write_batch_size=8)

    tokenizers.build([text(60_000)], 2500).save_pretrained(tmp_path / "tokenizer")
    write(tmp_path / "small", 1)
    write(tmp_path / "large", 26)
    found = subprocess.run(
        [sys.executable, "-c", UNDER_A_LIMIT, str(tmp_path), str(20 * MB)],
        env={
            **os.environ,
            "PYTHONPATH": str(Path(__file__).parents[1] / "src"),
            "RAYON_NUM_THREADS": "1",
            "MALLOC_ARENA_MAX": "1",
            "MALLOC_MMAP_THRESHOLD_": "65536",  # what is freed goes back
        },
        capture_output=True,
        text=True,
        check=False,
    )
    assert (found.returncode, found.stdout) == (0, "limited\n"), found.stderr
    store = TokenStore.open(tmp_path / "2")
    store.verify()
    assert sum(counts.bytes for counts in store.counts.values()) > 3 * 20 * MB
