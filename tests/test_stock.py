"""Shapes: B batch, T positions, D width, V vocabulary; `ids_BT`, `h_BTD`."""

from __future__ import annotations

import pytest
import torch
from conftest import DEPTH, HEADS, VOCABULARY, WIDTH, Build, family_config
from transformers import (
    BartConfig,
    BertConfig,
    GPTNeoXForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MambaConfig,
    PreTrainedModel,
)

from nacre.models import stock

ALL = ["llama", "gpt_neox", "qwen3", "qwen3_sliding", "gemma2", "gpt2", "opt"]
SPLITTING = ["llama", "gpt_neox", "qwen3", "qwen3_sliding"]
WHOLE = ["gemma2", "gpt2", "opt"]


@torch.no_grad()
def logits(model: PreTrainedModel, ids_BT: torch.Tensor) -> torch.Tensor:
    return model(input_ids=ids_BT, use_cache=False).logits


# --- the contract: names in a checkpoint ---

LLAMA_BLOCK = {
    "input_layernorm.weight": (32,),
    "mlp.down_proj.weight": (32, 64),
    "mlp.gate_proj.weight": (64, 32),
    "mlp.up_proj.weight": (64, 32),
    "post_attention_layernorm.weight": (32,),
    "self_attn.k_proj.weight": (32, 32),
    "self_attn.o_proj.weight": (32, 32),
    "self_attn.q_proj.weight": (32, 32),
    "self_attn.v_proj.weight": (32, 32),
}
NEOX_BLOCK = {
    "attention.dense.weight": (32, 32),
    "attention.query_key_value.weight": (96, 32),
    "input_layernorm.bias": (32,),
    "input_layernorm.weight": (32,),
    "mlp.dense_4h_to_h.bias": (32,),
    "mlp.dense_4h_to_h.weight": (32, 64),
    "mlp.dense_h_to_4h.bias": (64,),
    "mlp.dense_h_to_4h.weight": (64, 32),
    "post_attention_layernorm.bias": (32,),
    "post_attention_layernorm.weight": (32,),
}
GOLDEN = {
    "llama": {
        "model.embed_tokens.weight": (64, 32),
        **{f"model.layers.{i}.{n}": shape for i in (0, 1) for n, shape in LLAMA_BLOCK.items()},
        "model.norm.weight": (32,),
        "lm_head.weight": (64, 32),
    },
    "gpt_neox": {
        "gpt_neox.embed_in.weight": (64, 32),
        **{f"gpt_neox.layers.{i}.{n}": shape for i in (0, 1) for n, shape in NEOX_BLOCK.items()},
        "gpt_neox.final_layer_norm.bias": (32,),
        "gpt_neox.final_layer_norm.weight": (32,),
        "lm_head.weight": (64, 32),
    },
}  # fmt: skip


@pytest.mark.parametrize("family", GOLDEN)
def test_state_dict_names_and_shapes_are_a_contract(family: str, pico: Build) -> None:
    state = pico(family).state_dict()
    assert {name: tuple(tensor.shape) for name, tensor in state.items()} == GOLDEN[family]


def test_models_are_the_stock_classes(pico: Build) -> None:
    assert type(pico("llama")) is LlamaForCausalLM
    assert type(pico("gpt_neox")) is GPTNeoXForCausalLM


def test_the_papers_block(pico: Build) -> None:
    config = pico("gpt_neox").config
    assert config.use_parallel_residual is False
    assert config.attention_bias is False
    assert config.hidden_act == "gelu"
    assert config.rope_parameters["partial_rotary_factor"] == 1.0
    assert config.rope_parameters["rope_theta"] == 10_000
    rotary = pico("gpt_neox").gpt_neox.rotary_emb
    assert len(rotary.inv_freq) == WIDTH // HEADS // 2


# --- parts ---


@pytest.mark.parametrize(
    ("family", "names"),
    [
        ("llama", ("model.embed_tokens", "model.layers", "model.norm")),
        ("qwen3", ("model.embed_tokens", "model.layers", "model.norm")),
        ("gpt_neox", ("gpt_neox.embed_in", "gpt_neox.layers", "gpt_neox.final_layer_norm")),
        ("gpt2", ("transformer.wte", "transformer.h", "transformer.ln_f")),
        (
            "opt",
            (
                "model.decoder.embed_tokens",
                "model.decoder.layers",
                "model.decoder.final_layer_norm",
            ),
        ),
    ],
)
def test_parts_are_found(family: str, names: tuple[str, str, str], pico: Build) -> None:
    model = pico(family)
    parts = stock.find_parts(model)
    assert (parts.embedding_name, parts.blocks_name, parts.norm_name) == names
    assert parts.head_name == "lm_head"
    assert len(parts.blocks) == DEPTH
    assert parts.norm is model.get_submodule(names[2])
    assert parts.embedding.weight is not parts.head.weight


