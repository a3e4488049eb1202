"""How the outputs of several experts become one distribution, position by position.

Pure functions; `rules.py` puts them together.

Logits come as E tensors `[B, T, V]` of fp32, bf16 or fp16: finite, or -inf for some of a row.
Position t predicts token t + 1. Weights are fp32 logarithms that sum to one over the experts; -inf
means that an expert plays no part. Results are fp32 and carry no gradients. Logits are never
stacked: they are read in tiles of rows, and beside its result a function holds at most three fp32
tiles of `TILE_BYTES` (or of one row, where a row is larger) and tensors without the V axis.

Only torch and the standard library are imported, so that this file can travel with a composition.

Shapes: E experts, B batch, T positions, V vocabulary; `logits_BTV`, `log_weights_EBT`. In tiles, b
and t are parts of B and T.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch

TILE_BYTES = {"cpu": 2**20, "cuda": 64 * 2**20}  # of fp32 logits in one tile
IMPOSSIBLE = -1e4  # nats; an expert that called a token less likely than this can still come back
SMALLEST_DECAY = 1e-6
DECAY = f"a number from {SMALLEST_DECAY} to 1"  # what is allowed, in words
POSITIVE = "a number above 0"
FLOOR = "a number from 0, under 1"
SWITCH = "a number above 0, under 1"
GROWTH = 230.0  # nats; within e^230 and its inverse, products of two stay far inside fp64

Tile = tuple[slice, slice]


@torch.no_grad()
def log_likelihood(logits_BTV: torch.Tensor, targets_BT: torch.Tensor) -> torch.Tensor:
    """Return log p(target) in nats, fp32 `[B, T]`.

    `targets_BT` (int64) holds what each position predicts: the caller shifts. A target whose logit
    is -inf has -inf. Raises ValueError where the shapes do not agree.
    """
    shape_BT = shape_of([logits_BTV])[:2]
    expect("targets", targets_BT, shape_BT)
    likelihood_BT = torch.empty(shape_BT, device=logits_BTV.device)
    for tile in _tiles([logits_BTV]):
        log_p_btV = _log_p(logits_BTV, tile)
        likelihood_BT[tile] = log_p_btV.gather(-1, targets_BT[tile].unsqueeze(-1)).squeeze(-1)
    return likelihood_BT


@torch.no_grad()
def mix_logits(
    logits: Sequence[torch.Tensor], weights_EBT: torch.Tensor | None = None
) -> torch.Tensor:
    """Return the weighted sum of logits, fp32 `[B, T, V]`; without weights their plain mean.

    sum_e w_e logits_e: after the softmax a product of experts (Hinton 2002, "Training products of
    experts by minimizing contrastive divergence"), also called the logarithmic opinion pool. The
    plain mean is the rule of arXiv 2507.07129. `weights_EBT` are linear, not logarithms. A weight
    of 0 leaves an expert out whatever its logits, and a weight of 1 keeps logits bit for bit. A
    token at -inf for one expert that counts is -inf in the mix, even if no other is left. Raises
    ValueError where the shapes do not agree.
    """
    shape_BTV = shape_of(logits)
    mixed_BTV = torch.empty(shape_BTV, device=logits[0].device)
    if weights_EBT is None:
        for tile in _tiles(logits):
            mixed_btV = mixed_BTV[tile].copy_(logits[0][tile])
            for logits_BTV in logits[1:]:
                mixed_btV += logits_BTV[tile]
            mixed_btV /= len(logits)
        return mixed_BTV
    expect("weights", weights_EBT, (len(logits), *shape_BTV[:2]))
    for tile in _tiles(logits):
        mixed_btV = mixed_BTV[tile].zero_()
        for logits_BTV, weights_BT in zip(logits, weights_EBT, strict=True):
            weights_bt1 = weights_BT[tile].unsqueeze(-1)
            if weights_bt1.any():
                part_btV = logits_BTV[tile] * weights_bt1
                mixed_btV += part_btV.masked_fill_(weights_bt1 == 0, 0.0)
    return mixed_BTV


@torch.no_grad()
def mix_probs(logits: Sequence[torch.Tensor], log_weights_EBT: torch.Tensor) -> torch.Tensor:
    """Return the log of the weighted sum of the experts' probabilities, fp32 `[B, T, V]`.

    log sum_e w_e p_e, in log space: the linear opinion pool (Stone 1961, "The opinion pool"). A
    log weight of -inf leaves an expert out whatever its logits, and one of 0 with no other expert
    gives its log-softmax bit for bit. Raises ValueError where the shapes do not agree.
    """
    shape_BTV = shape_of(logits)
    expect("log weights", log_weights_EBT, (len(logits), *shape_BTV[:2]))
    mixed_BTV = torch.empty(shape_BTV, device=logits[0].device)
    for tile in _tiles(logits):
        mixed_btV, empty = mixed_BTV[tile], True
        for logits_BTV, log_weights_BT in zip(logits, log_weights_EBT, strict=True):
            log_weights_bt1 = log_weights_BT[tile].unsqueeze(-1)
            out_bt1 = log_weights_bt1 == -math.inf
            if out_bt1.all():
                continue
            part_btV = _log_p(logits_BTV, tile).add_(log_weights_bt1)
            part_btV.masked_fill_(out_bt1, -math.inf)
            if empty:
                mixed_btV.copy_(part_btV)
            else:
                torch.logaddexp(mixed_btV, part_btV, out=mixed_btV)
            empty = False
        if empty:
            mixed_btV.fill_(-math.inf)
    return mixed_BTV


def fixed(
    weights_E: Sequence[float], shape_BT: tuple[int, int], device: torch.device | None = None
) -> torch.Tensor:
    """Return the same log weights at every position, fp32 `[E, B, T]`: w_e / sum of w.

    Raises ValueError unless the weights are numbers of at least 0 with a positive sum.
    """
    log_E = torch.tensor(_log_shares("weights", weights_E), device=device)
    return log_E[:, None, None].expand(-1, *shape_BT)


@torch.no_grad()
def running_sums(
    observed_EBT: torch.Tensor,
    decay: float,
    state_EB: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return decayed sums of log-likelihoods, fp64 `[E, B, T]`, and the last, `[E, B]`: the state.

    sum_{s<=t} decay^(t-s) observed_s, where `observed[e, b, t]` is log p_e(x_t | x_<t) in nats; 0
    at a row's first token, which nothing predicted. Values under `IMPOSSIBLE` count as that. Where
    `mask` (`[B, T]` or `[E, B, T]`, true or 1 for a token) is 0 a sum stays as it was, so padding
    changes nothing. Experts do not touch each other: the state of one that was skipped can catch up
    later with the tokens it missed.

    In pieces of any length the sums are those of one pass: bit for bit on the CPU with a decay of 1
    (or another power of two), else up to fp64 rounding. Raises ValueError for a decay
    outside 1e-6 .. 1 and for shapes that do not agree.
    """
    if not SMALLEST_DECAY <= decay <= 1:
        raise ValueError(f"decay: {decay!r} (allowed: {DECAY})")
    observed_EBT, real_EBT = _readable(observed_EBT, mask)
    shape_EBT, device = observed_EBT.shape, observed_EBT.device
    if state_EB is None:
        state_EB = torch.zeros(shape_EBT[:2], dtype=torch.float64, device=device)
    expect("state", state_EB, shape_EBT[:2])
    sums_EBT = torch.empty_like(observed_EBT)
    positions = shape_EBT[2]
    block = max(1, positions if decay == 1 else int(GROWTH / -math.log(decay)))
    for start in range(0, positions, block):
        span = (..., slice(start, start + block))
        growth_EBt = decay ** -real_EBT[span].cumsum(-1).double()
        terms_EBt = torch.cat([state_EB.unsqueeze(-1), observed_EBT[span] * growth_EBt], -1)
        sums_EBT[span] = terms_EBt.cumsum(-1)[..., 1:] / growth_EBt
        state_EB = sums_EBT[span][..., -1].clone()
    return sums_EBT, state_EB


@torch.no_grad()
def posterior(
    observed_EBT: torch.Tensor,
    prior_E: Sequence[float],
    decay: float,
    state_EB: torch.Tensor | None = None,
    *,
    floor: float = 0.0,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log weights by how well each expert foretold the text so far, and the new state.

    w_e(t) ~ prior_e prod_{s<=t} p_e(x_s | x_<s)^(decay^(t-s)), fp32 `[E, B, T]`. With a decay of 1
    it is the Bayesian mixture over experts, as in Gururangan et al. 2021 ("DEMix layers") and Li et
    al. 2022 ("Branch-train-merge"); less forgets (Raftery, Karny and Ettler 2010, "Online
    prediction under model uncertainty via dynamic model averaging"). `floor` is the share that
    always follows the prior: w = (1 - floor) posterior + floor prior. A token that every expert
    calls impossible says nothing. The other arguments and the state (fp64 `[E, B]`) are those of
    `running_sums`. Raises ValueError as it does, and for a prior that is not one.
    """
    if not 0 <= floor < 1:
        raise ValueError(f"floor: {floor!r} (allowed: {FLOOR})")
    sums_EBT, state_EB = running_sums(observed_EBT, decay, state_EB, mask)
    return _posterior(sums_EBT, prior_E, floor), state_EB


@torch.no_grad()
def fixed_share(
    observed_EBT: torch.Tensor,
    prior_E: Sequence[float],
    switch: float,
    state_EB: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return log weights for a text that may change its expert at any token, and the new state.

    The posterior of a hidden Markov model: before each token the text draws its expert anew from
    the prior with probability `switch`, else keeps it. w(t) = (1 - switch) v(t) + switch prior,
    with v_e(t) ~ w_e(t-1) p_e(x_t | x_<t), fp32 `[E, B, T]`. A fixed share (Herbster and Warmuth
    1998, "Tracking the best expert"), here of the prior (Bousquet and Warmuth 2002, "Tracking a
    small set of experts by mixing past posteriors"): against the best division of a text into
    segments it loses at most log(1 / (switch prior_e)) nats a segment and switch (1 - prior_e)
    nats a token, whatever the experts.

    The state, fp64 `[E, B]`, are the last log weights; in any pieces they are those of one pass,
    bit for bit on the CPU. Where `mask` (`[B, T]` or `[E, B, T]`: of any expert) is 0 they stay.
    `observed_EBT` is as in `running_sums`. Raises ValueError for a prior or a switch that is none,
    and for shapes that do not agree.
    """
    if not 0 < switch < 1:
        raise ValueError(f"switch: {switch!r} (allowed: {SWITCH})")
    observed_EBT, real_BT = _readable(observed_EBT, mask)
    if real_BT.dim() == 3:
        real_BT = real_BT.any(0)
    shape_EBT, device = observed_EBT.shape, observed_EBT.device
    log_prior_E = torch.tensor(_log_shares("prior", prior_E), dtype=torch.float64, device=device)
    expect("prior", log_prior_E, shape_EBT[:1])
    log_prior_E1 = log_prior_E.unsqueeze(-1)
    if state_EB is None:
        state_EB = log_prior_E1.expand(shape_EBT[:2])
    expect("state", state_EB, shape_EBT[:2])
    kept, drawn_E1 = math.log1p(-switch), log_prior_E1 + math.log(switch)
    weights: list[torch.Tensor] = []
    for observed_EB, real_B in zip(observed_EBT.unbind(-1), real_BT.unbind(-1), strict=True):
        seen_EB = torch.log_softmax(state_EB + observed_EB, 0)
        state_EB = torch.where(real_B, torch.logaddexp(seen_EB + kept, drawn_E1), state_EB)
        weights.append(state_EB)
    return torch.log_softmax(torch.stack(weights, -1), 0).float(), state_EB


@torch.no_grad()
def entropies(logits: Sequence[torch.Tensor]) -> torch.Tensor:
    """Return the entropy of every expert's distribution in nats, fp32 `[E, B, T]`."""
    shape_BTV = shape_of(logits)
    entropy_EBT = torch.empty((len(logits), *shape_BTV[:2]), device=logits[0].device)
    for tile in _tiles(logits):
        for logits_BTV, entropy_BT in zip(logits, entropy_EBT, strict=True):
            log_p_btV = _log_p(logits_BTV, tile).clamp_(min=IMPOSSIBLE)
            entropy_BT[tile] = -log_p_btV.exp().mul_(log_p_btV).sum(-1)
    return entropy_EBT


def entropy(logits: Sequence[torch.Tensor], temperature: float) -> torch.Tensor:
    """Return log weights by confidence, fp32 `[E, B, T]`: w_e ~ exp(-H_e / temperature).

    H_e is the entropy of expert e at the position, in nats. A heuristic without a source of its
    own. Raises ValueError for a temperature that is not positive.
    """
    if not 0 < temperature < math.inf:
        raise ValueError(f"temperature: {temperature!r} (allowed: {POSITIVE})")
    return torch.log_softmax(-entropies(logits) / temperature, 0)


def top_k(log_weights_EBT: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k largest weights at each position, renormalised; the others -inf.

    As the gates of Shazeer et al. 2017 ("Outrageously large neural networks"). Of equal weights the
    first stays. The trailing axes may be any. Raises ValueError for a k under 1.
    """
    if k < 1:
        raise ValueError(f"k: {k!r} (allowed: a whole number of at least 1)")
    order_EBT = log_weights_EBT.sort(dim=0, descending=True, stable=True).indices
    return torch.log_softmax(log_weights_EBT.scatter(0, order_EBT[k:], -math.inf), 0)


@torch.no_grad()
def confidence(logits: Sequence[torch.Tensor], leading_BT: torch.Tensor) -> torch.Tensor:
    """Return the largest probability of the expert `leading_BT` (int64) names, fp32 `[B, T]`."""
    shape_BT = shape_of(logits)[:2]
    expect("leading", leading_BT, shape_BT)
    confidence_BT = torch.zeros(shape_BT, device=logits[0].device)
    for tile in _tiles(logits):
        for expert, logits_BTV in enumerate(logits):
            leads_bt = leading_BT[tile] == expert
            if leads_bt.any():
                highest_bt = _log_p(logits_BTV, tile).amax(-1).exp()
                confidence_BT[tile] += highest_bt.masked_fill_(~leads_bt, 0.0)
    return confidence_BT


def selective(
    log_weights_EBT: torch.Tensor, confidence_BT: torch.Tensor, threshold: float
) -> torch.Tensor:
    """Return all weight on the leading expert where it is sure; elsewhere the weights as they are.

    The leading expert has the largest weight (of equals the first); `confidence_BT` is its largest
    probability, and from `threshold` on it is sure. A heuristic without a source of its own.
    """
    leading_EBT = top_k(log_weights_EBT, 1)
    return torch.where(confidence_BT >= threshold, leading_EBT, log_weights_EBT)


def _readable(
    observed_EBT: torch.Tensor, mask: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return observed log-likelihoods in fp64, 0 where the mask is, and the mask as bool."""
    if observed_EBT.dim() != 3:
        raise ValueError(f"observed: expected [E, B, T], got {list(observed_EBT.shape)}")
    clamped_EBT = observed_EBT.double().clamp(min=IMPOSSIBLE)
    if mask is None:
        shape_BT, device = observed_EBT.shape[1:], observed_EBT.device
        return clamped_EBT, torch.ones(shape_BT, dtype=torch.bool, device=device)
    expect("mask", mask, observed_EBT.shape[-mask.dim() :])
    real = mask.bool()
    return clamped_EBT.masked_fill(~real, 0.0), real


def _posterior(sums_EBT: torch.Tensor, prior_E: Sequence[float], floor: float) -> torch.Tensor:
    """Return normalised log weights, fp32 `[E, B, T]`, of decayed log-likelihoods and a prior."""
    log_prior = torch.tensor(
        _log_shares("prior", prior_E), dtype=torch.float64, device=sums_EBT.device
    )
    expect("prior", log_prior, sums_EBT.shape[:1])
    log_prior_E11 = log_prior[:, None, None]
    log_weights_EBT = torch.log_softmax(sums_EBT + log_prior_E11, 0)
    if floor:
        kept_EBT = log_weights_EBT + math.log1p(-floor)
        log_weights_EBT = torch.logaddexp(kept_EBT, log_prior_E11 + math.log(floor))
        log_weights_EBT = torch.log_softmax(log_weights_EBT, 0)
    return log_weights_EBT.float()


def _log_shares(what: str, values: Sequence[float]) -> list[float]:
    """Return the logarithms of numbers as shares of their sum; -inf for a 0."""
    if not are_shares(values, len(values)):
        raise ValueError(f"{what}: {values!r} (allowed: numbers of at least 0, not all 0)")
    total = math.fsum(values)
    return [math.log(value / total) if value else -math.inf for value in values]


def is_number(value: object) -> bool:
    """Return whether `value` is a finite number."""
    return isinstance(value, int | float) and type(value) is not bool and math.isfinite(value)


def are_shares(values: object, count: int) -> bool:
    """Return whether `values` are `count` numbers of at least 0, with a finite positive sum."""
    if not isinstance(values, tuple | list):
        return False
    numbers = cast("Sequence[Any]", values)
    fit = len(numbers) == count and all(is_number(n) and n >= 0 for n in numbers)
    return fit and 0 < sum(numbers) < math.inf


def shape_of(logits: Sequence[torch.Tensor]) -> tuple[int, int, int]:
    """Return the B, T and V that all logits share; ValueError if they do not."""
    shapes = [list(logits_BTV.shape) for logits_BTV in logits]
    if not shapes or len(shapes[0]) != 3 or any(shape != shapes[0] for shape in shapes):
        raise ValueError(f"logits: expected tensors of one shape [B, T, V], got {shapes}")
    batch, positions, vocabulary = shapes[0]
    return batch, positions, vocabulary


def expect(what: str, tensor: torch.Tensor, shape: Sequence[int]) -> None:
    """Raise ValueError unless a tensor has the shape."""
    if tuple(tensor.shape) != tuple(shape):
        raise ValueError(f"{what}: expected {list(shape)}, got {list(tensor.shape)}")


def _tiles(logits: Sequence[torch.Tensor]) -> Iterator[Tile]:
    """Yield parts of B and T that cover every position once; each holds all of V.

    A part of T is of one row of B, so tiles of a new tensor are contiguous.
    """
    batch, positions, vocabulary = logits[0].shape
    largest = TILE_BYTES.get(logits[0].device.type, TILE_BYTES["cuda"])
    rows = max(1, largest // (4 * max(1, vocabulary)))
    rows_T = max(1, min(rows, positions))
    rows_B = max(1, rows // max(1, positions))
    for b in range(0, batch, rows_B):
        for t in range(0, positions, rows_T):
            yield slice(b, b + rows_B), slice(t, t + rows_T)


def _log_p(logits_BTV: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Return log-probabilities of a tile, a new fp32 tensor `[b, t, V]`."""
    return torch.log_softmax(logits_BTV[tile], -1, dtype=torch.float32)
