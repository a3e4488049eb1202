"""Views of a trunk, its precision, how it leaves memory, what identifies it; a plan's section."""

from __future__ import annotations

from importlib.util import find_spec
from typing import Any

import pytest
import torch
from conftest import Build
from torch import nn
from transformers import PreTrainedModel

from nacre.errors import ConfigError
from nacre.growth import ledger, trunk
from nacre.growth import plan as plans
from nacre.growth.trunk import RecomputedTrunk
from nacre.models import stock
from nacre.train.loss import Objective

TORCHAO = pytest.mark.skipif(find_spec("torchao") is None, reason="torchao is not installed")
# torchao and torch do not always agree on what is deprecated; neither is ours.
QUIET = [pytest.mark.filterwarnings("ignore::" + w) for w in ("DeprecationWarning", "UserWarning")]


def hidden(model: PreTrainedModel, ids: torch.Tensor, depth: int) -> torch.Tensor:
    with torch.no_grad():
        return model(ids, use_cache=False, output_hidden_states=True).hidden_states[depth]


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("depth", [1, 2])
def test_the_trunk_is_what_the_model_computes(
    pico: Build, ids: torch.Tensor, family: str, depth: int
) -> None:
    model = pico(family, depth=3)
    h_BTD = RecomputedTrunk(model, depth)(ids)
    assert torch.equal(h_BTD, hidden(model, ids, depth))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("start", [1, 2])
def test_the_upper_part_of_a_trunk_goes_on_from_the_lower(
    pico: Build, ids: torch.Tensor, family: str, start: int
) -> None:
    model = pico(family, depth=4)
    below = RecomputedTrunk(model, start)(ids)
    assert torch.equal(RecomputedTrunk(model, 3, start)(below), RecomputedTrunk(model, 3)(ids))


def test_outputs_are_ordinary_tensors_without_history(pico: Build, ids: torch.Tensor) -> None:
    h_BTD = RecomputedTrunk(pico("llama"), 2)(ids)
    assert not h_BTD.requires_grad
    assert not h_BTD.is_inference()
    layer = nn.Linear(32, 1)
    layer(h_BTD).sum().backward()
    assert layer.weight.grad is not None


def test_a_trunk_has_no_dropout_even_in_training(ids: torch.Tensor) -> None:
    config = stock.FAMILIES["gpt_neox"](64, 32, 2, 64, 32, 2)
    config.hidden_dropout = config.attention_dropout = 0.5
    model = stock.build(config)
    view = RecomputedTrunk(model, 2)
    model.train()
    view.train()
    first = view(ids)
    assert torch.equal(first, view(ids))
    model.train()
    assert torch.equal(first, view(ids))


def test_a_trunk_keeps_its_precision_under_autocast(pico: Build, ids: torch.Tensor) -> None:
    view = RecomputedTrunk(pico("llama"), 2)
    plain = view(ids)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(view(ids), plain)


def test_the_upper_part_takes_what_was_stored_in_another_dtype(
    pico: Build, ids: torch.Tensor
) -> None:
    model = pico("llama", depth=3)
    stored = RecomputedTrunk(model, 1)(ids).bfloat16()
    h_BTD = RecomputedTrunk(model, 2, 1)(stored)
    assert h_BTD.dtype == torch.float32
    assert torch.equal(h_BTD, RecomputedTrunk(model, 2, 1)(stored.float()))