def test_a_model_that_cannot_be_grown_is_refused() -> None:
    two_lists = BartConfig(
        vocab_size=VOCABULARY, d_model=WIDTH, encoder_layers=1, decoder_layers=1,
        encoder_ffn_dim=32, decoder_ffn_dim=32, encoder_attention_heads=2,
        decoder_attention_heads=2, max_position_embeddings=32,
    )  # fmt: skip
    model = stock.build(two_lists)
    model.config.num_hidden_layers = 7
    with pytest.raises(ValueError, match=r"BartForCausalLM has 0 lists of 7 blocks; one is needed"):
        stock.find_parts(model)
    base = LlamaForCausalLM(family_config("llama"))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="LlamaModel has no input embedding or no language-model"):
        stock.find_parts(base.model)


def test_other_decoders_have_parts_too() -> None:
    bert = BertConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=32, is_decoder=True,
    )  # fmt: skip
    mamba = MambaConfig(vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=3)
    for config in (bert, mamba):
        with torch.device("meta"):
            assert len(stock.find_parts(stock.build(config)).blocks) == 3


# --- trunk and crown ---


@pytest.mark.parametrize("depth", range(4))
@pytest.mark.parametrize("family", SPLITTING)
def test_crown_on_trunk_equals_whole(
    family: str, depth: int, pico: Build, ids: torch.Tensor
) -> None:
    model = pico(family, depth=3)
    whole = logits(model, ids)
    assert stock.splits_exactly(model, depth)
    with torch.no_grad():
        h_BTD = stock.lower(model, depth)(input_ids=ids, use_cache=False).last_hidden_state
        top = stock.upper(model, depth)(inputs_embeds=h_BTD, use_cache=False).last_hidden_state
        assert torch.equal(model.get_output_embeddings()(top), whole)
    assert torch.equal(logits(model, ids), whole)  # the views left the model alone
    assert len(stock.find_parts(model).blocks) == 3


@pytest.mark.parametrize("family", WHOLE)
def test_decoders_that_do_more_than_their_blocks_run_whole(family: str, pico: Build) -> None:
    assert not any(stock.splits_exactly(pico(family, depth=3), depth) for depth in range(4))


def test_asking_leaves_the_mode_alone(pico: Build) -> None:
    model = pico("llama").train()
    stock.splits_exactly(model, 1)
    assert all(module.training for module in model.modules())


def test_views_share_every_weight(pico: Build, ids: torch.Tensor) -> None:
    model = pico("llama")
    trunk, crown = stock.lower(model, 1), stock.upper(model, 1)
    own = {id(parameter) for parameter in model.parameters()}
    shared = {id(p) for view in (trunk, crown) for p in view.parameters()}
    assert shared == own - {id(model.lm_head.weight)}
    before = trunk(input_ids=ids, use_cache=False).last_hidden_state
    model.model.layers[0].mlp.down_proj.weight.data += 1
    assert not torch.equal(trunk(input_ids=ids, use_cache=False).last_hidden_state, before)


# --- growing ---


@pytest.mark.parametrize("family", ALL)
def test_new_blocks_are_of_the_models_own_kind(family: str, pico: Build, ids: torch.Tensor) -> None:
    model = pico(family)
    old = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    new = stock.add_blocks(model, 2)
    grown = pico(family, depth=4)
    assert model.config.num_hidden_layers == 4
    assert new == list(stock.find_parts(model).blocks)[2:]
    assert {n: t.shape for n, t in model.state_dict().items()} == {
        n: t.shape for n, t in grown.state_dict().items()
    }
    assert all(torch.equal(model.state_dict()[name], tensor) for name, tensor in old.items())
    assert not any(module.training for module in model.modules())
    assert torch.isfinite(logits(model, ids)).all()
    rebuilt = stock.build(model.config)  # the configuration describes the grown model
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(logits(rebuilt.eval(), ids), logits(model, ids))


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
def test_new_blocks_keep_a_key_value_cache_of_their_own(family: str, pico: Build) -> None:
    model = pico(family)
    stock.add_blocks(model, 2)
    prompt = torch.arange(6)[None]
    options = {"max_new_tokens": 6, "do_sample": False}
    cached = model.generate(prompt, use_cache=True, **options)
    assert torch.equal(cached, model.generate(prompt, use_cache=False, **options))


