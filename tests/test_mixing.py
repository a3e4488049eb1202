"""Mixing rules against naive references in fp64, at the edges, in pieces, and in memory."""

from __future__ import annotations

import ast
import itertools
import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from nacre.models import mixing, rules
from nacre.models.mixing import IMPOSSIBLE
from nacre.models.rules import Rule, mix

Logits = list[torch.Tensor]
INF = math.inf

OPTIONS: list[tuple[str, dict[str, Any]]] = [
    ("weighted", {"weights": (1.0, 3.0, 0.5)}),
    ("posterior", {"prior": (0.2, 0.5, 0.3), "floor": 0.05}),
    ("posterior", {"decay": 1.0}),
    ("fixed-share", {"prior": (0.2, 0.5, 0.3), "switch": 0.1}),
    ("entropy", {"temperature": 0.7}),
    ("top-k", {"k": 2, "prior": (0.2, 0.5, 0.3)}),
    ("selective", {"threshold": 0.4, "prior": (0.2, 0.5, 0.3)}),
]
DOMAINS: tuple[Literal["logits", "probs"], ...] = ("logits", "probs")
ALL_RULES = [
    Rule("mean-logits"),
    Rule("mean-probs"),
    *(Rule(name, domain, **options) for domain in DOMAINS for name, options in OPTIONS),
]
every_rule = pytest.mark.parametrize("rule", ALL_RULES, ids=lambda rule: json.dumps(rule.as_json()))

shapes = st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 9), st.integers(2, 40))


