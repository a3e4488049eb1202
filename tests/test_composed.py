"""Compositions against their experts alone: in one pass, in pieces, in batches, in generation."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import (
    GenerationConfig,
    LlamaConfig,
    PreTrainedModel,
    StoppingCriteria,
    StoppingCriteriaList,
)

from nacre.models import composed, stock
from nacre.models.composed import ComposedConfig, ComposedForCausalLM
from nacre.models.rules import Rule, mix

VOCABULARY = 64
Build = Callable[..., PreTrainedModel]

RULES = [
    Rule("mean-logits"),
    Rule("mean-probs"),
    Rule("weighted", weights=(1.0, 3.0, 0.0)),
    Rule("weighted", "logits", weights=(1.0, 3.0, 0.5)),
    Rule("posterior"),
    Rule("posterior", "logits", prior=(0.2, 0.5, 0.3), decay=1.0, floor=0.05),
    Rule("fixed-share", prior=(0.2, 0.5, 0.3), switch=0.05),
    Rule("entropy"),
    Rule("selective", threshold=0.03, prior=(0.2, 0.5, 0.3)),
    Rule("top-k", k=2, prior=(0.2, 0.5, 0.3)),
]
every_rule = pytest.mark.parametrize("rule", RULES, ids=lambda rule: json.dumps(rule.as_json()))


@pytest.fixture
def trio(pico: Build) -> list[PreTrainedModel]:
    """Three experts of two families and three depths."""
    return [pico("llama", seed=1), pico("gpt_neox", 3, seed=2), pico("llama", 1, seed=3)]


def compose(
    models: Sequence[PreTrainedModel], rule: Rule, parts: Sequence[Sequence[str]] | None = None
) -> Any:
    """Return a composition of experts `a`, `b` and so on."""
    names = "abcdefg"[: len(models)]
    given = parts or [[]] * len(models)
    experts = [{"name": n, "parts": list(p)} for n, p in zip(names, given, strict=True)]
    return ComposedForCausalLM(ComposedConfig(experts, rule.as_json(), VOCABULARY, 32), models)


def alone(model: PreTrainedModel, ids: torch.Tensor) -> torch.Tensor:
    """Return an expert's own logits, fp32 `[B, T, V]`."""
    with torch.no_grad():
        return model(input_ids=ids).logits.float()


def mixed(model: Any, ids: torch.Tensor, **options: Any) -> torch.Tensor:
    """Return a composition's logits `[B, T, V]` in one pass."""
    logits = model(input_ids=ids, **options).logits
    assert logits is not None
    assert logits.isfinite().all()
    return logits


def naive(rule: Rule, logits: Sequence[torch.Tensor], ids: torch.Tensor) -> torch.Tensor:
    """Return what `mix` makes of whole texts' logits `[B, T, V]`."""
    observed = torch.zeros(len(logits), *ids.shape)
    for expert, one in enumerate(logits):
        log_p = one.double().log_softmax(-1)[:, :-1]
        observed[expert, :, 1:] = log_p.gather(-1, ids[:, 1:, None]).squeeze(-1)
    return mix(rule, logits, observed).output_BTV


def close(found: torch.Tensor | None, expected: torch.Tensor, atol: float = 1e-5) -> None:
    """Assert that two fp32 tensors agree within `atol`."""
    assert found is not None
    torch.testing.assert_close(found, expected, rtol=0, atol=atol)


def in_pieces(
    model: Any, ids: torch.Tensor, sizes: Sequence[int], **options: Any
) -> tuple[torch.Tensor, torch.Tensor, Any]:
    """Read a text in pieces; return logits, log weights and the cache."""
    cache, logits, weights, start = None, [], [], 0
    mask = options.get("attention_mask")
    for size in sizes:
        stop = start + size
        seen = {} if mask is None else {"attention_mask": mask[:, :stop]}
        output = model(input_ids=ids[:, start:stop], past_key_values=cache, **seen)
        cache = output.past_key_values
        logits.append(output.logits)
        weights.append(output.log_weights)
        start = stop
    return torch.cat(logits, 1), torch.cat(weights, -1), cache


# ---- one pass


