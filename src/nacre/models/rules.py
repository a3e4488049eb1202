"""Mixing rules: their names, their options, and what each does with the experts' logits.

Only torch, the standard library and this folder are imported, so that this file can travel with a
composition.

Shapes: E experts, B batch, T positions, V vocabulary; R experts that were run.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any, Literal, NamedTuple, cast

import torch

from .mixing import (
    DECAY,
    FLOOR,
    POSITIVE,
    SMALLEST_DECAY,
    SWITCH,
    are_shares,
    confidence,
    entropy,
    expect,
    fixed,
    fixed_share,
    is_number,
    mix_logits,
    mix_probs,
    posterior,
    selective,
    shape_of,
    top_k,
)

RULES: dict[str, tuple[str, ...]] = {
    "mean-logits": (),
    "mean-probs": (),
    "weighted": ("domain", "weights"),
    "posterior": ("domain", "prior", "decay", "floor"),
    "fixed-share": ("domain", "prior", "switch"),
    "entropy": ("domain", "temperature"),
    "top-k": ("domain", "prior", "decay", "floor", "k"),
    "selective": ("domain", "prior", "decay", "floor", "threshold"),
    "gate": (),
    "adapter": ("rank", "candidates"),
}
"""Every rule's name and the options it has."""

TRAINED = ("gate", "adapter")
"""Rules that are modules of `trained.py`, trained on mixed text."""

LARGEST_ADAPTER = 2**26
"""Weights of an adapter, at most: with gradient and Adam's state 1 GiB."""


@dataclass(frozen=True)
class Rule:
    """A mixing rule and its options, as a composition's config holds it.

    `mean-logits` and `mean-probs` weigh all experts alike; `weighted` by `weights`; `posterior` by
    how well they foretold the text, `fixed-share` for texts that may change their expert; `top-k`
    and `selective` start from the posterior's weights. `domain` is what is mixed, `logits` or
    `probs` (the default, except for `mean-logits`). `prior` and `weights` have one number an expert
    and are taken as shares of their sum. `gate` and `adapter` are trained, see `trained.py`.
    """

    name: str = "fixed-share"
    domain: Literal["logits", "probs"] | None = None
    weights: tuple[float, ...] | None = None
    prior: tuple[float, ...] | None = None
    decay: float = 0.9
    floor: float = 0.0
    switch: float = 0.005
    temperature: float = 1.0
    k: int = 1
    threshold: float = 0.5
    rank: int = 16
    candidates: int = 64

    @classmethod
    def parse(cls, data: Mapping[str, Any], experts: int) -> Rule:
        """Return the rule that a JSON object describes, for so many experts.

        Raises ValueError with every problem, one a line: field, value, what is allowed.
        """
        names = [field.name for field in fields(cls)]
        unknown = [key for key in data if key not in names]
        problems = [f"{key}: unknown (allowed: {', '.join(names)})" for key in unknown]
        rule = cls(**{key: _tupled(data[key]) for key in names if key in data})
        problems += rule.check(experts)
        if problems:
            raise ValueError("\n".join(problems))
        return rule

    def as_json(self) -> dict[str, Any]:
        """Return the name and the options that the rule has, for `parse`."""
        given = {key: getattr(self, key) for key in ("name", *RULES[self.name])}
        for key in ("weights", "prior"):
            if given.get(key) is not None:
                given[key] = list(given[key])
        return {key: value for key, value in given.items() if value is not None}

    def check(self, experts: int) -> list[str]:
        """Return what is wrong with the rule for so many experts: field, value, what is allowed."""
        if self.name not in tuple(RULES):
            return [f"name: {self.name!r} (allowed: {', '.join(RULES)})"]
        shares = f"{experts} numbers of at least 0, one an expert, not all 0"
        allowed = {
            "domain": (self.domain in (None, "logits", "probs"), "logits, probs"),
            "weights": (are_shares(self.weights, experts), shares),
            "prior": (self.prior is None or are_shares(self.prior, experts), shares),
            "decay": (is_number(self.decay) and SMALLEST_DECAY <= self.decay <= 1, DECAY),
            "floor": (is_number(self.floor) and 0 <= self.floor < 1, FLOOR),
            "switch": (is_number(self.switch) and 0 < self.switch < 1, SWITCH),
            "temperature": (is_number(self.temperature) and self.temperature > 0, POSITIVE),
            "k": (type(self.k) is int and 1 <= self.k <= experts, f"1 to {experts}"),
            "threshold": (
                is_number(self.threshold) and 0 < self.threshold <= 1,
                "a number above 0, up to 1",
            ),
            "rank": (
                type(self.rank) is int and self.rank >= 0,
                "a whole number of at least 1, or 0 for a dense adapter",
            ),
            "candidates": (
                type(self.candidates) is int and self.candidates >= 1,
                "a whole number of at least 1",
            ),
        }
        problems: list[str] = []
        for key, (fits, what) in allowed.items():
            value = getattr(self, key)
            if key in RULES[self.name]:
                if not fits:
                    problems.append(f"{key}: {value!r} (allowed: {what})")
            elif value != getattr(Rule, key):
                has = ", ".join(RULES[self.name]) or "no options"
                problems.append(f"{key}: {value!r} is no option of {self.name} (it has: {has})")
        return problems

    @property
    def mixes_logits(self) -> bool:
        """Whether logits are mixed; else probabilities."""
        return self.name == "mean-logits" or self.domain == "logits"

    @property
    def reads_text(self) -> bool:
        """Whether the weights rest on how likely each expert found the text, so need a state."""
        return "prior" in RULES[self.name]

    def shares(self, experts: int) -> tuple[float, ...]:
        """Return the numbers that weights start from: `weights`, `prior` or all alike."""
        return self.weights or self.prior or (1.0,) * experts


