"""What trains and what does not, per kind of stage; adapters; the first values of new blocks."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from conftest import VOCABULARY, WIDTH, Build
from transformers import MixtralConfig, PreTrainedModel

from nacre.errors import ConfigError
from nacre.growth import ledger, stage
from nacre.growth.plan import Lora, Stage
from nacre.growth.trunk import RecomputedTrunk
from nacre.models import stock

ALL = ["llama", "gpt_neox", "qwen3", "qwen3_sliding", "gemma2", "gpt2", "opt"]
ATTENTION = ["self_attn.k_proj", "self_attn.o_proj", "self_attn.q_proj", "self_attn.v_proj"]
MLP = ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj"]
LLAMA_NORMS = ["input_layernorm", "post_attention_layernorm"]
NEOX_LINEAR = [
    "attention.dense",
    "attention.query_key_value",
    "mlp.dense_4h_to_h",
    "mlp.dense_h_to_4h",
]
LLAMA_OUTER = ["lm_head.weight", "model.norm.weight"]
GROW = Stage(add_blocks=1, tokens=64)
READJUST = Stage(add_blocks=1, tokens=64, lora=Lora(rank=2, alpha=4))


def llama_block(index: int) -> list[str]:
    return [f"model.layers.{index}.{n}.weight" for n in ATTENTION + MLP + LLAMA_NORMS]


def llama_adapters(*blocks: int) -> list[str]:
    return [
        f"model.layers.{index}.{name}.lora_{side}.default.weight"
        for index in blocks
        for name in ATTENTION + MLP
        for side in "AB"
    ]


@torch.no_grad()
def logits(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits


def train(model: PreTrainedModel, ids_BT: torch.Tensor, steps: int = 3) -> None:
    """Take real optimizer steps, weight decay included, over all parameters of the model."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05, weight_decay=0.1)
    model.train()
    for _ in range(steps):
        model(input_ids=ids_BT, labels=ids_BT, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


# --- the exact trainable set ---


def test_the_first_stage_trains_all_but_the_substrate(pico: Build) -> None:
    model = pico("llama")
    assert stage.choose_trainable(model, GROW, depth_below=0, seed=0) is None
    expected = llama_block(0) + llama_block(1) + LLAMA_OUTER
    assert stage.trainable_names(model) == sorted(expected)


def test_a_trained_substrate_trains_too(pico: Build) -> None:
    model = pico("llama")
    stage.choose_trainable(model, GROW, depth_below=0, seed=0, train_embedding=True)
    assert stage.trainable_names(model) == sorted(model.state_dict())


def test_a_stage_on_a_trunk_trains_its_blocks_norm_and_head(pico: Build) -> None:
    model = pico("llama", depth=3)
    stage.choose_trainable(model, GROW, depth_below=0, seed=0, train_embedding=True)
    stage.choose_trainable(model, GROW, depth_below=2, seed=0)  # whatever trained before
    assert stage.trainable_names(model) == sorted(llama_block(2) + LLAMA_OUTER)


def test_the_papers_block_on_a_trunk(pico: Build) -> None:
    model = pico("gpt_neox", depth=2)
    stage.choose_trainable(model, GROW, depth_below=1, seed=0)
    block = [
        *(f"{name}.weight" for name in NEOX_LINEAR),
        "mlp.dense_4h_to_h.bias",
        "mlp.dense_h_to_4h.bias",
        *(f"{n}.{kind}" for n in LLAMA_NORMS for kind in ("bias", "weight")),
    ]
    assert stage.trainable_names(model) == sorted(
        [f"gpt_neox.layers.1.{name}" for name in block]
        + ["gpt_neox.final_layer_norm.bias", "gpt_neox.final_layer_norm.weight", "lm_head.weight"]
    )


def test_reopened_blocks_train_beside_the_crown(pico: Build) -> None:
    model = pico("llama", depth=4)
    again = Stage(add_blocks=1, tokens=64, train="0-1")
    stage.choose_trainable(model, again, depth_below=3, seed=0)
    expected = [name for index in (0, 1, 3) for name in llama_block(index)]
    assert stage.trainable_names(model) == sorted(expected + LLAMA_OUTER)
    stage.choose_trainable(model, Stage(tokens=64, train="all"), depth_below=4, seed=0)
    expected = [name for index in range(4) for name in llama_block(index)]
    assert stage.trainable_names(model) == sorted(expected + LLAMA_OUTER)


def test_blocks_above_the_new_ones_train_on(pico: Build) -> None:
    model = pico("llama", depth=3)
    old = list(stock.find_parts(model).blocks)
    middle = Stage(add_blocks=1, under=1, tokens=64, init="copy")
    stage.add_blocks(model, 1, "copy", seed=0, under=1)
    stage.choose_trainable(model, middle, depth_below=3, seed=0)
    assert stage.trainable_names(model) == sorted(llama_block(2) + llama_block(3) + LLAMA_OUTER)
    new = stock.find_parts(model).blocks[2]
    for a, b in zip(old[1].parameters(), new.parameters(), strict=True):
        assert torch.equal(a, b), "a copy of the block just below"


@pytest.mark.parametrize(
    ("this", "message"),
    [
        (Stage(tokens=64, train="1-2"), "stages: train: blocks 1-2, but there are 2 blocks below"),
        (Stage(add_blocks=1, under=3, tokens=64), "stages: under: 3, but there are 2 blocks below"),
    ],
)
def test_blocks_that_are_not_there(this: Stage, message: str, pico: Build) -> None:
    model = pico("llama", depth=2)
    add = partial(stage.add_blocks, model, 1, "random", seed=0, under=this.under)
    choose = partial(stage.choose_trainable, model, this, depth_below=2, seed=0)
    with pytest.raises(ConfigError) as error:
        (add if this.add_blocks else choose)()
    assert str(error.value) == f"{message} (they are numbered from 0)"


def test_new_weights_are_drawn_on_the_cpu_alone(
    pico: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Where there are two GPUs, neither is woken, nor is its random state another afterwards."""

    def touched(*arguments: object) -> None:
        raise AssertionError("the state of a GPU was asked for or changed")

    model, before = pico("llama"), torch.get_rng_state()
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    for name in ("get_rng_state", "set_rng_state", "manual_seed_all"):
        monkeypatch.setattr(torch.cuda, name, touched)
    stage.add_blocks(model, 1, "random", seed=3)
    assert stage.choose_trainable(model, READJUST, depth_below=2, seed=3) is not None
    assert torch.equal(torch.get_rng_state(), before)


def test_adapters_train_beside_new_blocks(pico: Build) -> None:
    model = pico("llama", depth=5)
    stage.choose_trainable(model, READJUST, depth_below=4, seed=0)
    expected = llama_adapters(0, 1, 2, 3) + llama_block(4) + LLAMA_OUTER
    assert stage.trainable_names(model) == sorted(expected)


def test_adapters_alone_train_with_norm_and_head(pico: Build) -> None:
    model = pico("llama")
    only = Stage(tokens=64, lora=Lora(rank=2, alpha=4))
    stage.choose_trainable(model, only, depth_below=2, seed=0)
    assert stage.trainable_names(model) == sorted(llama_adapters(0, 1) + LLAMA_OUTER)


def test_adapters_without_a_trunk_are_left_out(pico: Build) -> None:
    model = pico("llama")
    assert stage.choose_trainable(model, READJUST, depth_below=0, seed=0) is None


@pytest.mark.parametrize(
    ("family", "frozen_too"),
    [("gpt2", "transformer.wpe.weight"), ("opt", "model.decoder.embed_positions.weight")],
)
def test_learned_positions_are_frozen(family: str, frozen_too: str, pico: Build) -> None:
    model = pico(family)
    stage.choose_trainable(model, GROW, depth_below=1, seed=0)
    parts = stock.find_parts(model)
    assert frozen_too in model.state_dict()
    prefixes = (f"{parts.blocks_name}.1.", f"{parts.norm_name}.", f"{parts.head_name}.")
    names = [name for name in model.state_dict() if name.startswith(prefixes)]
    assert stage.trainable_names(model) == sorted(names)


def test_a_model_without_a_final_norm_freezes_the_rest(pico: Build) -> None:
    model = pico("llama")
    model.model.norm = torch.nn.Identity()
    model.model.extra = torch.nn.Linear(2, 2)
    assert stock.find_parts(model).norm is None
    stage.choose_trainable(model, GROW, depth_below=1, seed=0)
    assert stage.trainable_names(model) == sorted([*llama_block(1), "lm_head.weight"])


# --- frozen means bit-identical ---


@pytest.mark.parametrize("step", [GROW, READJUST], ids=["grow", "lora"])
@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_training_moves_what_trains_and_nothing_else(
    family: str, step: Stage, pico: Build, ids: torch.Tensor
) -> None:
    model = pico(family)
    stage.choose_trainable(model, step, depth_below=1, seed=0)
    frozen = ledger.frozen_hashes(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    train(model, ids)
    ledger.verify_frozen(model, frozen)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == set(stage.trainable_names(model))
    assert moved.isdisjoint(frozen)
    assert moved | set(frozen) == set(before)


def test_a_wrong_choice_is_caught(pico: Build, ids: torch.Tensor) -> None:
    model = pico("llama")
    stage.choose_trainable(model, GROW, depth_below=1, seed=0)
    frozen = ledger.frozen_hashes(model)
    model.model.layers[0].input_layernorm.requires_grad_(True)
    train(model, ids)
    with pytest.raises(ledger.LedgerError, match=r"model\.layers\.0\.input_layernorm\.weight"):
        ledger.verify_frozen(model, frozen)


# --- new blocks ---


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("family", ALL)
def test_zero_preserves_the_logits_exactly(
    family: str, count: int, pico: Build, ids: torch.Tensor
) -> None:
    model = pico(family)
    before = logits(model, ids)
    stage.add_blocks(model, count, "zero", seed=3)
    assert len(stock.find_parts(model).blocks) == 2 + count
    assert torch.equal(logits(model, ids), before)


def test_zero_is_refused_where_it_would_change_the_logits() -> None:
    config = MixtralConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, intermediate_size=32, num_local_experts=3, num_experts_per_tok=2,
        max_position_embeddings=32, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = stock.build(config)
    with pytest.raises(ConfigError) as caught:
        stage.add_blocks(model, 1, "zero", seed=0)
    assert str(caught.value) == (
        "init: zero does not preserve the logits of a MixtralForCausalLM "
        "(use init: copy or init: random)"
    )


@pytest.mark.parametrize(
    ("count", "sources"), [(1, [2]), (2, [1, 2]), (3, [0, 1, 2]), (5, [0, 1, 2, 0, 1])]
)
def test_copy_copies_the_last_blocks_in_order(count: int, sources: list[int], pico: Build) -> None:
    model = pico("llama", depth=3)
    stage.add_blocks(model, count, "copy", seed=0)
    blocks = list(stock.find_parts(model).blocks)
    assert len(blocks) == 3 + count
    for block, source in zip(blocks[3:], sources, strict=True):
        original = blocks[source].state_dict()
        assert all(torch.equal(t, original[n]) for n, t in block.state_dict().items())
        assert all(p is not q for p in block.parameters() for q in blocks[source].parameters())


def test_random_blocks_depend_on_the_seed_alone(pico: Build) -> None:
    def new_weights(seed: int, noise: int) -> torch.Tensor:
        torch.manual_seed(noise)
        model = pico("gpt_neox")
        stage.add_blocks(model, 2, "random", seed=seed)
        blocks = stock.find_parts(model).blocks[2:]
        return torch.cat([p.flatten() for p in blocks.parameters()])

    assert torch.equal(new_weights(1, noise=5), new_weights(1, noise=6))
    assert not torch.equal(new_weights(1, noise=5), new_weights(2, noise=5))
    first, second = new_weights(1, noise=5).chunk(2)
    assert not torch.equal(first, second)


def test_growing_leaves_the_random_state_alone(pico: Build) -> None:
    model = pico("llama")
    before = torch.get_rng_state()
    for init in ("random", "copy", "zero"):
        stage.add_blocks(model, 1, init, seed=9)
    stage.choose_trainable(model, READJUST, depth_below=3, seed=9)
    assert torch.equal(torch.get_rng_state(), before)


# --- adapters ---


def shake(model: PreTrainedModel) -> None:
    """Give adapters something to say: their B sides start at zero."""
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            parameter.data += 0.1 * torch.randn_like(parameter)


@pytest.mark.parametrize("family", ALL)
def test_merging_gives_a_stock_model_back_twice(
    family: str, pico: Build, ids: torch.Tensor
) -> None:
    model = pico(family, depth=3)
    classes = {name: type(module) for name, module in model.named_modules()}
    keys = list(model.state_dict())
    for number in range(2):
        untouched = logits(model, ids)
        adapted = stage.choose_trainable(model, READJUST, depth_below=2, seed=number)
        assert adapted is not None
        assert torch.equal(logits(model, ids), untouched)  # B starts at zero
        shake(model)
        with_adapters = logits(model, ids)
        assert (with_adapters - untouched).abs().max() > 1e-4
        certificate = stage.merge_lora(adapted, ids)
        merged = logits(model, ids)
        largest = (merged - with_adapters).abs().max().item()
        assert certificate.largest_logit_difference == largest < 1e-5
        assert abs(certificate.loss_after - certificate.loss_before) < 1e-5
        linear = len(stock.linear_layers(stock.find_parts(model).blocks[0]))
        assert certificate.adapters == 2 * linear
        assert list(model.state_dict()) == keys
        assert {name: type(module) for name, module in model.named_modules()} == classes
        assert not hasattr(model, "peft_config")


def test_merging_moves_the_trunks_matrices_only(pico: Build, ids: torch.Tensor) -> None:
    model = pico("llama", depth=3)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    adapted = stage.choose_trainable(model, READJUST, depth_below=2, seed=0)
    assert adapted is not None
    shake(model)
    stage.merge_lora(adapted, ids)
    moved = {n for n, t in model.state_dict().items() if not torch.equal(t, before[n])}
    assert moved == {f"model.layers.{i}.{n}.weight" for i in (0, 1) for n in ATTENTION + MLP}


def test_a_certificate_as_plain_data() -> None:
    certificate = stage.MergeCertificate(1e-6, 3.0, 3.5, adapters=7)
    assert certificate.record() == {
        "largest_logit_difference": 1e-6,
        "loss_before": 3.0,
        "loss_after": 3.5,
        "loss_difference": 0.5,
        "adapters": 7,
    }


def test_a_certificates_loss_is_the_models(pico: Build, ids: torch.Tensor) -> None:
    model = pico("llama")
    adapted = stage.choose_trainable(model, READJUST, depth_below=1, seed=0)
    assert adapted is not None
    expected = model(input_ids=ids, labels=ids).loss.item()
    assert stage.merge_lora(adapted, ids).loss_before == pytest.approx(expected, abs=1e-6)


def test_adapters_that_broke_are_not_merged(pico: Build, ids: torch.Tensor) -> None:
    model = pico("llama")
    adapted = stage.choose_trainable(model, READJUST, depth_below=1, seed=0)
    assert adapted is not None
    model.get_parameter(llama_adapters(0)[1]).data.fill_(torch.nan)
    with pytest.raises(ValueError, match="NaN"):
        stage.merge_lora(adapted, ids)


def test_adapters_depend_on_the_seed_alone(pico: Build) -> None:
    def adapter(seed: int) -> torch.Tensor:
        model = pico("llama")
        stage.choose_trainable(model, READJUST, depth_below=1, seed=seed)
        return model.get_parameter(llama_adapters(0)[0])

    assert torch.equal(adapter(1), adapter(1))
    assert not torch.equal(adapter(1), adapter(2))


def test_ledger_names_lose_what_adapters_add(pico: Build) -> None:
    model = pico("llama", depth=3)
    plain = ledger.frozen_hashes(model)
    stage.choose_trainable(model, GROW, depth_below=2, seed=0)
    expected = ledger.frozen_hashes(model)
    assert expected != plain
    stage.choose_trainable(model, READJUST, depth_below=2, seed=0)
    assert stage.plain_names(ledger.frozen_hashes(model)) == expected


# --- the trunk ---


def test_a_recomputed_trunk_keeps_no_graph_and_drops_nothing(
    pico: Build, ids: torch.Tensor
) -> None:
    model = pico("gpt2")
    trunk = RecomputedTrunk(model, 1)
    expected = trunk(ids)
    model.train()
    trunk.train()
    h_BTD = trunk(ids)
    assert torch.equal(h_BTD, expected), "GPT-2 has dropout; a frozen trunk has not"
    assert not h_BTD.requires_grad
    assert stock.find_parts(model).blocks[1].training