@pytest.mark.parametrize(
    ("family", "count", "kinds"),
    [
        ("qwen3_sliding", 1, "fss"),
        ("qwen3_sliding", 2, "fsfs"),
        ("qwen3_sliding", 5, "fsfsfsf"),
        ("gemma2", 2, "sfsf"),
        ("gemma2", 1, "sff"),
    ],
)
def test_kinds_of_new_blocks_are_those_of_the_last(
    family: str, count: int, kinds: str, pico: Build
) -> None:
    model = pico(family)
    stock.add_blocks(model, count)
    assert "".join(kind[0] for kind in model.config.layer_types) == kinds


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "qwen3_sliding"])
def test_blocks_go_under_the_last_ones(family: str, pico: Build, ids: torch.Tensor) -> None:
    model = pico(family, depth=3)
    first, second, third = stock.find_parts(model).blocks
    (new,) = stock.add_blocks(model, 1, under=2)
    assert list(stock.find_parts(model).blocks) == [first, new, second, third]
    rebuilt = stock.build(model.config)
    rebuilt.load_state_dict(model.state_dict())
    assert torch.equal(logits(rebuilt.eval(), ids), logits(model, ids))
    prompt = torch.arange(6)[None]
    cached = model.generate(prompt, use_cache=True, max_new_tokens=6, do_sample=False)
    plain = model.generate(prompt, use_cache=False, max_new_tokens=6, do_sample=False)
    assert torch.equal(cached, plain)


def test_blocks_under_others_are_of_the_kinds_just_below(pico: Build) -> None:
    model = pico("qwen3_sliding", depth=3)  # full, sliding, full
    stock.add_blocks(model, 1, under=1)
    kinds = ["full", "sliding", "sliding", "full"]
    assert model.config.layer_types == [f"{kind}_attention" for kind in kinds]


def test_a_new_block_has_the_models_dtype(pico: Build) -> None:
    model = pico("llama").to(torch.bfloat16)
    (block,) = stock.add_blocks(model, 1)
    assert {p.dtype for p in block.parameters()} == {torch.bfloat16}


def test_copied_weights_are_equal_and_not_shared(pico: Build) -> None:
    one, two = stock.find_parts(pico("llama")).blocks
    stock.copy_weights(one, two)
    for a, b in zip(one.parameters(), two.parameters(), strict=True):
        assert torch.equal(a, b)
        assert a.data_ptr() != b.data_ptr()


@pytest.mark.parametrize("family", ALL)
def test_zeroed_blocks_are_the_identity_and_can_learn(
    family: str, pico: Build, ids: torch.Tensor
) -> None:
    model = pico(family)
    blocks = stock.add_blocks(model, 1)
    stock.zero_outputs(model, blocks)
    zeroed = [n for n, p in blocks[0].named_parameters() if p.ndim > 1 and not p.any()]
    assert len(zeroed) == 2, "one for attention, one for the MLP"
    model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    assert all(blocks[0].get_parameter(name).grad.any() for name in zeroed)


def test_untie_gives_the_head_its_own_weight(ids: torch.Tensor) -> None:
    config = LlamaConfig(
        vocab_size=VOCABULARY, hidden_size=WIDTH, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=32, tie_word_embeddings=True, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    model = LlamaForCausalLM(config).eval()
    parts = stock.find_parts(model)
    assert parts.head.weight is parts.embedding.weight
    before = logits(model, ids)
    stock.untie(model)
    parts = stock.find_parts(model)
    assert parts.head.weight is not parts.embedding.weight
    assert torch.equal(parts.head.weight, parts.embedding.weight)
    assert torch.equal(logits(model, ids), before)
    assert model.config.tie_word_embeddings is False
    parts.head.weight.data.zero_()
    assert parts.embedding.weight.any()


def test_an_untied_model_is_saved_and_loaded_untied(ids: torch.Tensor, tmp_path) -> None:
    config = family_config("llama")
    config.tie_word_embeddings = True
    model = LlamaForCausalLM(config).eval()
    stock.untie(model)
    model.lm_head.weight.data += 1
    model.save_pretrained(tmp_path)
    again = LlamaForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(logits(again, ids), logits(model, ids))


def test_build_unties_and_leaves_its_config_alone() -> None:
    config = family_config("gpt2")
    config.tie_word_embeddings = True
    parts = stock.find_parts(stock.build(config))
    assert parts.head.weight is not parts.embedding.weight
    assert config.tie_word_embeddings is True