class Mixed(NamedTuple):
    """What `mix` returns: fp32 `[B, T, V]`, fp32 `[E, B, T]`, and the state after the last token.

    `output_BTV` are logits where the rule mixes logits, else log-probabilities. `state_EB` (fp64)
    is None for rules that do not read the text; its B axis is reordered with the batch's.
    """

    output_BTV: torch.Tensor
    log_weights_EBT: torch.Tensor
    state_EB: torch.Tensor | None


@torch.no_grad()
def mix(
    rule: Rule,
    logits: Sequence[torch.Tensor | None],
    observed_EBT: torch.Tensor | None = None,
    state_EB: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> Mixed:
    """Mix the experts' logits at a chunk of positions by a rule that is not trained.

    `observed_EBT`, `state_EB` and `mask` (1 for a token) are those of `follow`; rules that do not
    read the text ignore them. An expert without a weight or a prior may have None for logits: it
    gets no weight and its sum stays. Raises ValueError where shapes do not agree, another expert is
    missing, or the rule does not fit the experts.
    """
    experts = len(logits)
    if problems := rule.check(experts):
        raise ValueError("\n".join(problems))
    if rule.name in TRAINED:
        raise ValueError(f"name: {rule.name!r} is trained (a composition with it mixes itself)")
    run = [given for given in logits if given is not None]
    batch, positions, _ = shape_of(run)
    was_run = [given is not None for given in logits]
    shares = _shares_of_run(rule, was_run)
    if rule.reads_text:
        shape_EBT = (experts, batch, positions)
        if mask is not None:
            expect("mask", mask, shape_EBT[1:])
        if not all(was_run):
            was_run_E11 = torch.tensor(was_run, device=run[0].device)[:, None, None]
            real_EBT = was_run_E11.expand(shape_EBT)
            mask = real_EBT if mask is None else real_EBT & mask.bool()
        if observed_EBT is None:
            raise ValueError(f"observed: none ({rule.name} needs it)")
        expect("observed", observed_EBT, shape_EBT)
        log_weights_EBT, state_EB = follow(rule, shares, observed_EBT, state_EB, mask)
    elif rule.name == "entropy":
        log_weights_EBT = entropy(run, rule.temperature)
    else:
        log_weights_EBT = fixed(shares, (batch, positions), run[0].device)
    if rule.name == "top-k":
        log_weights_EBT = top_k(log_weights_EBT, rule.k)
    rows = [expert for expert in range(experts) if was_run[expert]]
    if rule.name == "selective":
        sure_BT = confidence(run, log_weights_EBT[rows].argmax(0))
        log_weights_EBT = selective(log_weights_EBT, sure_BT, rule.threshold)
    log_weights_RBT = log_weights_EBT if all(was_run) else log_weights_EBT[rows]
    return Mixed(combine(rule, run, log_weights_RBT), log_weights_EBT, state_EB)


def follow(
    rule: Rule,
    shares: Sequence[float],
    observed_EBT: torch.Tensor,
    state_EB: torch.Tensor | None = None,
    mask: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the log weights of a rule that reads the text, and its new state.

    `shares` are its prior; the other arguments are those of `mixing.posterior` and `fixed_share`.
    `top-k` and `selective` have the posterior's weights here.
    """
    if rule.name == "fixed-share":
        return fixed_share(observed_EBT, shares, rule.switch, state_EB, mask)
    return posterior(observed_EBT, shares, rule.decay, state_EB, floor=rule.floor, mask=mask)


def combine(
    rule: Rule, logits: Sequence[torch.Tensor], log_weights_RBT: torch.Tensor
) -> torch.Tensor:
    """Mix logits or probabilities, as the rule has it, by log weights; fp32 `[B, T, V]`."""
    if rule.name == "mean-logits":
        return mix_logits(logits)
    if rule.mixes_logits:
        return mix_logits(logits, log_weights_RBT.exp())
    return mix_probs(logits, log_weights_RBT)


def _shares_of_run(rule: Rule, was_run: Sequence[bool]) -> list[float]:
    """Return the experts' shares; ValueError if one that has a share was not run."""
    shares = rule.shares(len(was_run))
    for expert, (share, ran) in enumerate(zip(shares, was_run, strict=True)):
        if share and not ran:
            raise ValueError(f"logits: none of expert {expert} (the rule {rule.name} needs them)")
    return list(shares)


def _tupled(value: Any) -> Any:
    """Return a list as a tuple, anything else as it is."""
    return tuple(cast("list[Any]", value)) if isinstance(value, list) else value