def test_only_what_is_frozen_loses_precision(pico: Build) -> None:
    model = pico("llama", depth=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trunk.reduce_precision(model, 2, torch.bfloat16)
    frozen = ("model.embed_tokens.", "model.layers.0.", "model.layers.1.")
    for name, tensor in model.state_dict().items():
        expected = before[name].bfloat16() if name.startswith(frozen) else before[name]
        assert tensor.dtype == expected.dtype, name
        assert torch.equal(tensor, expected), name
    assert RecomputedTrunk(model, 2).dtype == torch.bfloat16


def test_without_a_trunk_nothing_loses_precision(pico: Build) -> None:
    model = pico("llama")
    trunk.reduce_precision(model, 0, torch.bfloat16, "int8")
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
    assert not any("quant" in type(p).__name__.lower() for p in model.parameters())


@TORCHAO
@pytest.mark.parametrize("kind", ["int8", "fp8"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
class TestEightBits:
    pytestmark = QUIET

    def test_linear_layers_below_the_crown_take_eight_bits(
        self, pico: Build, ids: torch.Tensor, kind: Any, dtype: torch.dtype
    ) -> None:
        model = pico("llama", depth=3)
        plain = RecomputedTrunk(model, 2)(ids)
        trunk.reduce_precision(model, 2, dtype, kind)
        for name, parameter in model.named_parameters():
            linear = parameter.ndim == 2 and name.startswith(("model.layers.0", "model.layers.1"))
            assert (type(parameter.data) is not torch.Tensor) == linear, name
        h_BTD = RecomputedTrunk(model, 2)(ids)
        assert h_BTD.dtype == dtype
        error = (h_BTD.float() - plain).norm() / plain.norm()
        assert 0 < error < 0.05

    def test_it_leaves_memory(self, pico: Build, kind: Any, dtype: torch.dtype) -> None:
        model = pico("llama", depth=3)
        trunk.reduce_precision(model, 2, dtype, kind)
        trunk.unload(model, 2)
        assert all(p.is_meta for p in stock.find_parts(model).blocks[:2].parameters())


def test_missing_torchao_is_one_line(pico: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trunk, "find_spec", lambda name: None)
    trunk.require_torchao("auto")
    with pytest.raises(ConfigError) as caught:
        trunk.require_torchao("int8")
    (problem,) = caught.value.problems
    assert problem.field == "trunk.weights"
    assert "int8 needs torchao, which is not installed" in str(caught.value)
    assert "in a clone of nacre: pip install -e '.[quantize]', or trunk.weights: auto" in str(
        caught.value
    )
    with pytest.raises(ConfigError, match="fp8 needs torchao"):
        trunk.reduce_precision(pico("llama"), 1, torch.float32, "fp8")


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_an_unloaded_trunk_is_gone_and_the_crown_runs_on(
    pico: Build, ids: torch.Tensor, family: str
) -> None:
    model = pico(family, depth=3)
    h_BTD = RecomputedTrunk(model, 2)(ids)
    whole = Objective(model, 2, mode="recompute", exact=True)(ids, ids)
    before = {name: tensor.shape for name, tensor in model.state_dict().items()}
    trunk.unload(model, 2)
    parts = stock.find_parts(model)
    gone = [*parts.blocks[:2].parameters(), *parts.embedding.parameters()]
    assert all(parameter.is_meta for parameter in gone)
    objective = Objective(model, 2, mode="cache", exact=True)
    held = {id(p) for p in objective.parameters()}
    assert parts.norm is not None
    crown = [parts.blocks[2], parts.norm, parts.head]
    assert held == {id(p) for module in crown for p in module.parameters()}
    assert not any(p.is_meta for p in objective.parameters())
    assert torch.equal(objective(ids, ids, h_BTD), whole)
    assert {name: tensor.shape for name, tensor in model.state_dict().items()} == before


def identified(model: PreTrainedModel, depth: int = 2, *options: Any) -> str:
    hashes = {name: ledger.tensor_hash(tensor) for name, tensor in model.state_dict().items()}
    dtype, *weights = options or (torch.float32,)
    return trunk.fingerprint(model, hashes, depth, dtype, *weights)


def test_a_fingerprint_is_that_of_what_decides_the_outputs(pico: Build) -> None:
    model = pico("llama", depth=3)
    first = identified(model)
    assert identified(pico("llama", depth=3)) == first
    others = [
        identified(model, 1),
        identified(model, 3),
        identified(model, 2, torch.bfloat16),
        identified(model, 2, torch.float32, "int8"),
        identified(model, 2, torch.float32, "fp8"),
    ]
    assert len({first, *others}) == 6


@pytest.mark.parametrize(
    ("name", "counts"),
    [
        ("model.embed_tokens.weight", True),
        ("model.layers.0.self_attn.q_proj.weight", True),
        ("model.layers.1.input_layernorm.weight", True),
        ("model.layers.2.mlp.up_proj.weight", False),
        ("model.norm.weight", False),
        ("lm_head.weight", False),
    ],
)
def test_one_number_of_one_tensor_counts_below_the_crown(
    pico: Build, name: str, counts: bool
) -> None:
    model = pico("llama", depth=3)
    first = identified(model)
    model.state_dict()[name].view(-1)[0] += 1e-3
    assert (identified(model) != first) == counts


def test_more_blocks_on_top_leave_the_fingerprint(pico: Build) -> None:
    for family in ("llama", "qwen3_sliding"):
        model = pico(family, depth=3)
        first = identified(model)
        stock.add_blocks(model, 2)
        assert identified(model) == first, family


@pytest.mark.parametrize(
    ("field", "value"),
    [("rms_norm_eps", 1e-3), ("rope_parameters", {"rope_type": "default", "rope_theta": 5.0})],
)
def test_a_setting_that_changes_the_outputs_counts(pico: Build, field: str, value: Any) -> None:
    model = pico("llama", depth=3)
    first = identified(model)
    setattr(model.config, field, value)
    assert identified(model) != first


def test_the_kinds_of_the_blocks_count_below_the_crown(pico: Build) -> None:
    model = pico("qwen3_sliding", depth=3)
    first = identified(model)
    kinds = list(model.config.layer_types)
    assert kinds[0] != kinds[1]
    model.config.layer_types = [*kinds[:2], kinds[1]]
    assert identified(model) == first
    model.config.layer_types = [kinds[1], kinds[0], kinds[2]]
    assert identified(model) != first


def plan(trunk: Any = None, stages: Any = None) -> plans.Plan:
    stages = stages or [{"add_blocks": 1, "tokens": "8k"}] * 2
    return plans.parse({"stages": stages} | ({} if trunk is None else {"trunk": trunk}))


@pytest.mark.parametrize(
    ("text", "count"),
    [("20GB", 20 * 10**9), ("500MB", 5 * 10**8), ("1.5 GiB", 3 * 2**29), (0, 0), (1024, 1024)],
)
def test_sizes_of_disk(text: Any, count: int) -> None:
    assert plan({"cache_disk": text}).trunk.cache_disk == count


@pytest.mark.parametrize("text", ["much", "20 parsecs", "-5GB", "", []])
def test_bad_sizes_of_disk_are_refused_by_name(text: Any) -> None:
    with pytest.raises(ConfigError, match=r"trunk\.cache_disk") as caught:
        plan({"cache_disk": text})
    assert len(caught.value.problems) == 1


@pytest.mark.parametrize("field", ["mode", "weights", "cache_dtype"])
def test_unknown_choices_are_refused_by_name(field: str) -> None:
    with pytest.raises(ConfigError, match=rf"trunk\.{field}.*int4"):
        plan({field: "int4"})


def test_a_lora_stage_cannot_be_cached() -> None:
    lora = {"add_blocks": 1, "tokens": "8k", "lora": {"rank": 2}}
    with pytest.raises(ConfigError) as caught:
        plan(stages=[{"add_blocks": 1, "tokens": "8k"}, lora | {"trunk": "cache"}])
    (problem,) = caught.value.problems
    assert problem.field == "stages[1].trunk"
    assert "the adapters of lora change the trunk" in str(caught.value)
    assert "leave trunk or lora out" in str(caught.value)
    fine = [{"add_blocks": 1, "tokens": "8k"}, lora]
    assert plan({"mode": "cache"}, fine).trunk.mode == "cache"


def test_a_trunk_option_without_a_trunk_is_said() -> None:
    stage = {"add_blocks": 1, "tokens": "8k", "trunk": "cache"}
    said = plans.warnings(plan(stages=[stage, stage]))
    assert said == ["stages[0].trunk has no effect: there is no trunk yet"]


def test_how_the_trunk_runs_is_no_part_of_a_plans_identity() -> None:
    first = plan()
    free = plan({"mode": "cache", "cache_disk": "1GB"}, [
        {"add_blocks": 1, "tokens": "8k", "trunk": mode} for mode in ("auto", "recompute")
    ])  # fmt: skip
    assert free.fingerprint() == first.fingerprint()
    assert plan({"weights": "int8"}).fingerprint() != first.fingerprint()
    assert plan({"cache_dtype": "fp8"}).fingerprint() != first.fingerprint()
