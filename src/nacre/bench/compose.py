"""Suite `compose`: what a second expert costs, in generation and in the memory of scoring."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from transformers import PreTrainedModel

from nacre.bench.measure import Effort, Row, Target, compare, peak_memory
from nacre.growth.stage import drawing
from nacre.models import stock
from nacre.models.composed import ComposedConfig, ComposedForCausalLM
from nacre.models.rules import Rule


@dataclasses.dataclass(frozen=True)
class Shape:
    """The shape of an expert, and how much it writes or reads."""

    vocabulary: int
    width: int
    heads: int
    mlp: int
    depth: int
    batch: int
    tokens: int

    def expert(self, number: int) -> PreTrainedModel:
        """Return an expert with random weights; all but the first find any text very unlikely."""
        config = stock.llama_config(
            self.vocabulary, self.width, self.heads, self.mlp, 2 * self.tokens, self.depth
        )
        with drawing(number):
            model = stock.build(config).eval()
        if number:
            with torch.no_grad():
                stock.find_parts(model).head.weight.mul_(UNLIKELY)
        return model


WRITES = Shape(vocabulary=4096, width=384, heads=6, mlp=1024, depth=12, batch=1, tokens=128)
READS = Shape(vocabulary=65_536, width=256, heads=4, mlp=704, depth=2, batch=8, tokens=512)
TINY = Shape(vocabulary=512, width=32, heads=2, mlp=64, depth=2, batch=2, tokens=16)

CASES: dict[str, tuple[Rule, float, float]] = {
    "two experts": (Rule(), 0.0, 0.48),
    "two experts, half the depth shared": (Rule(), 0.5, 0.63),
    "two experts, top-k with k 1": (Rule("top-k", k=1), 0.0, 0.85),
}
"""Per case: the rule, which part of the depth is shared, the least share of one expert's speed."""
PROMPT = 8  # tokens
UNLIKELY = 30.0  # times the usual logits


def suite(effort: Effort) -> Iterator[Row]:
    """Yield tokens/s in greedy generation and peak memory of scoring, against one expert."""
    yield from _writing(TINY if effort.quick else WRITES, effort)
    yield from _reading(TINY if effort.quick else READS, effort)


def compose(shape: Shape, rule: Rule, shared: float) -> ComposedForCausalLM:
    """Return two experts that have a part of their lowest blocks in common."""
    common = round(shape.depth * shared)
    experts = [
        {
            "name": name,
            "parts": [
                f"both {index}" if index <= common and common else f"{name} {index}"
                for index in range(shape.depth + 1)
            ],
        }
        for name in ("first", "second")
    ]
    config = ComposedConfig(experts, rule.as_json(), shape.vocabulary, 2 * shape.tokens)
    return ComposedForCausalLM(config, [shape.expert(0), shape.expert(1)])


def _writing(shape: Shape, effort: Effort) -> Iterator[Row]:
    effort.say(f"writing {shape.tokens} tokens")
    prompt_BT = torch.arange(PROMPT)[None]
    one = shape.expert(0)
    composed = {case: compose(shape, rule, shared) for case, (rule, shared, _) in CASES.items()}

    def write(model: Any) -> None:
        model.generate(
            prompt_BT, max_new_tokens=shape.tokens, min_new_tokens=shape.tokens, do_sample=False
        )

    candidates: dict[str, Callable[[], object]] = {"one": partial(write, one)}
    candidates |= {case: partial(write, model) for case, model in composed.items()}
    seconds = compare(candidates, effort.rounds, effort.seconds)
    rates = {name: sample.per(shape.tokens) for name, sample in seconds.items()}
    about = f"d = {shape.width}, {shape.depth} blocks, {shape.vocabulary:,} tokens"
    for case, (_, _, least) in CASES.items():
        yield Row(
            suite="compose",
            case=f"{case}: writing",
            unit="tokens/s",
            better="higher",
            measured=rates[case].median,
            spread=rates[case].spread,
            rounds=len(rates[case].values),
            peer=rates["one"].median,
            peer_spread=rates["one"].spread,
            peer_name="one expert",
            target=Target("ratio", least),
            note=about,
        )


def reader(shape: Shape, experts: int) -> Callable[[], object]:
    """Make one expert, or a composition of two; return what scores a batch with it."""
    model: Any = shape.expert(0) if experts == 1 else compose(shape, Rule(), 0.0)
    ids_BT = torch.arange(shape.batch * shape.tokens).reshape(shape.batch, -1) % shape.vocabulary

    @torch.no_grad()
    def read(part_BT: torch.Tensor) -> object:
        return model(input_ids=part_BT, use_cache=False).logits

    read(ids_BT[:1, :8])  # code and buffers that a first call loads are not the batch's
    return partial(read, ids_BT)


def _reading(shape: Shape, effort: Effort) -> Iterator[Row]:
    effort.say("memory of scoring")
    peaks = {experts: max(1, peak_memory(reader, shape, experts)) for experts in (1, 2)}
    yield Row(
        suite="compose",
        case="two experts: memory of scoring",
        unit="B",
        better="lower",
        measured=peaks[2],
        peer=peaks[1],
        peer_name="one expert",
        target=Target("peer", 1.25),
        note=f"{shape.batch} x {shape.tokens} tokens, {shape.vocabulary:,} in the vocabulary",
    )