@pytest.fixture(autouse=True)
def _small_tiles(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make small cases span several tiles; the tests of memory keep the real size."""
    if not request.node.name.startswith("test_memory"):
        monkeypatch.setitem(mixing.TILE_BYTES, "cpu", 2 * 40 * 4)


def some(
    experts: int, batch: int, positions: int, vocabulary: int, seed: int = 0
) -> tuple[Logits, torch.Tensor]:
    """Return logits of each expert, `[B, T, V]`, and observed likelihoods, `[E, B, T]`."""
    generator = torch.Generator().manual_seed(seed)
    shape = (batch, positions, vocabulary)
    logits = [4 * torch.randn(shape, generator=generator) for _ in range(experts)]
    observed = -6 * torch.rand((experts, batch, positions), generator=generator)
    observed[..., 0] = 0
    return logits, observed


def weights_of(shape: tuple[int, int, int], seed: int = 0, zeros: bool = True) -> torch.Tensor:
    """Return log weights `[E, B, T]`, some of them -inf."""
    generator = torch.Generator().manual_seed(seed + 1)
    scores = torch.randn(shape, generator=generator)
    if zeros:
        off = torch.rand(shape, generator=generator) < 0.4
        off[0] = False
        scores = scores.masked_fill(off, -INF)
    return torch.log_softmax(scores, 0)


def naive_sums(
    observed: torch.Tensor, decay: float, mask: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the decayed sums, fp64, one position after another."""
    total = torch.zeros(observed.shape[:2], dtype=torch.float64)
    sums = []
    for t in range(observed.shape[2]):
        seen = decay * total + observed[..., t].double().clamp(min=IMPOSSIBLE)
        total = seen if mask is None else torch.where(mask[:, t].bool(), seen, total)
        sums.append(total)
    return torch.stack(sums, -1)


def naive_mix(rule: Rule, logits: Logits, observed: torch.Tensor) -> torch.Tensor:
    """Return what `mix` should, in fp64, stacked and in one piece."""
    stacked = torch.stack(logits).double()
    log_p = stacked.log_softmax(-1)
    shares = torch.tensor(rule.shares(len(logits)), dtype=torch.float64)
    shares = (shares / shares.sum())[:, None, None]
    weights = shares.expand(observed.shape)
    if rule.name == "fixed-share":
        stay = (1 - rule.switch) * torch.eye(len(logits), dtype=torch.float64)
        moves = stay + rule.switch * shares[:, :, 0]
        here, steps = weights[..., 0], []
        for t in range(observed.shape[2]):
            here = moves @ (here * observed[..., t].double().exp())
            steps.append(here / here.sum(0))
        weights = torch.stack(steps, -1)
    elif rule.reads_text:
        weights = shares * naive_sums(observed, rule.decay).exp()
        weights = weights / weights.sum(0)
        weights = (1 - rule.floor) * weights + rule.floor * shares
    if rule.name == "entropy":
        entropy = -(log_p.exp() * log_p).sum(-1)
        weights = (-entropy / rule.temperature).softmax(0)
    if rule.name == "top-k":
        weights = torch.where(weights >= weights.topk(rule.k, 0).values[-1], weights, 0)
        weights = weights / weights.sum(0)
    if rule.name == "selective":
        lead = weights == weights.amax(0)
        sure = (log_p.exp().amax(-1) * lead).sum(0) >= rule.threshold
        assert 0 < sure.sum() < sure.numel()
        weights = torch.where(sure, lead.double(), weights)
    if rule.mixes_logits:
        return (weights[..., None] * stacked).sum(0)
    return (weights[..., None] * log_p.exp()).sum(0).log()


def output_as_log_p(rule: Rule, output: torch.Tensor) -> torch.Tensor:
    return output.log_softmax(-1) if rule.mixes_logits else output


@settings(deadline=None, max_examples=20)
@given(shape=shapes, seed=st.integers(0, 99))
def test_means_of_logits_and_of_probabilities(shape: tuple[int, int, int, int], seed: int) -> None:
    logits, _ = some(*shape, seed=seed)
    stacked = torch.stack(logits)
    close = {"rtol": 0, "atol": 1e-6}
    torch.testing.assert_close(mixing.mix_logits(logits), stacked.mean(0), **close)
    weights = weights_of(shape[:3], seed)
    mixed = mixing.mix_logits(logits, weights.exp())
    expected = (weights.exp()[..., None].double() * stacked.double()).sum(0)
    torch.testing.assert_close(mixed, expected.float(), rtol=1e-6, atol=2e-6)
    mixed = mixing.mix_probs(logits, weights)
    expected = (weights[..., None].double() + stacked.double().log_softmax(-1)).logsumexp(0)
    torch.testing.assert_close(mixed, expected.float(), rtol=1e-6, atol=2e-6)


@settings(deadline=None, max_examples=20)
@given(shape=shapes, seed=st.integers(0, 99))
def test_likelihood_entropy_and_confidence(shape: tuple[int, int, int, int], seed: int) -> None:
    logits, _ = some(*shape, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    targets = torch.randint(0, shape[3], shape[1:3], generator=generator)
    log_p = torch.stack(logits).double().log_softmax(-1)
    found = mixing.log_likelihood(logits[0], targets)
    torch.testing.assert_close(found, log_p[0].gather(-1, targets[..., None])[..., 0].float())
    entropy = -(log_p.exp() * log_p).sum(-1)
    torch.testing.assert_close(mixing.entropies(logits), entropy.float(), rtol=1e-5, atol=1e-6)
    found = mixing.entropy(logits, 0.5)
    expected = (-entropy / 0.5).log_softmax(0).float()
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    leading = torch.randint(0, shape[0], shape[1:3], generator=generator)
    highest = log_p.exp().amax(-1).gather(0, leading[None])[0].float()
    torch.testing.assert_close(mixing.confidence(logits, leading), highest)


@every_rule
def test_every_rule_equals_its_naive_form(rule: Rule) -> None:
    logits, observed = some(3, 2, 12, 17)
    mixed = mix(rule, logits, observed)
    expected = naive_mix(rule, logits, observed)
    torch.testing.assert_close(mixed.output_BTV, expected.float(), rtol=1e-5, atol=1e-5)
    assert mixed.output_BTV.dtype == mixed.log_weights_EBT.dtype == torch.float32
    torch.testing.assert_close(mixed.log_weights_EBT.exp().sum(0), torch.ones(2, 12))
    assert (mixed.state_EB is not None) == rule.reads_text


@every_rule
def test_identical_experts_equal_one(rule: Rule) -> None:
    logits, observed = some(1, 2, 6, 17)
    mixed = mix(rule, logits * 3, observed.expand(3, -1, -1))
    expected = logits[0].log_softmax(-1)
    found = output_as_log_p(rule, mixed.output_BTV)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=2e-6)


@every_rule
def test_one_expert_is_itself_bit_for_bit(rule: Rule) -> None:
    alone = Rule(rule.name, rule.domain, weights=(2.0,) if rule.weights else None)
    logits, observed = some(1, 2, 6, 17)
    mixed = mix(alone, logits, observed)
    expected = logits[0] if rule.mixes_logits else logits[0].log_softmax(-1)
    assert torch.equal(mixed.output_BTV, expected)
    assert torch.equal(mixed.log_weights_EBT, torch.zeros(1, 2, 6))


@every_rule
@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
def test_a_permutation_of_experts_permutes_the_weights(rule: Rule, order: tuple[int, ...]) -> None:
    logits, observed = some(3, 2, 12, 17)
    given = {
        key: tuple(value[e] for e in order)
        for key in ("weights", "prior")
        if (value := getattr(rule, key)) is not None
    }
    permuted = Rule.parse(rule.as_json() | given, 3)
    plain = mix(rule, logits, observed)
    mixed = mix(permuted, [logits[e] for e in order], observed[list(order)])
    weights = plain.log_weights_EBT[list(order)]
    torch.testing.assert_close(mixed.log_weights_EBT, weights, rtol=0, atol=1e-6)
    torch.testing.assert_close(mixed.output_BTV, plain.output_BTV, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("poison", [None, 1e4, -1e4, -INF, math.nan])
@pytest.mark.parametrize("chosen", [0, 1, 2])
@pytest.mark.parametrize("domain", ["logits", "probs"])
def test_a_weight_of_one_selects_exactly(domain: Any, chosen: int, poison: float | None) -> None:
    logits, _ = some(3, 3, 7, 40)
    alone = logits[chosen]
    if poison is not None:
        logits = [given if given is alone else given.fill_(poison) for given in logits]
    weights = tuple(float(e == chosen) for e in range(3))
    mixed = mix(Rule("weighted", domain, weights=weights), logits)
    expected = alone if domain == "logits" else alone.log_softmax(-1)
    assert torch.equal(mixed.output_BTV, expected)


@pytest.mark.parametrize("poison", [1e4, -INF, math.nan])
def test_a_row_without_weight_is_left_out_beside_rows_with_it(poison: float) -> None:
    logits, _ = some(2, 2, 8, 16)
    weights = weights_of((2, 2, 8), zeros=False)
    off = torch.arange(8).expand(2, -1) % 3 == 1
    weights[1] = weights[1].masked_fill(off, -INF)
    weights[0] = weights[0].masked_fill(off, 0.0)
    clean = mixing.mix_logits(logits, weights.exp()), mixing.mix_probs(logits, weights)
    assert torch.equal(clean[0][off], logits[0][off])
    assert torch.equal(clean[1][off], logits[0].log_softmax(-1)[off])
    logits[1][off] = poison
    assert torch.equal(mixing.mix_logits(logits, weights.exp()), clean[0])
    assert torch.equal(mixing.mix_probs(logits, weights), clean[1])


@every_rule
def test_extreme_logits_make_no_nan(rule: Rule) -> None:
    logits, _ = some(3, 2, 12, 17)
    logits[0][..., 0] = 1e4
    logits[1][..., 0] = -1e4
    logits[1][:, 5, 1:12] = -INF
    logits[2][..., :9] = -INF
    ids = torch.zeros(2, 12, dtype=torch.long)
    observed = torch.stack([mixing.log_likelihood(given, ids) for given in logits])
    assert observed.isneginf().any()
    mixed = mix(rule, logits, observed)
    assert not mixed.output_BTV.isnan().any()
    assert not mixed.log_weights_EBT.isnan().any()
    assert mixed.output_BTV.amax(-1).isfinite().all()
    if rule.name == "mean-probs":  # -inf of one expert is not -inf of the mix
        assert mixed.output_BTV[..., 0].isfinite().all()


@every_rule
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_sixteen_bits_are_read_as_their_values_in_fp32(rule: Rule, dtype: torch.dtype) -> None:
    logits, observed = some(3, 2, 12, 17)
    narrow = [given.to(dtype) for given in logits]
    mixed = mix(rule, narrow, observed)
    expected = mix(rule, [given.float() for given in narrow], observed)
    assert mixed.output_BTV.dtype == torch.float32
    assert torch.equal(mixed.output_BTV, expected.output_BTV)
    near = mix(rule, logits, observed).output_BTV
    if rule.name != "selective":  # which has a step
        torch.testing.assert_close(mixed.output_BTV, near, rtol=0.05, atol=0.1)


@every_rule
def test_views_of_larger_logits_are_read_in_place(rule: Rule) -> None:
    logits, observed = some(3, 3, 9, 17)
    views = [given[1:, :-1, ::2] for given in logits]
    mixed = mix(rule, views, observed[:, 1:, :-1])
    expected = mix(rule, [view.contiguous() for view in views], observed[:, 1:, :-1])
    assert torch.equal(mixed.output_BTV, expected.output_BTV)


@settings(deadline=None, max_examples=30)
@given(
    decay=st.sampled_from([1.0, 0.999, 0.9, 0.5, 0.01, mixing.SMALLEST_DECAY]),
    positions=st.integers(1, 60),
    seed=st.integers(0, 99),
    data=st.data(),
)
def test_sums_equal_the_naive_loop_in_any_pieces(
    decay: float, positions: int, seed: int, data: st.DataObject
) -> None:
    _, observed = some(3, 2, positions, 2, seed)
    generator = torch.Generator().manual_seed(seed)
    mask = torch.rand((2, positions), generator=generator) < 0.8
    expected = naive_sums(observed, decay, mask)
    whole, last = mixing.running_sums(observed, decay, mask=mask)
    torch.testing.assert_close(whole, expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(last, whole[..., -1])
    cuts = sorted(data.draw(st.sets(st.integers(1, positions), max_size=5)) | {positions})
    if data.draw(st.booleans()):
        cuts = list(range(1, positions + 1))
    state, pieces, start = None, [], 0
    for cut in cuts:
        part = slice(start, cut)
        sums, state = mixing.running_sums(observed[..., part], decay, state, mask[:, part])
        pieces.append(sums)
        start = cut
    if decay in (1.0, 0.5):
        assert torch.equal(torch.cat(pieces, -1), whole)
    torch.testing.assert_close(torch.cat(pieces, -1), whole, rtol=1e-12, atol=1e-12)


@every_rule
def test_one_pass_equals_step_by_step(rule: Rule) -> None:
    logits, observed = some(3, 2, 12, 17)
    whole = mix(rule, logits, observed)
    state, outputs, weights = None, [], []
    for t in range(12):
        part = slice(t, t + 1)
        step = mix(rule, [given[:, part] for given in logits], observed[..., part], state)
        state = step.state_EB
        outputs.append(step.output_BTV)
        weights.append(step.log_weights_EBT)
    torch.testing.assert_close(torch.cat(weights, 2), whole.log_weights_EBT, rtol=0, atol=1e-6)
    torch.testing.assert_close(torch.cat(outputs, 1), whole.output_BTV, rtol=0, atol=2e-6)
    if rule.decay == 1.0 or rule.name == "fixed-share":
        assert state is not None
        assert whole.state_EB is not None
        assert torch.equal(state, whole.state_EB)


@every_rule
def test_padding_left_right_and_between_moves_no_weight(rule: Rule) -> None:
    logits, observed = some(3, 1, 6, 17)
    real = [2, 3, 5, 6, 7, 10]
    mask = torch.zeros(1, 13, dtype=torch.long)
    mask[:, real] = 1
    padded = [torch.randn(1, 13, 17) for _ in logits]
    for wide, alone in zip(padded, logits, strict=True):
        wide[:, real] = alone
    seen = torch.full((3, 1, 13), math.nan)
    seen[..., real] = observed
    plain, found = mix(rule, logits, observed), mix(rule, padded, seen, mask=mask)
    weights = found.log_weights_EBT[..., real]
    torch.testing.assert_close(weights, plain.log_weights_EBT, rtol=0, atol=1e-6)
    output = found.output_BTV[:, real]
    torch.testing.assert_close(output, plain.output_BTV, rtol=1e-6, atol=1e-6)
    if plain.state_EB is not None:
        assert found.state_EB is not None
        assert torch.equal(found.state_EB, plain.state_EB)


@pytest.mark.parametrize("decay", [1.0, 0.99, 0.9])
def test_a_hundred_thousand_tokens_stay_exact(decay: float) -> None:
    generator = torch.Generator().manual_seed(0)
    observed = -5 * torch.rand((2, 1, 100_000), generator=generator)
    weights, state = mixing.posterior(observed, (1.0, 1.0), decay)
    if decay == 1:
        total = torch.tensor([[math.fsum(row.tolist())] for row in observed[:, 0]])
        torch.testing.assert_close(state, total.double(), rtol=1e-6, atol=0)
    tail = naive_sums(observed[..., -5000:], decay)
    assert weights.isfinite().all()
    if decay < 1:
        torch.testing.assert_close(state, tail[..., -1], rtol=1e-12, atol=0)
        expected = tail.log_softmax(0)[..., -100:].float()
        torch.testing.assert_close(weights[..., -100:], expected, rtol=1e-5, atol=1e-6)


def test_posterior_is_bayes_and_forgets() -> None:
    observed = torch.tensor([[[0.0, -1.0, -2.0]], [[0.0, -3.0, -0.5]]])
    weights, _ = mixing.posterior(observed, (3.0, 1.0), 1.0)
    odds = [3.0, 3.0 * math.exp(2.0), 3.0 * math.exp(0.5)]
    assert (weights[0, 0] - weights[1, 0]).exp().tolist() == pytest.approx(odds)
    weights, _ = mixing.posterior(observed, (1.0, 1.0), 0.5)
    assert (weights[0, 0] - weights[1, 0]).tolist() == pytest.approx([0.0, 2.0, -0.5])


def naive_fixed_share(observed: torch.Tensor, prior: list[float], switch: float) -> torch.Tensor:
    """Return the weights `[E, B, T]` by summing over every sequence of experts."""
    experts, batch, positions = observed.shape
    weights = torch.zeros(experts, batch, positions)
    for b in range(batch):
        for t in range(positions):
            for path in itertools.product(range(experts), repeat=t + 2):
                probability = prior[path[0]]
                for s in range(t + 1):
                    probability *= math.exp(observed[path[s], b, s])
                    drawn = switch * prior[path[s + 1]]
                    probability *= drawn + (1 - switch) * (path[s] == path[s + 1])
                weights[path[-1], b, t] += probability
    return weights / weights.sum(0)


def test_fixed_share_is_the_posterior_over_all_sequences_of_experts() -> None:
    _, observed = some(3, 2, 5, 2)
    prior = [0.2, 0.5, 0.3]
    weights, _ = mixing.fixed_share(observed, prior, 0.1)
    torch.testing.assert_close(weights.exp(), naive_fixed_share(observed, prior, 0.1))
    bayes, _ = mixing.posterior(observed, prior, 1.0)
    nearly, _ = mixing.fixed_share(observed, prior, 1e-12)
    torch.testing.assert_close(nearly.exp(), bayes.exp())


def test_fixed_share_loses_a_switch_and_no_more() -> None:
    observed = torch.full((2, 1, 200), -6.0)
    observed[0, 0, :100] = observed[1, 0, 100:] = -1.0
    weights, _ = mixing.fixed_share(observed, (1.0, 1.0), 0.01)
    before = torch.cat([torch.full((2, 1, 1), math.log(0.5)), weights[..., :-1]], -1)
    lost = -(before + observed).logsumexp(0).sum() - 200
    assert lost < 2 * math.log(2 / 0.01) + 200 * 0.01
    pieces, state = [], None
    for part in observed.split([1, 7, 92, 100], -1):
        log_weights, state = mixing.fixed_share(part, (1.0, 1.0), 0.01, state)
        pieces.append(log_weights)
    assert torch.equal(torch.cat(pieces, -1), weights)


def test_impossible_tokens_make_no_nan_and_experts_come_back() -> None:
    observed = torch.zeros(2, 1, 300)
    observed[0, 0, 1] = -INF
    observed[1, 0, 2:] = -3.0
    weights, _ = mixing.posterior(observed, (1.0, 1.0), 0.9)
    assert weights[0, 0, 1] < -9000
    assert weights[0, 0, -1] > -1e-6
    observed = torch.full((2, 1, 3), -INF)
    weights, _ = mixing.posterior(observed, (3.0, 1.0), 0.9)
    assert weights[0].exp().flatten().tolist() == pytest.approx([0.75] * 3)
    weights, _ = mixing.posterior(observed, (0.0, 1.0), 1.0, floor=0.1)
    assert weights[:, 0, 0].tolist() == [-INF, 0.0]


def test_the_floor_is_the_least_share() -> None:
    observed = torch.tensor([[[-1000.0]], [[0.0]]])
    weights, _ = mixing.posterior(observed, (1.0, 3.0), 1.0, floor=0.04)
    assert weights.exp().flatten().tolist() == pytest.approx([0.01, 0.99])


def test_top_k_keeps_the_largest_and_of_equals_the_first() -> None:
    weights = torch.tensor([0.2, 0.3, 0.3, 0.2]).log()[:, None, None]
    for k, expected in (
        (1, [0, 1, 0, 0]),
        (2, [0, 0.5, 0.5, 0]),
        (3, [0.25, 0.375, 0.375, 0]),
        (4, [0.2, 0.3, 0.3, 0.2]),
        (9, [0.2, 0.3, 0.3, 0.2]),
    ):
        kept = mixing.top_k(weights, k)
        assert kept.exp().flatten().tolist() == pytest.approx(expected)
    many = torch.zeros(40, 1, 1)
    assert mixing.top_k(many, 1).flatten().tolist() == [0.0] + [-INF] * 39


def test_selective_is_alone_only_where_sure() -> None:
    weights = torch.tensor([[0.4, 0.4, 0.5], [0.6, 0.6, 0.5]]).log()[:, None]
    chosen = mixing.selective(weights, torch.tensor([[0.9, 0.89, 0.95]]), 0.9).exp()
    expected = torch.tensor([[0.0, 0.4, 1.0], [1.0, 0.6, 0.0]])
    torch.testing.assert_close(chosen[:, 0], expected)


def test_a_skipped_expert_catches_up_to_the_sums_of_one_pass() -> None:
    _, observed = some(2, 2, 20, 2)
    whole, last = mixing.running_sums(observed, 0.9)
    state = whole[..., 4].clone()
    _, state[:1] = mixing.running_sums(observed[:1, :, 5:], 0.9, state[:1])
    assert not torch.allclose(state[1], last[1])
    _, state[1:] = mixing.running_sums(observed[1:, :, 5:], 0.9, state[1:])
    torch.testing.assert_close(state, last, rtol=1e-12, atol=0)


@pytest.mark.parametrize(
    ("rule", "dtype"),
    [
        (Rule("mean-logits"), torch.float32),
        (Rule("posterior", "logits"), torch.bfloat16),
        (Rule("entropy"), torch.float32),
        (Rule("selective"), torch.bfloat16),
    ],
    ids=["mean-logits", "posterior", "entropy", "selective"],
)
def test_memory_is_one_output_and_three_tiles(rule: Rule, dtype: torch.dtype) -> None:
    logits = [torch.randn(8, 64, 4096).to(dtype)] * 4
    observed = torch.zeros(4, 8, 64)
    output, tiles = 8 * 64 * 4096 * 4, 3.1 * mixing.TILE_BYTES["cpu"]
    assert output + tiles < 1.5 * output
    assert output < peak_bytes(lambda: mix(rule, logits, observed)) < output + tiles
    ids = torch.zeros(8, 64, dtype=torch.long)
    assert peak_bytes(lambda: mixing.log_likelihood(logits[0], ids)) < tiles


def peak_bytes(run: Callable[[], object]) -> int:
    """Return the most bytes that were allocated at once, those inside of operators included."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        kept = run()
    assert kept is not None
    profiler: Any = profiled.profiler
    events = [event for event in profiler.kineto_results.events() if event.name() == "[memory]"]
    live = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        live += event.nbytes()
        peak = max(peak, live)
    assert peak > 0
    return peak


@every_rule
def test_a_rule_survives_json(rule: Rule) -> None:
    assert Rule.parse(json.loads(json.dumps(rule.as_json())), 3) == rule


BAD_RULES = [
    ({"name": "mean"}, "name: 'mean' (allowed: mean-logits, mean-probs, weighted,"),
    ({"name": {}}, "name: {} (allowed: mean-logits,"),
    ({"speed": 1}, "speed: unknown (allowed: name, domain, weights,"),
    ({"name": "mean-logits", "k": 2}, "k: 2 is no option of mean-logits (it has: no options)"),
    ({"name": "entropy", "decay": 0.5}, "decay: 0.5 is no option of entropy (it has: domain, temp"),
    ({"domain": "log"}, "domain: 'log' (allowed: logits, probs)"),
    ({"name": "weighted"}, "weights: None (allowed: 3 numbers of at least 0, one an expert"),
    ({"name": "weighted", "weights": [1, 2]}, "weights: (1, 2) (allowed: 3 numbers"),
    ({"name": "weighted", "weights": [1, 2, -1]}, "weights: (1, 2, -1) (allowed: 3 numbers"),
    ({"name": "weighted", "weights": [0, 0, 0]}, "weights: (0, 0, 0) (allowed: 3 numbers"),
    ({"name": "weighted", "weights": "abc"}, "weights: 'abc' (allowed: 3 numbers"),
    ({"prior": [1, 2, math.inf]}, "prior: (1, 2, inf) (allowed: 3 numbers"),
    ({"prior": [1, "2", 3]}, "prior: (1, '2', 3) (allowed: 3 numbers"),
    ({"name": "posterior", "decay": 0}, "decay: 0 (allowed: a number from 1e-06 to 1)"),
    ({"name": "posterior", "decay": 1.1}, "decay: 1.1 (allowed: a number from 1e-06 to 1)"),
    ({"name": "posterior", "decay": math.nan}, "decay: nan (allowed: a number from 1e-06 to 1)"),
    ({"name": "posterior", "decay": "0.9"}, "decay: '0.9' (allowed: a number from 1e-06 to 1)"),
    ({"name": "posterior", "floor": 1}, "floor: 1 (allowed: a number from 0, under 1)"),
    ({"name": "posterior", "floor": -0.1}, "floor: -0.1 (allowed: a number from 0, under 1)"),
    ({"name": "fixed-share", "switch": 0}, "switch: 0 (allowed: a number above 0, under 1)"),
    ({"name": "fixed-share", "switch": 1}, "switch: 1 (allowed: a number above 0, under 1)"),
    ({"name": "adapter", "rank": -1}, "rank: -1 (allowed: a whole number of at least 1, or 0"),
    ({"name": "adapter", "candidates": 0}, "candidates: 0 (allowed: a whole number of at least 1"),
    ({"name": "gate", "rank": 4}, "rank: 4 is no option of gate (it has: no options)"),
    ({"name": "entropy", "temperature": 0}, "temperature: 0 (allowed: a number above 0)"),
    ({"name": "top-k", "k": 4}, "k: 4 (allowed: 1 to 3)"),
    ({"name": "top-k", "k": 0}, "k: 0 (allowed: 1 to 3)"),
    ({"name": "top-k", "k": True}, "k: True (allowed: 1 to 3)"),
    ({"name": "selective", "threshold": 0}, "threshold: 0 (allowed: a number above 0, up to 1)"),
    ({"name": "selective", "threshold": 1.5}, "threshold: 1.5 (allowed: a number above 0, up to"),
]


@pytest.mark.parametrize(("data", "message"), BAD_RULES, ids=lambda value: str(value)[:40])
def test_a_wrong_rule_is_refused(data: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        Rule.parse(data, 3)
    assert str(caught.value).startswith(message)


def test_all_problems_of_a_rule_come_at_once() -> None:
    with pytest.raises(ValueError) as caught:
        Rule.parse({"name": "top-k", "k": 9, "decay": 2, "weights": [1], "speed": 1}, 3)
    fields = [line.split(":")[0] for line in str(caught.value).splitlines()]
    assert fields == ["speed", "weights", "decay", "k"]


X = torch.zeros
BAD_CALLS: list[tuple[Callable[[], object], str]] = [
    (lambda: mixing.mix_logits([]), "logits: expected tensors of one shape [B, T, V], got []"),
    (lambda: mixing.mix_logits([X(2, 3)]), "logits: expected tensors of one shape [B, T, V]"),
    (lambda: mixing.mix_probs([X(1, 2, 3), X(1, 2, 4)], X(2, 1, 2)), "logits: expected tensors"),
    (lambda: mixing.mix_logits([X(1, 2, 3)], X(2, 1, 2)), "weights: expected [1, 1, 2], got"),
    (lambda: mixing.mix_probs([X(1, 2, 3)], X(1, 2)), "log weights: expected [1, 1, 2], got"),
    (lambda: mixing.log_likelihood(X(1, 2, 3), X(1, 3)), "targets: expected [1, 2], got [1, 3]"),
    (lambda: mixing.confidence([X(1, 2, 3)], X(1, 3)), "leading: expected [1, 2], got [1, 3]"),
    (lambda: mixing.fixed((1, -1), (1, 2)), "weights: (1, -1) (allowed: numbers of at least 0"),
    (lambda: mixing.posterior(X(2, 1, 1), (0, 0), 1), "prior: (0, 0) (allowed: numbers of at"),
    (lambda: mixing.posterior(X(2, 1, 1), (1,), 1), "prior: expected [2], got [1]"),
    (lambda: mixing.posterior(X(2, 1, 1), (1, 1), 1, floor=1), "floor: 1 (allowed: a number"),
    (lambda: mixing.running_sums(X(2, 1, 1), 0), "decay: 0 (allowed: a number from 1e-06 to 1)"),
    (lambda: mixing.running_sums(X(2, 1), 1), "observed: expected [E, B, T], got [2, 1]"),
    (lambda: mixing.running_sums(X(2, 1, 1), 1, X(1, 1)), "state: expected [2, 1], got [1, 1]"),
    (lambda: mixing.running_sums(X(2, 1, 1), 1, mask=X(1, 2)), "mask: expected [1, 1], got [1, 2]"),
    (lambda: mixing.entropy([X(1, 1, 2)], 0), "temperature: 0 (allowed: a number above 0)"),
    (lambda: mixing.top_k(X(2, 1, 1), 0), "k: 0 (allowed: a whole number of at least 1)"),
    (lambda: mix(Rule("mean"), [X(1, 1, 2)]), "name: 'mean' (allowed: mean-logits"),
    (lambda: mix(Rule("mean-probs"), [None]), "logits: expected tensors of one shape"),
    (lambda: mix(Rule(), [X(1, 2, 3)]), "observed: none (fixed-share needs it)"),
    (lambda: mix(Rule(), [X(1, 1, 2)], X(2, 1, 1)), "observed: expected [1, 1, 1], got"),
    (lambda: mix(Rule(), [X(1, 1, 2)], X(1, 1, 1), mask=X(1, 2)), "mask: expected [1, 1], got"),
    (lambda: mix(Rule(), [X(1, 1, 2)], X(1, 1, 1), X(2, 1)), "state: expected [1, 1], got [2, 1]"),
    (
        lambda: mix(Rule("mean-probs"), [X(1, 1, 2), None]),
        "logits: none of expert 1 (the rule mean-probs needs them)",
    ),
    (
        lambda: mix(Rule("top-k", prior=(0, 1)), [X(1, 1, 2), None], X(2, 1, 1)),
        "logits: none of expert 1 (the rule top-k needs them)",
    ),
    (
        lambda: mixing.fixed_share(X(2, 1, 1), (1, 1), 0),
        "switch: 0 (allowed: a number above 0, under 1)",
    ),
    (lambda: mixing.fixed_share(X(2, 1, 1), (1,), 0.1), "prior: expected [2], got [1]"),
    (
        lambda: mixing.fixed_share(X(2, 1, 1), (1, 1), 0.1, X(1, 1)),
        "state: expected [2, 1], got [1, 1]",
    ),
    (lambda: mix(Rule("gate"), [X(1, 1, 2)]), "name: 'gate' is trained"),
]


@pytest.mark.parametrize(("call", "message"), BAD_CALLS, ids=[text[:50] for _, text in BAD_CALLS])
def test_a_wrong_call_is_refused(call: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        call()
    assert str(caught.value).startswith(message)


def test_the_files_stand_alone() -> None:
    """A composition carries them to places where nacre is not installed."""
    found: set[str] = set()
    for module in (mixing, rules):
        found |= imported(Path(str(module.__file__)))
    assert found == {
        "__future__",
        "collections",
        "dataclasses",
        "math",
        "mixing",
        "torch",
        "typing",
    }


def imported(path: Path) -> set[str]:
    """Return the packages, and modules of the same folder, that a file imports."""
    found: set[str] = set()
    tree = ast.parse(path.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {name.name.split(".")[0] for name in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add((node.module or ".").split(".")[0])
    return found
