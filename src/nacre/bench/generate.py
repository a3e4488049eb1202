"""Suite `generate`: tokens/s of nacre's generation against transformers' own, on one checkpoint."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from nacre import generation
from nacre import tokenizer as tokenizers
from nacre.bench.measure import FEWEST_ROUNDS, Effort, Row, compare
from nacre.bench.text import english
from nacre.growth.stage import drawing
from nacre.models import stock
from nacre.train import checkpoint
from nacre.train.device import default_device

PROMPT = "The value of"


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of the stage-like model that writes `new_tokens`."""

    vocabulary: int
    width: int
    heads: int
    mlp: int
    depth: int
    new_tokens: int


FULL = Shape(vocabulary=4096, width=256, heads=4, mlp=688, depth=6, new_tokens=128)
TINY = Shape(vocabulary=512, width=32, heads=2, mlp=64, depth=2, new_tokens=8)


def suite(effort: Effort) -> Iterator[Row]:
    """Yield tokens/s, greedy, batch 1, with the key-value cache; both sides in fp32 on one device.

    Loading is not counted. The note says whether both wrote the same text.
    """
    shape = TINY if effort.quick else FULL
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name) / "stage"
        effort.say("making a model")
        save(shape, folder, english(effort.quick))
        case = f"d = {shape.width}, {shape.depth} blocks, {shape.new_tokens} tokens"
        effort.say(case)
        model: Any = checkpoint.load_model(folder).eval()
        model.to(default_device())
        tokenizer = tokenizers.load(folder)
        ids_BT, _ = generation.encode(PROMPT, tokenizer, model, shape.new_tokens)
        sampling = generation.Sampling(max_new_tokens=shape.new_tokens, temperature=0.0)
        loaded = [generation.generate(folder, PROMPT, sampling) for _ in range(FEWEST_ROUNDS + 1)]
        texts: dict[str, str] = {}

        def ours() -> None:
            texts["ours"] = "".join(loaded.pop())

        def plain() -> None:
            out_BT = model.generate(
                inputs=ids_BT,
                attention_mask=torch.ones_like(ids_BT),
                do_sample=False,
                max_new_tokens=shape.new_tokens,
            )
            new = out_BT[0, ids_BT.shape[1] :]
            assert len(new) == shape.new_tokens
            texts["plain"] = str(tokenizer.decode(new, skip_special_tokens=True))

        seconds = compare({"ours": ours, "plain": plain}, FEWEST_ROUNDS, effort.seconds / 2)
    rates = {kind: sample.per(shape.new_tokens) for kind, sample in seconds.items()}
    yield Row(
        suite="generate",
        case=case,
        unit="tokens/s",
        better="higher",
        measured=rates["ours"].median,
        spread=rates["ours"].spread,
        rounds=len(rates["ours"].values),
        peer=rates["plain"].median,
        peer_spread=rates["plain"].spread,
        peer_name="transformers",
        note="both wrote the same text" if texts["ours"] == texts["plain"] else "texts differ",
    )


def save(shape: Shape, folder: Path, texts: list[str]) -> None:
    """Write a stage-like checkpoint with random weights and a tokenizer learned from `texts`."""
    tokenizer = tokenizers.build(texts, shape.vocabulary)
    config = stock.llama_config(
        len(tokenizer), shape.width, shape.heads, shape.mlp, 256, shape.depth
    )
    folder.mkdir(parents=True)
    with drawing(0):
        checkpoint.save_weights(stock.build(config), folder, [(1, shape.depth)])
    tokenizer.save_pretrained(folder)
