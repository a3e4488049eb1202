"""Suite `tokenizer`: MB/s of English, against a BPE without pre-tokenizer and a byte-level BPE."""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from nacre import tokenizer as tokenizers_
from nacre.bench.measure import Effort, Row, Sample, Target, compare, fresh_process
from nacre.bench.text import english

SIZE = 4096
REPEATS = {"nacre": 4, "bare": 1, "bytes": 1}
"""How often each goes over the text (2 MB): ours over 8 MB, the slower peers over one."""

PEERS = {"bare": "unsplit BPE", "bytes": "byte BPE"}
TARGETS = {1: Target("measured", 8.0), 2: Target("measured", 14.0)}
_PART = 16_384  # characters; the parts in which `data.shards` encodes
_TEXTS = "texts.json"


def suite(effort: Effort) -> Iterator[Row]:
    """Yield MB/s (10^6 bytes of UTF-8) a thread count and peer; text in, array of ids out."""
    size = 512 if effort.quick else SIZE
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        effort.say("learning three vocabularies")
        texts = english(effort.quick)
        (folder / _TEXTS).write_text(json.dumps(texts), encoding="utf-8")
        for kind, tokenizer in learn(texts, size).items():
            tokenizer.save(str(folder / f"{kind}.json"))
        for threads, target in TARGETS.items():
            case = f"{threads} thread{'s' if threads > 1 else ''}, {size:,} tokens"
            effort.say(case)
            rates = fresh_process(
                measure,
                name,
                1 if effort.quick else None,
                effort.rounds,
                effort.seconds / 4,
                environment={"RAYON_NUM_THREADS": str(threads), "TOKENIZERS_PARALLELISM": "true"},
            )
            for kind, peer in PEERS.items():
                yield Row(
                    suite="tokenizer",
                    case=case,
                    unit="MB/s",
                    better="higher",
                    measured=rates["nacre"].median,
                    spread=rates["nacre"].spread,
                    rounds=len(rates["nacre"].values),
                    peer=rates[kind].median,
                    peer_spread=rates[kind].spread,
                    peer_name=peer,
                    target=target,
                )


def learn(texts: list[str], size: int) -> dict[str, Any]:
    """Return three Rust tokenizers of about `size` tokens learned from `texts`, by kind.

    The one without pre-tokenizer learns from lines: over whole documents its trainer takes
    minutes. It is built as the released ones are: code points and n-grams, merged across words.
    """
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    bare = Tokenizer(models.BPE())
    lines = (line for text in texts for line in text.splitlines(keepends=True))
    bare.train_from_iterator(
        lines, trainers.BpeTrainer(vocab_size=size, max_token_length=16, show_progress=False)
    )
    level = pre_tokenizers.ByteLevel
    by_bytes = Tokenizer(models.BPE())
    by_bytes.pre_tokenizer = level(add_prefix_space=False)
    by_bytes.train_from_iterator(
        texts,
        trainers.BpeTrainer(
            vocab_size=size, initial_alphabet=level.alphabet(), show_progress=False
        ),
    )
    ours = tokenizers_.encoder(tokenizers_.build(texts, size))
    return {"nacre": ours, "bare": bare, "bytes": by_bytes}


def measure(folder: str, repeats: int | None, rounds: int, budget: float) -> dict[str, Sample]:
    """Return MB/s by kind of the tokenizers that the suite wrote into `folder`.

    Runs in a process of its own, whose environment says how many threads there are.
    """
    from tokenizers import Tokenizer

    texts: list[str] = json.loads((Path(folder) / _TEXTS).read_text(encoding="utf-8"))
    size = sum(len(text.encode()) for text in texts)

    def encode(kind: str, times: int) -> Callable[[], None]:
        tokenizer = Tokenizer.from_file(str(Path(folder) / f"{kind}.json"))
        tokenizer.encode_special_tokens = True

        def work() -> None:
            for _ in range(times):
                parts = texts
                if kind == "nacre":
                    parts = [part for text in texts for part in tokenizers_.split(text, _PART)]
                for encoding in tokenizer.encode_batch_fast(parts, add_special_tokens=False):
                    np.array(encoding.ids, dtype=np.uint16).tobytes()

        return work

    times = {kind: repeats or often for kind, often in REPEATS.items()}
    seconds = compare({kind: encode(kind, times[kind]) for kind in times}, rounds, budget)
    return {kind: seconds[kind].per(times[kind] * size / 1e6) for kind in times}
