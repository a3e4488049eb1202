"""The trained rules as modules: their formulas, how they begin, what they refuse."""

from __future__ import annotations

import math

import pytest
import torch
from test_composed import Build, alone, close, compose, mixed

from nacre.models.rules import Rule
from nacre.models.trained import Adapter, Gate, build


def shaken(module: torch.nn.Module) -> torch.nn.Module:
    """Move every weight away from where it begins."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return module


def test_a_gate_is_linear_in_all_hidden_states() -> None:
    gate = shaken(Gate([4, 6]))
    hidden = [torch.randn(2, 3, 4), torch.randn(2, 3, 6)]
    assert isinstance(gate, Gate)
    for b in range(2):
        for t in range(3):
            scores = gate.bias.clone()
            for score, h in zip(gate.scores, hidden, strict=True):
                scores = scores + score.weight @ h[b, t]  # pyright: ignore
            torch.testing.assert_close(gate(hidden)[:, b, t].exp(), scores.softmax(-1))


def test_an_adapter_is_a_diagonal_and_a_low_rank_part_on_candidates() -> None:
    experts, vocabulary, rank, k = 3, 11, 2, 4
    adapter = shaken(Adapter(experts, vocabulary, rank, k))
    logits = [3 * torch.randn(2, 3, vocabulary) for _ in range(experts)]
    found = adapter(logits)
    for b in range(2):
        for t in range(3):
            log_p = [one[b, t].log_softmax(-1) for one in logits]
            read, union = torch.zeros(rank), set()
            expected = torch.zeros(vocabulary)
            for e, one in enumerate(log_p):
                order = one.argsort(descending=True)[:k]
                union |= set(order.tolist())
                for token in order:
                    read = read + adapter.down[e, token] * (one[token] - one[order[-1]])  # pyright: ignore
                expected = expected + adapter.diagonal[e] * one  # pyright: ignore
            for token in union:
                expected[token] = expected[token] + adapter.up[token] @ read  # pyright: ignore
            torch.testing.assert_close(found[b, t], expected)


def test_a_dense_adapter_is_one_matrix_on_the_concatenation() -> None:
    adapter = shaken(Adapter(2, 5, 0, 64))
    logits = [torch.randn(2, 3, 5) for _ in range(2)]
    whole = torch.cat([one.log_softmax(-1) for one in logits], -1)
    matrix = torch.cat(list(adapter.weight), 1)  # pyright: ignore
    torch.testing.assert_close(adapter(logits), whole @ matrix.T)


@pytest.mark.parametrize("rank", [0, 3])
def test_they_begin_as_means(rank: int, pico: Build, ids: torch.Tensor) -> None:
    models = [pico("llama", seed=1), pico("gpt_neox", 3, seed=2)]
    log_p = [alone(model, ids).log_softmax(-1) for model in models]
    adapter = compose(models, Rule("adapter", rank=rank))
    close(mixed(adapter, ids), (log_p[0] + log_p[1]) / 2)
    assert adapter(input_ids=ids).log_weights is None
    gate = compose(models, Rule("gate"))
    close(mixed(gate, ids), torch.stack(log_p).logsumexp(0) - math.log(2))
    assert gate(input_ids=ids).log_weights.exp().unique().tolist() == pytest.approx([0.5])


@pytest.mark.parametrize("name", ["gate", "adapter"])
def test_trained_rules_read_in_pieces_and_generate(
    name: str, pico: Build, ids: torch.Tensor
) -> None:
    model = compose([pico("llama", seed=1), pico("gpt_neox", 3, seed=2)], Rule(name))
    shaken(model.mixer)
    whole = mixed(model, ids)
    cache, pieces = None, []
    for part in ids.split([5, 1, 1, 9], 1):
        output = model(input_ids=part, past_key_values=cache)
        cache = output.past_key_values
        pieces.append(output.logits)
    close(torch.cat(pieces, 1), whole)
    written = model.generate(ids[:, :6], max_new_tokens=5, do_sample=False)
    assert torch.equal(written[:, 6:], mixed(model, written[:, :-1])[:, 5:].argmax(-1))


@pytest.mark.parametrize("name", ["gate", "adapter"])
def test_extreme_logits_stay_finite(name: str, pico: Build, ids: torch.Tensor) -> None:
    models = [pico("llama", seed=1), pico("llama", seed=2)]
    with torch.no_grad():
        models[1].get_output_embeddings().weight.mul_(1e4)
    model = compose(models, Rule(name))
    assert mixed(model, ids).isfinite().all()
    tensors = [torch.full((1, 1, 64), -math.inf).index_fill_(-1, torch.tensor([3]), 0.0)] * 2
    if name == "adapter":
        assert model.mixer(tensors).isfinite().all()


def test_trained_rules_are_for_their_experts(pico: Build, ids: torch.Tensor) -> None:
    models = [pico("llama", seed=1), pico("llama", seed=2)]
    model = compose(models, Rule("gate"))
    for change in (lambda: model.add_expert(pico("llama"), "c"), lambda: model.remove_expert("a")):
        with pytest.raises(ValueError, match="the gate was trained for exactly these experts"):
            change()
    with pytest.raises(ValueError, match="gate: reads hidden states, and those of b cannot be"):
        compose([models[0], pico("gpt2")], Rule("gate"))
    assert mixed(compose([models[0], pico("gpt2")], Rule("adapter")), ids).isfinite().all()
    with pytest.raises(ValueError, match=r"rank: 0 makes a dense adapter of 131,072,000,000 weigh"):
        build(Rule("adapter", rank=0), [8, 8], 256_000)
    with pytest.raises(ValueError, match=r"rank: 900 makes an adapter of .*give a lower rank"):
        build(Rule("adapter", rank=900), [8, 8], 256_000)
    assert build(Rule("posterior"), [8, 8], 64) is None


@pytest.mark.parametrize("rule", [Rule("gate"), Rule("adapter"), Rule("adapter", rank=0)])
def test_autocast_changes_no_trained_rule(rule: Rule, pico: Build, ids: torch.Tensor) -> None:
    model = compose([pico("llama", seed=1), pico("llama", seed=2)], rule)
    shaken(model.mixer)
    hidden = model.hidden(ids)
    inputs = (
        [model.logits(e, h) for e, h in enumerate(hidden)] if rule.name == "adapter" else hidden
    )
    plain = model.mixer(inputs)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(model.mixer(inputs), plain)


def test_tuned_heads_are_for_their_experts(pico: Build) -> None:
    model = compose([pico("llama", seed=1), pico("llama", seed=2)], Rule())
    model.load_trained({name: t.detach() + 1 for name, t in model.trained_tensors(True).items()})
    with pytest.raises(ValueError, match="the heads were trained for exactly these experts"):
        model.remove_expert("a")
