"""What only a GPU can show: `pytest -m gpu`. Numbers are the CPU's but for rounding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import CONTEXT, VOCABULARY, Build
from test_composed import RULES, compose

from nacre import folders
from nacre.evaluate.run import evaluate
from nacre.generation import Sampling, generate
from nacre.growth import plan as plans
from nacre.models.rules import Rule
from nacre.train import files, metrics
from nacre.train.grow import grow
from nacre.train.observer import Observer

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]
ROUNDING = 1e-4  # nats a token, of models this small in fp32
TEXT = "It was the best of times, it was the worst of times."


class Interrupted(Exception):
    pass


class Interrupt(Observer):
    """Ends a run in its second stage, after a saved state."""

    def trained(self, step: dict[str, Any]) -> None:
        if (step["stage"], step["step"]) == (2, 6):
            raise Interrupted


def plan(*settings: str) -> plans.Plan:
    """Three short stages in fp32, the last with adapters."""
    data = plans.load("tiny", ["training.precision=fp32", *settings]).model_dump(by_alias=True)
    data["training"] |= {"save_every": 4, "evaluate_every": 4, "validation_tokens": 1000}
    data["data"]["order"] = "restart"
    for stage in data["stages"]:
        stage["tokens"] = 256 * 10
    return plans.parse(data)


def losses(run: Path) -> list[float]:
    """Every training and held-out loss of a run, in order."""
    lines = metrics.read_metrics(run)
    return [line["loss"] if "loss" in line else line["validation"]["loss"] for line in lines]


@pytest.fixture(scope="module")
def recomputed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("gpu") / "run"
    grow(plan("trunk.mode=recompute"), out)
    assert files.read_json(out / folders.RUN)["machine"]["device"].startswith("cuda")
    return out


def test_a_cached_run_is_the_recomputed_one(recomputed: Path, tmp_path: Path) -> None:
    grow(plan("trunk.mode=cache"), tmp_path / "run")
    records = [files.read_record(stage) for stage in files.stages(tmp_path / "run")]
    assert [record["trunk_mode"] for record in records] == ["recompute", "cache", "whole"]
    assert losses(tmp_path / "run") == pytest.approx(losses(recomputed), abs=ROUNDING)


def test_an_interrupted_run_goes_on_as_if_it_were_not(recomputed: Path, tmp_path: Path) -> None:
    with pytest.raises(Interrupted):
        grow(plan("trunk.mode=recompute"), tmp_path / "run", observer=Interrupt())
    grow(None, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(recomputed), abs=ROUNDING)


def test_dropout_goes_on_where_it_was(tmp_path: Path) -> None:
    """Strong adapters and a high learning rate: another mask would show at once."""
    lora = "{rank: 8, alpha: 64, dropout: 0.5}"
    stages = f"stages=[{{add_blocks: 1, tokens: 512}}, {{tokens: 2560, lora: {lora}}}]"
    settings = ["training.lr=1e-2", "training.save_every=4", "training.precision=fp32", stages]
    dropping = plans.load("tiny", settings)
    grow(dropping, tmp_path / "whole")
    with pytest.raises(Interrupted):
        grow(dropping, tmp_path / "run", observer=Interrupt())
    grow(None, tmp_path / "run", resume=True)
    assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "whole"), abs=ROUNDING)


def test_scores_are_those_of_the_cpu(
    recomputed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "texts").mkdir()
    (tmp_path / "texts" / "en.txt").write_text("\n\n".join([TEXT] * 20))
    stage = recomputed / "stages" / "02"

    def scored(name: str) -> list[float]:
        found = evaluate([stage], data=tmp_path / "texts", out=tmp_path / name)
        return [record["value"] for record in found]

    on_gpu = scored("gpu.jsonl")
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert on_gpu == pytest.approx(scored("cpu.jsonl"), rel=ROUNDING)


def test_a_text_goes_on_as_on_the_cpu(recomputed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stage, greedy = recomputed / "stages" / "02", Sampling(max_new_tokens=10, temperature=0)
    on_gpu = "".join(generate(stage, "def ", greedy))
    monkeypatch.setenv("ACCELERATE_USE_CPU", "1")
    assert on_gpu == "".join(generate(stage, "def ", greedy))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.name)
def test_a_composition_reads_and_writes_as_on_the_cpu(
    rule: Rule, pico: Build, ids: torch.Tensor
) -> None:
    model = compose([pico("llama", seed=1), pico("gpt_neox", 3, seed=2), pico("llama", 1)], rule)
    expected = model(ids).logits
    model.to("cuda")
    found = model(ids.cuda())
    torch.testing.assert_close(found.logits.cpu(), expected, rtol=0, atol=ROUNDING)
    whole = model.generate(ids[:, :5].cuda(), max_new_tokens=CONTEXT - 5, do_sample=False)
    assert whole.device.type == "cuda"
    assert whole.shape == (len(ids), CONTEXT)
    assert whole.max() < VOCABULARY
    if rule.name != "top-k":  # which may switch later than one pass would
        logits = model(whole[:, :-1]).logits[:, 4:]
        chosen = logits.gather(-1, whole[:, 5:, None]).squeeze(-1)
        torch.testing.assert_close(chosen, logits.amax(-1), rtol=0, atol=ROUNDING)
