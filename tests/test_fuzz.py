"""A short fuzz campaign: damaged input of every kind is refused by an error of nacre, or read.

The long one is `benchmarks/fuzz.py`.
"""

from __future__ import annotations

import random
import sys
import warnings
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent / "fuzz"))

from attempt import attempt
from targets import Target, make_all

INPUTS = 300
NAMES = (
    "plan", "plan, priced", "plan.yaml", "settings", "study", "study.yaml", "tokenizer.json",
    "tokenizer_config.json", "tokenizer parts", "config.json", "config.json, loaded", "shard index",
    "safetensors header", "safetensors, loaded", "ledger", "token store", "token store, documents",
    "saved state", "saved state, tensors", "evaluations.jsonl", "metrics.jsonl", "run.json",
    "trunk cache", "substrate", "substrate rows", "report", "composition", "composition, config",
    "composition, both", "dev-v1.1.json", "ARC-Easy-Test.jsonl", "dev_rand_split.jsonl",
    "hellaswag_val.jsonl", "lambada_test.jsonl", "blimp.jsonl", "anatomy_test.csv",
    "lambada_test_plain_text.txt", "en-ru.tsv", "en-ru.en", "corpus.jsonl",
)  # fmt: skip


@pytest.fixture(scope="module")
def targets(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Target]:
    return make_all(tmp_path_factory.mktemp("fuzz") / "all")


def test_every_target_is_tried(targets: dict[str, Target]) -> None:
    assert tuple(targets) == NAMES


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_damaged_input_is_refused(name: str, targets: dict[str, Target]) -> None:
    target, draw = targets[name], random.Random(f"a short campaign: {name}")
    kinds: set[str] = set()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of libraries, about what the input holds
        for _ in range(round(INPUTS * min(1, max(target.weight, 0.05)))):
            given = target.make(draw)
            outcome = attempt(target, given)
            assert outcome.sound, (
                f"{outcome.kind} at {outcome.where}: {outcome.said}: {given!r:.2000}"
            )
            kinds.add(outcome.kind)
    if target.weight >= 0.3:
        assert kinds == {"accepted", "refused"}