def test_mean_logits_is_the_mean_of_the_logits(
    trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    expected = sum(alone(model, ids).double() for model in trio) / 3
    assert isinstance(expected, torch.Tensor)
    close(mixed(compose(trio, RULES[0]), ids), expected.float(), 1e-6)


@every_rule
def test_one_pass_is_the_rule_on_the_experts_own_logits(
    rule: Rule, trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    expected = naive(rule, [alone(model, ids) for model in trio], ids)
    close(mixed(compose(trio, rule), ids), expected, 2e-6)


@pytest.mark.parametrize(
    ("rule", "sizes"),
    [
        (rule, sizes)
        for rule in RULES
        for sizes in ([1] * 16, [5, 1, 1, 9], [8, 8])
        if rule.name != "top-k" or 1 not in sizes  # single steps may skip experts
    ],
    ids=lambda value: str(value) if isinstance(value, list) else value.name,
)
def test_any_split_is_one_pass(
    rule: Rule, sizes: list[int], trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(trio, rule)
    whole = model(input_ids=ids)
    logits, weights, cache = in_pieces(model, ids, sizes)
    close(logits, whole.logits)
    close(weights.exp(), whole.log_weights.exp())
    assert cache.get_seq_length() == 16
    if rule.reads_text:
        torch.testing.assert_close(
            cache.state_EB, whole.past_key_values.state_EB, rtol=0, atol=1e-4
        )


@every_rule
def test_tiles_change_nothing(
    rule: Rule,
    trio: list[PreTrainedModel],
    ids: torch.Tensor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = compose(trio, rule)
    whole = model(input_ids=ids)
    kept = mixed(model, ids, logits_to_keep=5)
    close(kept, whole.logits[:, -5:])
    monkeypatch.setattr(composed, "TILE_BYTES", (1, 3 * 4 * 3 * VOCABULARY * 4))
    tiled = model(input_ids=ids)
    close(tiled.logits, whole.logits)
    close(tiled.log_weights.exp(), whole.log_weights.exp())
    close(mixed(model, ids, logits_to_keep=5), kept)
    assert mixed(model, ids, logits_to_keep=99).shape[1] == 16
    logits, _, _ = in_pieces(model, ids, [9, 7])
    close(logits, whole.logits)


@every_rule
def test_identical_experts_are_one(rule: Rule, pico: Build, ids: torch.Tensor) -> None:
    model = pico("llama")
    expected = alone(model, ids)
    found = mixed(compose([copy.deepcopy(model) for _ in range(3)], rule), ids)
    close(found, expected if rule.mixes_logits else expected.log_softmax(-1))


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2", "gemma2"])
def test_one_expert_is_the_identity(family: str, pico: Build, ids: torch.Tensor) -> None:
    model = pico(family)
    expected = alone(model, ids)
    for rule in (
        Rule("mean-logits"),
        Rule("weighted", "logits", weights=(2.0,)),
        Rule("posterior", "logits"),
    ):
        assert torch.equal(mixed(compose([model], rule), ids), expected)
    for rule in (Rule("mean-probs"), Rule("posterior"), Rule("top-k"), Rule("entropy")):
        assert torch.equal(mixed(compose([model], rule), ids), expected.log_softmax(-1))


def test_all_weight_on_one_is_that_one_and_the_other_never_runs(
    trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    runs = count_runs(trio[1:])
    for rule in (
        Rule("weighted", "logits", weights=(1.0, 0.0, 0.0)),
        Rule("posterior", "logits", prior=(1.0, 0.0, 0.0)),
    ):
        model = compose(trio, rule)
        runs.clear()
        assert torch.equal(mixed(model, ids), alone(trio[0], ids))
        output = model.generate(ids[:1, :4], max_new_tokens=4, do_sample=False)
        expected = trio[0].generate(ids[:1, :4], max_new_tokens=4, do_sample=False)  # pyright: ignore
        assert torch.equal(output, expected)
        assert not runs


@every_rule
def test_the_order_of_experts_changes_nothing(
    rule: Rule, trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    order = [2, 0, 1]
    numbers: dict[str, Any] = {}
    for key in ("weights", "prior"):
        if (given := getattr(rule, key)) is not None:
            numbers[key] = tuple(given[index] for index in order)
    turned = Rule(**{**rule.as_json(), **numbers})
    found = compose([trio[index] for index in order], turned)(input_ids=ids)
    expected = compose(trio, rule)(input_ids=ids)
    close(found.logits, expected.logits)
    close(found.log_weights, expected.log_weights[order])


def test_families_and_widths_go_together(pico: Build, ids: torch.Tensor) -> None:
    wide = stock.build(stock.llama_config(VOCABULARY, 48, 3, 64, 32, 2)).eval()
    models = [pico("llama"), pico("gpt_neox"), pico("gpt2"), pico("gemma2"), wide]
    for rule in (Rule("mean-logits"), Rule("posterior"), Rule("top-k", k=1)):
        model = compose(models, rule)
        assert model.exact == [True, True, False, False, True]
        expected = naive(rule, [alone(one, ids) for one in models], ids)
        close(mixed(model, ids), expected)
        if rule.name != "top-k":
            logits, _, _ = in_pieces(model, ids, [7] + [1] * 9)
            close(logits, expected)


@pytest.mark.parametrize("family", ["qwen3_sliding", "opt"])
def test_windows_and_offsets_survive_the_cache(family: str, pico: Build, ids: torch.Tensor) -> None:
    models = [pico(family, 4, seed=1), pico(family, 2, seed=2)]
    model = compose(models, Rule("posterior"))
    expected = naive(Rule("posterior"), [alone(one, ids) for one in models], ids)
    close(mixed(model, ids), expected)
    close(in_pieces(model, ids, [3] + [1] * 13)[0], expected)


def test_bf16_experts_mix_in_fp32(trio: list[PreTrainedModel], ids: torch.Tensor) -> None:
    model = compose(trio, Rule("posterior")).to(torch.bfloat16)
    assert model.dtype == torch.bfloat16
    expected = naive(Rule("posterior"), [alone(one, ids) for one in trio], ids)
    assert mixed(model, ids).dtype == torch.float32
    close(mixed(model, ids), expected, 2e-2)
    assert model.generate(ids[:, :4], max_new_tokens=3, do_sample=False).shape == (3, 7)


@every_rule
def test_extreme_logits_stay_finite(
    rule: Rule, trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    with torch.no_grad():
        stock.find_parts(trio[1]).head.weight.mul_(1e4)
    model = compose(trio, rule)
    whole = mixed(model, ids)
    assert whole.max() - whole.min() < 1e9
    logits, weights, _ = in_pieces(model, ids, [4] + [1] * 12)
    assert logits.isfinite().all()
    assert not weights.isnan().any()


# ---- adding and removing


@every_rule
def test_a_removed_expert_leaves_nothing_behind(
    rule: Rule, trio: list[PreTrainedModel], pico: Build, ids: torch.Tensor
) -> None:
    before = [alone(one, ids) for one in trio]
    model = compose(trio, rule)
    if rule.weights or rule.prior:
        with pytest.raises(ValueError, match=r"(weights|prior): .*4 numbers"):
            model.add_expert(pico("gpt2", seed=9), "new")
    else:
        never = mixed(model, ids)
        model.add_expert(pico("gpt2", seed=9), "new")
        assert not torch.equal(mixed(model, ids), never)
        model.remove_expert("new")
        assert torch.equal(mixed(model, ids), never)
    assert model.expert_names == ["a", "b", "c"]
    model.remove_expert("b")
    numbers = {
        key: tuple(n for i, n in enumerate(given) if i != 1)
        for key in ("weights", "prior")
        if (given := getattr(rule, key)) is not None
    }
    left = Rule(**{**rule.as_json(), **numbers})
    assert torch.equal(mixed(model, ids), mixed(compose([trio[0], trio[2]], left), ids))
    for one, expected in zip(trio, before, strict=True):
        assert torch.equal(alone(one, ids), expected)
    assert Rule.parse(model.config.mix, 2) == left


def test_k_shrinks_with_the_experts(trio: list[PreTrainedModel], ids: torch.Tensor) -> None:
    model = compose(trio, Rule("top-k", k=3))
    model.remove_expert("a")
    assert model.config.mix["k"] == 2
    close(mixed(model, ids), mixed(compose(trio[1:], Rule("posterior")), ids))


def test_what_cannot_be_added_or_removed_changes_nothing(
    trio: list[PreTrainedModel], pico: Build, ids: torch.Tensor
) -> None:
    model = compose(trio, Rule("weighted", weights=(1.0, 0.0, 0.0)))
    expected = mixed(model, ids)
    small = stock.build(stock.llama_config(40, 32, 2, 64, 32, 1))
    refusals: list[tuple[Callable[[], object], str]] = [
        (lambda: model.add_expert(pico("llama"), "a"), "there is an expert 'a' already"),
        (lambda: model.add_expert(pico("llama"), "d"), r"weights: .*4 numbers"),
        (lambda: model.remove_expert("z"), r"no expert 'z' .*there are: a, b, c"),
        (lambda: model.remove_expert("a"), r"weights: \(0.0, 0.0\) .*not all 0"),
    ]
    for call, message in refusals:
        with pytest.raises(ValueError, match=message):
            call()
        assert model.expert_names == ["a", "b", "c"]
        assert len(model.experts) == 3
        assert torch.equal(mixed(model, ids), expected)
    model = compose(trio, Rule("posterior"))
    with pytest.raises(ValueError, match="d: 40 tokens, the composition 64"):
        model.add_expert(small, "d")
    with pytest.raises(ValueError, match="d: 2 parts for an embedding, 2 blocks"):
        model.add_expert(pico("llama"), "d", parts=["e", "0"])
    one = compose(trio[:1], Rule("posterior"))
    with pytest.raises(ValueError, match=r"no expert 'a' that could be removed"):
        one.remove_expert("a")


def test_an_expert_in_training_is_added_for_reading(
    trio: list[PreTrainedModel], pico: Build, ids: torch.Tensor
) -> None:
    new = pico("gpt2")
    expected = alone(new, ids)
    model = compose(trio, Rule("mean-logits"))
    model.add_expert(new.train(), "new")
    model.remove_expert("a")
    model.remove_expert("b")
    model.remove_expert("c")
    assert torch.equal(mixed(model, ids), expected)


def test_what_does_not_fit_the_config_is_refused(trio: list[PreTrainedModel]) -> None:
    config = compose(trio, Rule("posterior")).config
    with pytest.raises(ValueError, match="2 experts, but the config names 3"):
        ComposedForCausalLM(config, trio[:2])
    config.experts[1]["name"] = "a"
    with pytest.raises(ValueError, match="two experts of one name: a, a, c"):
        ComposedForCausalLM(config, trio)
    with pytest.raises(ValueError, match="name: 'mean'"):
        ComposedForCausalLM(ComposedConfig(config.experts[1:], {"name": "mean"}, 64), trio[1:])


# ---- shared trunks


def branch(model: PreTrainedModel, keep: int, seed: int) -> PreTrainedModel:
    """Return a copy whose blocks from `keep` on, norm and head are other ones."""
    new = copy.deepcopy(model)
    parts = stock.find_parts(new)
    generator = torch.Generator().manual_seed(seed)
    upper: list[nn.Module] = [*parts.blocks[keep:], parts.head]
    for module in upper:
        for weight in module.parameters():
            noise = torch.randn(weight.shape, generator=generator)
            weight.data += 0.1 * noise
    return new


def family_tree(pico: Build, family: str) -> tuple[list[PreTrainedModel], list[list[str]]]:
    """Return A, B (2 blocks of A), C (1 block of A), D (apart) and their parts' hashes."""
    a = pico(family, 4, seed=1)
    models = [a, branch(a, 2, 2), branch(a, 1, 3), pico(family, 3, seed=4)]
    parts = [["e", "0", "1", "a2", "a3"], ["e", "0", "1", "b2", "b3"], ["e", "0", "c1", "c2", "c3"]]
    return models, [*parts, ["f", "d0", "d1", "d2"]]


def count_runs(models: Sequence[PreTrainedModel]) -> list[nn.Module]:
    """Return a list to which every run of a block of these models is added, as it happens."""
    runs: list[nn.Module] = []
    for block in {id(b): b for m in models for b in stock.find_parts(m).blocks}.values():
        block.register_forward_pre_hook(lambda module, _: runs.append(module))
    return runs


@pytest.mark.parametrize("family", ["llama", "gpt_neox"])
@pytest.mark.parametrize("rule", RULES[4:6], ids=["probs", "logits"])
def test_shared_trunks_change_no_bit(
    family: str, rule: Rule, pico: Build, ids: torch.Tensor
) -> None:
    rule = Rule(rule.name, rule.domain)
    models, parts = family_tree(pico, family)
    apart = compose(copy.deepcopy(models), rule)
    expected = mixed(apart, ids)
    stepped, _, _ = in_pieces(apart, ids, [5] + [1] * 11)
    beams = {"num_beams": 3, "max_new_tokens": 5, "do_sample": False}
    ranked = apart.generate(ids[:, :4], **beams)
    own = sum(p.numel() for p in apart.parameters())
    shared = compose(models, rule, parts)
    assert torch.equal(mixed(shared, ids), expected)
    logits, _, cache = in_pieces(shared, ids, [5] + [1] * 11)
    assert torch.equal(logits, stepped)
    assert torch.equal(shared.generate(ids[:, :4], **beams), ranked)
    a, b, c, d = shared.parts
    block, table = (sum(p.numel() for p in m.parameters()) for m in (a.blocks[0], a.embedding))
    assert own - sum(p.numel() for p in shared.parameters()) == 3 * block + 2 * table
    assert a.blocks[0] is b.blocks[0] is c.blocks[0]
    assert a.blocks[1] is b.blocks[1]
    assert a.blocks[1] is not c.blocks[1]
    assert a.embedding.weight.data_ptr() == c.embedding.weight.data_ptr()
    assert a.embedding.weight.data_ptr() != d.embedding.weight.data_ptr()
    layers = [layer for keys in cache.keys for layer in keys.layers]
    assert len(layers) == 4 + 2 + 3 + 3
    assert all(layer.keys.shape[2] == 16 for layer in layers)
    runs = count_runs(models)
    mixed(shared, ids)
    assert len(runs) == len(set(runs)) == 12


def test_removing_the_owner_of_a_trunk_leaves_it_to_the_others(
    pico: Build, ids: torch.Tensor
) -> None:
    models, parts = family_tree(pico, "llama")
    expected = mixed(compose(copy.deepcopy(models[1:]), Rule("posterior")), ids)
    model = compose(models, Rule("posterior"), parts)
    model.remove_expert("a")
    assert torch.equal(mixed(model, ids), expected)
    runs = count_runs(models[1:])
    mixed(model, ids)
    assert len(runs) == 1 + 3 + 3 + 3
    model.add_expert(pico("llama", 4, seed=1), "a", parts=parts[0])
    assert model.parts[3].blocks[1] is model.parts[0].blocks[1]


def test_an_expert_may_be_the_trunk_of_another(pico: Build, ids: torch.Tensor) -> None:
    whole = pico("llama", 3, seed=1)
    stage = copy.deepcopy(whole)
    parts = stock.find_parts(stage)
    del parts.blocks[2:]
    stage.config.num_hidden_layers = 2
    parts.head.weight.data.mul_(1.5)
    hashes = [["e", "0", "1", "2"], ["e", "0", "1"]]
    for order in (slice(None), slice(None, None, -1)):
        apart = compose(copy.deepcopy([whole, stage][order]), Rule("posterior"))
        shared = compose(copy.deepcopy([whole, stage][order]), Rule("posterior"), hashes[order])
        assert torch.equal(mixed(shared, ids), mixed(apart, ids))
        sizes = [5] + [1] * 11
        assert torch.equal(in_pieces(shared, ids, sizes)[0], in_pieces(apart, ids, sizes)[0])
        mask = padded(ids, [3, 0, 6])[1]
        options = {"attention_mask": mask, "max_new_tokens": 4, "do_sample": False}
        assert torch.equal(shared.generate(ids, **options), apart.generate(ids, **options))
    twice = compose([whole, copy.deepcopy(whole)], Rule("posterior"), [hashes[0]] * 2)
    close(mixed(twice, ids), alone(whole, ids).log_softmax(-1))


def test_what_does_not_split_is_not_shared(pico: Build, ids: torch.Tensor) -> None:
    for family in ("gpt2", "gemma2"):
        models = [pico(family), pico(family)]
        model = compose(models, Rule("posterior"), [["e", "0", "1"]] * 2)
        assert len(model.layout.segments) == 2
        close(mixed(model, ids), alone(models[0], ids).log_softmax(-1))


# ---- padding


def padded(ids: torch.Tensor, pads: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids and mask in which each row's first tokens are padding."""
    mask = torch.ones_like(ids)
    for row, count in enumerate(pads):
        mask[row, :count] = 0
    return ids.masked_fill(mask == 0, 0), mask


@every_rule
def test_padding_changes_nothing(
    rule: Rule, trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(trio, rule)
    left, mask = padded(ids, [4, 0, 11])
    one_pass = mixed(model, left, attention_mask=mask)
    pieces = in_pieces(model, left, [6, 4, 6], attention_mask=mask)[0]
    right, right_mask = left.clone(), mask.clone()
    for row, count in enumerate([4, 0, 11]):
        right[row], right_mask[row] = left[row].roll(-count), mask[row].roll(-count)
    scored = mixed(model, right, attention_mask=right_mask)
    for row, count in enumerate([4, 0, 11]):
        expected = mixed(model, ids[row : row + 1, count:])[0]
        close(one_pass[row, count:], expected)
        close(pieces[row, count:], expected)
        close(scored[row, : 16 - count], expected)


@every_rule
def test_padded_prompts_generate_what_each_does_alone(
    rule: Rule, trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(trio, rule)
    left, mask = padded(ids, [4, 0, 11])
    together = model.generate(left, attention_mask=mask, max_new_tokens=6, do_sample=False)
    if rule.name == "top-k":
        return  # which experts run, so which catch up, hangs on all rows
    for row, count in enumerate([4, 0, 11]):
        one = model.generate(ids[row : row + 1, count:], max_new_tokens=6, do_sample=False)
        assert torch.equal(together[row, 16:], one[0, 16 - count :])


# ---- top-k


def of_domain(model: PreTrainedModel, tokens: slice) -> PreTrainedModel:
    """Give a model's head a bias towards some tokens."""
    head = stock.find_parts(model).head
    head.bias = nn.Parameter(torch.zeros(VOCABULARY))
    head.bias.data[tokens] = 5.0
    return model


@pytest.fixture
def two_domains(pico: Build) -> list[PreTrainedModel]:
    """An expert for tokens 0 to 31 and one for the others."""
    low = of_domain(pico("llama", seed=1), slice(0, 32))
    return [low, of_domain(pico("gpt_neox", seed=2), slice(32, 64))]


def switching(ids: torch.Tensor, at: int) -> torch.Tensor:
    """Return ids that are tokens 0 to 31 up to a position and others from there on."""
    low = ids % 32
    return torch.cat([low[:, :at], low[:, at:] + 32], 1)


def test_all_experts_in_top_k_are_the_posterior(
    trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    top, plain = compose(trio, Rule("top-k", k=3)), compose(trio, Rule("posterior"))
    close(mixed(top, ids), mixed(plain, ids), 1e-6)
    sizes = [4] + [1] * 12
    close(in_pieces(top, ids, sizes)[0], in_pieces(plain, ids, sizes)[0], 1e-6)
    options = {"max_new_tokens": 8, "do_sample": False}
    assert torch.equal(top.generate(ids[:, :5], **options), plain.generate(ids[:, :5], **options))


@pytest.mark.parametrize("decay", [0.9, 1.0])
def test_a_skipped_expert_rests_and_catches_up_exactly(
    decay: float, two_domains: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(two_domains, Rule("top-k", k=1, decay=decay))
    text = switching(ids[:1], 10)
    lengths: list[list[int]] = [[], []]
    for expert, one in enumerate(two_domains):
        block: Any = stock.find_parts(one).blocks[0]
        block.register_forward_pre_hook(
            lambda _, given, expert=expert: lengths[expert].append(given[0].shape[1])
        )
    cache = model(input_ids=text[:, :4]).past_key_values
    rested, states, weights = [], [], []
    for at in range(4, 16):
        output = model(input_ids=text[:, at : at + 1], past_key_values=cache)
        states.append(cache.state_EB.clone())
        rested.append([at + 1 - read for read in cache.read])
        weights.append(output.log_weights[:, 0, 0].exp().round().tolist())
        prefix = model(input_ids=text[:, : at + 1])
        lengths[0].pop()
        lengths[1].pop()
        for expert in (0, 1):
            if not rested[-1][expert]:
                expected = prefix.past_key_values.state_EB[expert]
                torch.testing.assert_close(states[-1][expert], expected, rtol=0, atol=1e-4)
    back = next(step for step, (_, behind) in enumerate(rested) if behind == 0 and step >= 6)
    if decay < 1:
        assert [behind for _, behind in rested[:back]] == list(range(1, back + 1))
        assert lengths[1][:2] == [4, back + 1]
        assert weights[-1] == [0.0, 1.0]
        assert rested[-1][0] > 0
    assert all(one == [1.0, 0.0] for one in weights[:6])
    assert sum(lengths[1]) == cache.read[1]


def test_rows_of_two_domains_run_both(
    two_domains: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(two_domains, Rule("top-k", k=1))
    text = torch.cat([switching(ids[:1], 16), switching(ids[:1], 0)])
    logits, weights, cache = in_pieces(model, text, [4] + [1] * 12)
    assert cache.read == [16, 16]
    assert weights[:, :, -1].exp().tolist() == [[1.0, 0.0], [0.0, 1.0]]
    for row, one in enumerate(two_domains):
        close(logits[row, 4:], alone(one, text[row : row + 1]).log_softmax(-1)[0, 4:])


def test_a_shared_trunk_runs_for_skipped_experts_too(pico: Build, ids: torch.Tensor) -> None:
    low = of_domain(pico("llama", 3, seed=1), slice(0, 32))
    high = of_domain(branch(low, 2, 5), slice(32, 64))
    apart = compose(copy.deepcopy([low, high]), Rule("top-k", k=1))
    hashes = [["e", "0", "1", "a"], ["e", "0", "1", "b"]]
    shared = compose([low, high], Rule("top-k", k=1), hashes)
    text, sizes = switching(ids, 9), [4] + [1] * 12
    runs = count_runs([low, high])
    found = in_pieces(shared, text, sizes)
    close(found[0], in_pieces(apart, text, sizes)[0])
    per_block = [
        runs.count(block) for block in (*shared.parts[0].blocks, shared.parts[1].blocks[2])
    ]
    assert per_block[:2] == [13, 13]
    assert max(per_block[2:]) < 13
    assert found[1][1, :, -1].exp().tolist() == [1.0] * 3


def test_what_waits_is_reordered_with_the_beams(
    two_domains: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(two_domains, Rule("top-k", k=1))
    text = switching(ids, 9)
    order = torch.tensor([2, 0, 0])
    sizes = [4] + [1] * 5
    cache = in_pieces(model, text, sizes)[2]
    other = in_pieces(model, text[order], sizes)[2]
    assert cache.read == other.read == [9, 4]
    cache.reorder_cache(order)
    for at in range(9, 16):
        token = text[order, at : at + 1]
        found = model(input_ids=token, past_key_values=cache).logits
        close(found, model(input_ids=token, past_key_values=other).logits)
    assert cache.read[1] == 16
    torch.testing.assert_close(cache.state_EB, other.state_EB)


def test_a_chunk_after_steps_is_read_by_all(
    two_domains: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(two_domains, Rule("top-k", k=1))
    text = switching(ids, 16)
    whole = model(input_ids=text)
    cache = in_pieces(model, text, [4, 1, 1, 1])[2]
    assert cache.read == [7, 4]
    output = model(input_ids=text[:, 7:], past_key_values=cache)
    close(output.logits, whole.logits[:, 7:])
    expected = whole.past_key_values.state_EB
    torch.testing.assert_close(cache.state_EB, expected, rtol=0, atol=1e-4)
    assert cache.read == [16, 16]


# ---- generation


@every_rule
def test_greedy_is_the_argmax_of_one_pass(
    rule: Rule, trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(trio, rule)
    text = model.generate(ids[:, :5], max_new_tokens=10, do_sample=False)
    assert text.shape == (3, 15)
    if rule.name != "top-k":
        assert torch.equal(mixed(model, text).argmax(-1)[:, 4:-1], text[:, 5:])
        again = model.generate(ids[:, :5], max_new_tokens=10, do_sample=False, use_cache=False)
        assert torch.equal(again, text)


def test_sampling_repeats_with_its_seed(trio: list[PreTrainedModel], ids: torch.Tensor) -> None:
    model = compose(trio, Rule("posterior"))
    options: dict[str, Any] = {"max_new_tokens": 8, "do_sample": True, "num_return_sequences": 3}
    texts = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        texts.append(model.generate(ids[:2, :4], **options))
    assert texts[0].shape == (6, 12)
    assert torch.equal(texts[0], texts[1])
    assert not torch.equal(texts[0], texts[2])
    assert torch.equal(texts[0][:, :4], ids[:2, :4].repeat_interleave(3, 0))


@pytest.mark.parametrize("rule", [RULES[0], RULES[4], Rule("top-k", k=3)], ids=lambda r: r.name)
def test_beam_search_is_the_naive_one(
    rule: Rule, trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(trio, rule)
    left, mask = padded(ids[:2, :6], [4, 0])
    found = model.generate(
        left,
        attention_mask=mask,
        num_beams=4,
        num_return_sequences=2,
        max_new_tokens=5,
        do_sample=False,
        length_penalty=0.0,
        output_scores=True,
        return_dict_in_generate=True,
    )
    assert not isinstance(found, torch.Tensor)
    for row, count in enumerate([4, 0]):
        beams = [(0.0, left[row, count:])]
        for _ in range(5):
            grown = []
            for score, text in beams:
                log_p = mixed(model, text[None])[0, -1].log_softmax(-1)
                token_ids = log_p.topk(4).indices
                grown += [(score + float(log_p[t]), torch.cat([text, t[None]])) for t in token_ids]
            beams = sorted(grown, key=lambda beam: -beam[0])[:4]
        for rank in range(2):
            assert torch.equal(found.sequences[2 * row + rank, count:], beams[rank][1])
            score = float(found.sequences_scores[2 * row + rank])  # pyright: ignore
            assert score == pytest.approx(beams[rank][0], abs=1e-4)


def test_a_text_goes_on_from_its_cache(trio: list[PreTrainedModel], ids: torch.Tensor) -> None:
    model = compose(trio, Rule("posterior"))
    whole = model.generate(ids[:, :5], max_new_tokens=8, do_sample=False)
    options: dict[str, Any] = {"do_sample": False, "return_dict_in_generate": True}
    begun = model.generate(ids[:, :5], max_new_tokens=4, **options)
    assert not isinstance(begun, torch.Tensor)
    cache = begun.past_key_values
    assert cache is not None
    saved = copy.deepcopy(cache)
    for kept in (cache, saved):
        text = model.generate(begun.sequences, past_key_values=kept, max_new_tokens=4, **options)
        assert not isinstance(text, torch.Tensor)
        assert torch.equal(text.sequences, whole)
    model.remove_expert("c")
    with pytest.raises(ValueError, match="past_key_values: not of these experts"):
        model(input_ids=ids[:, :1], past_key_values=cache)


def test_rows_of_a_cache_repeat_and_go(trio: list[PreTrainedModel], ids: torch.Tensor) -> None:
    model = compose(trio, Rule("posterior"))
    expected = mixed(model, ids)[:, 8:]
    cache = model(input_ids=ids[:, :8]).past_key_values
    cache.batch_repeat_interleave(2)
    output = model(input_ids=ids[:, 8:12].repeat_interleave(2, 0), past_key_values=cache)
    close(output.logits, expected[:, :4].repeat_interleave(2, 0))
    cache.batch_select_indices(torch.tensor([5, 0]))
    close(model(input_ids=ids[[2, 0], 12:], past_key_values=cache).logits, expected[[2, 0], 4:])


def test_what_an_evaluation_harness_uses(trio: list[PreTrainedModel], ids: torch.Tensor) -> None:
    class AtLength(StoppingCriteria):
        def __call__(self, input_ids: torch.Tensor, scores: Any, **_: Any) -> torch.Tensor:
            return torch.full((len(input_ids),), input_ids.shape[1] >= 9)

    model = compose(trio, Rule("posterior")).eval()
    assert model.tie_weights() is None
    assert model.to("cpu") is model
    assert (model.dtype, model.device) == (torch.float32, torch.device("cpu"))
    assert (model.config.model_type, model.config.vocab_size) == ("nacre-composed", VOCABULARY)
    assert model.config.max_position_embeddings == 32
    assert model.get_input_embeddings().weight.shape[0] == VOCABULARY
    assert model(ids).logits.shape == (3, 16, VOCABULARY)
    assert torch.equal(model(ids.int()).logits, model(ids).logits)
    text = model.generate(
        input_ids=ids[:, :5],
        attention_mask=torch.ones_like(ids[:, :5]),
        max_length=12,
        stopping_criteria=StoppingCriteriaList([AtLength()]),
        pad_token_id=0,
        use_cache=True,
        do_sample=False,
    )
    assert text.shape == (3, 9)


@every_rule
def test_labels_give_cross_entropy(
    rule: Rule, trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    model = compose(trio, rule)
    labels = ids.clone()
    labels[0, :7] = -100
    output = model(input_ids=ids, labels=labels)
    expected = nn.functional.cross_entropy(
        output.logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten()
    )
    close(output.loss, expected)
    none = model(input_ids=ids, labels=torch.full_like(ids, -100)).loss
    assert none is not None
    assert none.isnan()


def test_wrong_input_is_refused(trio: list[PreTrainedModel], ids: torch.Tensor) -> None:
    model = compose(trio, Rule("posterior"))
    cache = model(input_ids=ids).past_key_values
    empty = ids[:, :0]
    calls: list[tuple[Callable[[], object], str]] = [
        (lambda: model(input_ids=empty), "input_ids: none"),
        (lambda: model(inputs_embeds=torch.zeros(1, 2, 32)), "input_ids: none"),
        (lambda: model(input_ids=ids, labels=ids, logits_to_keep=1), "labels: need the logits"),
        (lambda: model(input_ids=ids, attention_mask=ids[:, :3]), r"expected \[3, 16\], got"),
        (
            lambda: model(input_ids=ids, attention_mask=ids, past_key_values=cache),
            r"attention_mask: expected \[3, 32\], got \[3, 16\]",
        ),
        (
            lambda: model.generate(ids, prompt_lookup_num_tokens=2, max_new_tokens=2),
            "assisted generation is not supported with stateful models",
        ),
        (lambda: cache.crop(3), "cannot take tokens back"),
        (cache.reset, "begin a text without one"),
    ]
    for call, message in calls:
        with pytest.raises(ValueError, match=message):
            call()


def test_an_empty_prompt_fails_as_an_expert_does(
    trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    for model in (trio[0], compose(trio, Rule("posterior"))):
        with pytest.raises((ValueError, IndexError, RuntimeError)):
            model.generate(ids[:, :0], max_new_tokens=2, do_sample=False)  # pyright: ignore


# ---- memory


def allocations(run: Callable[[], object]) -> tuple[int, list[int]]:
    """Return the most bytes held at once, and the size of every allocation."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    assert kept is not None
    profiler: Any = profiled.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    live = peak = 0
    for size in sizes:
        live += size
        peak = max(peak, live)
    return peak, [size for size in sizes if size > 0]


@pytest.mark.parametrize(
    "rule", [RULES[0], RULES[4], Rule("fixed-share"), Rule("entropy")], ids=lambda rule: rule.name
)
def test_memory_is_that_of_one_expert_and_a_quarter(rule: Rule) -> None:
    vocabulary = 20_000
    config = LlamaConfig(
        **{**stock.llama_config(vocabulary, 32, 2, 64, 128, 1).to_dict(), "num_hidden_layers": 1}
    )
    models = [stock.build(config).eval() for _ in range(2)]
    experts = [{"name": name} for name in "ab"]
    model = ComposedForCausalLM(ComposedConfig(experts, rule.as_json(), vocabulary), models)
    ids = torch.randint(0, vocabulary, (2, 128))
    with torch.no_grad():
        plain, _ = allocations(lambda: models[0](input_ids=ids))
        peak, sizes = allocations(lambda: model(input_ids=ids))
        labelled, _ = allocations(lambda: model(input_ids=ids, labels=ids))
        last, _ = allocations(lambda: model(input_ids=ids, logits_to_keep=1))
    output = 2 * 128 * vocabulary * 4
    assert output < peak < 1.25 * plain
    assert labelled < 1.25 * plain
    assert last < 0.3 * plain
    assert [size for size in sizes if size > output // 4] == [output]


# ---- folders


@pytest.fixture
def folder(trio: list[PreTrainedModel], tmp_path: Path) -> Path:
    """A composition's folder with two experts inside."""
    for name, one in zip("ab", trio[:2], strict=True):
        one.save_pretrained(tmp_path / "experts" / name)
    experts = [{"name": name, "path": f"experts/{name}"} for name in "ab"]
    ComposedConfig(experts, Rule("posterior").as_json(), VOCABULARY).save_pretrained(tmp_path)
    return tmp_path


def test_a_folder_loads_with_its_experts(
    folder: Path, trio: list[PreTrainedModel], ids: torch.Tensor
) -> None:
    expected = mixed(compose(trio[:2], Rule("posterior")), ids)
    model: Any = ComposedForCausalLM.from_pretrained(folder)
    assert torch.equal(mixed(model, ids), expected)
    assert model.generation_config.max_new_tokens is None
    GenerationConfig(max_new_tokens=3, do_sample=False).save_pretrained(folder)
    model = ComposedForCausalLM.from_pretrained(str(folder), dtype=torch.bfloat16)
    assert model.dtype == torch.bfloat16
    assert model.generate(ids[:, :5]).shape == (3, 8)
    again = ComposedConfig.from_pretrained(folder)
    assert (again.experts, again.mix) == (model.config.experts, model.config.mix)


def test_an_expert_that_lacks_a_tensor_is_refused_not_made_up(folder: Path) -> None:
    (weights,) = (folder / "experts" / "b").glob("*.safetensors")
    tensors = load_file(weights)
    del tensors[min(tensors)]
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"b: 1 tensors are missing, first \w"):
        ComposedForCausalLM.from_pretrained(folder)


def test_an_expert_that_is_gone_is_named(folder: Path) -> None:
    (folder / "experts" / "b").rename(folder / "experts" / "c")
    with pytest.raises(ValueError, match=r"expert 'b' is not in .*experts.b"):
        ComposedForCausalLM.from_pretrained(folder)


def test_saving_points_to_compose(trio: list[PreTrainedModel], tmp_path: Path) -> None:
    model = compose(trio, Rule("posterior"))
    with pytest.raises(NotImplementedError, match=r"nacre\.compose .*bundle=True"):
        model.save_pretrained(tmp_path / "out")
    assert not (tmp_path / "out").exists()
