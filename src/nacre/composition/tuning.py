"""Train what mixes experts: a gate, an adapter, or the experts' heads together.

The loop is that of every stage (`nacre.train.loop`); every expert is frozen, but for its head where
heads are tuned, and the ledger shows it. Nothing is written here: the caller gets the tensors.

Shapes: E experts, B batch, T positions, N = B * T, n some of N, D width, V vocabulary.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from pydantic import Field, PositiveFloat, PositiveInt
from torch import nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint as recomputed
from transformers import set_seed

from nacre import tokenizer as tokenizers
from nacre.composition.expert import Expert
from nacre.config import Section
from nacre.data import corpus
from nacre.data.loader import Loader
from nacre.data.shards import tokenize
from nacre.errors import CheckpointError, DivergedError, Problem
from nacre.growth import ledger
from nacre.growth.plan import Count, Stage, Training
from nacre.models.composed import ComposedForCausalLM
from nacre.models.mixing import fixed, log_likelihood
from nacre.models.rules import TRAINED, Rule, follow
from nacre.models.trained import Adapter, Gate
from nacre.train.device import accelerating
from nacre.train.loop import StageRun, evaluate, setup, train
from nacre.train.loss import chunk_rows
from nacre.train.observer import Observer

What = Literal["gate", "adapter", "heads"]

LEARNING_RATES: dict[What, float] = {"gate": 1e-2, "adapter": 3e-3, "heads": 3e-4}
TUNABLE = ("mean-logits", "mean-probs", "weighted", "posterior", "fixed-share")
"""Rules under which heads are tuned: those whose weights rest on single tokens, or on none."""


class Tuning(Section):
    """What to train on, and how long."""

    sources: tuple[str, ...] = Field(min_length=1)
    tokens: Count = 200_000
    lr: PositiveFloat | None = Field(default=None, description="default: by what is trained")
    context: PositiveInt = Field(default=1024, description="at most; the experts may read less")
    batch_tokens: Count = 2048
    validation_tokens: Count = 16_384
    holdout: Annotated[float, Field(gt=0, le=0.5)] = 0.05
    errors: Literal["strict", "replace"] = "strict"
    seed: Annotated[int, Field(ge=0, lt=2**32)] = 0


@dataclass(frozen=True)
class Trained:
    """What training gives: tensors for `TRAINED_FILE`, and the record of it."""

    tensors: Mapping[str, torch.Tensor]
    record: dict[str, Any]


def check(rule: Rule, heads: bool, tuning: Tuning | None) -> list[Problem]:
    """Return what does not go together, before anything is read."""
    problems: list[Problem] = []
    if heads and rule.name not in TUNABLE:
        fix = f"heads are tuned under: {', '.join(TUNABLE)}"
        problems.append(Problem("--tune heads", f"does not go with {rule.name}", fix))
    if (heads or rule.name in TRAINED) and tuning is None:
        what = "heads are" if heads else f"{rule.name} is"
        fix = "name text of all the experts' kinds"
        problems.append(Problem("--data", f"none, but {what} trained", fix))
    if not heads and rule.name not in TRAINED and tuning is not None:
        fix = f"use --mix {', --mix '.join(TRAINED)} or --tune heads, or leave it out"
        problems.append(Problem("--data", f"nothing is trained under {rule.name}", fix))
    if tuning is not None and tuning.tokens < tuning.batch_tokens:
        message = f"{tuning.tokens:,} is less than one batch of {tuning.batch_tokens:,} tokens"
        problems.append(Problem("--tokens", message, "train longer"))
    return problems


def tune(
    experts: Sequence[Expert],
    load: Callable[[], ComposedForCausalLM],
    what: What,
    tuning: Tuning,
    observer: Observer,
) -> Trained:
    """Train a composition's rule, or its experts' heads; return what was trained and the record.

    `load` gives the composition once the text has been read. Raises DataError for text that is too
    short or unreadable, CheckpointError for experts that cannot be trained this way, DivergedError
    if the loss leaves the finite numbers.
    """
    total = corpus.check(tuning.sources).total_bytes
    context = min(tuning.context, *(expert.context or tuning.context for expert in experts))
    training = Training(
        batch_tokens=context * max(1, tuning.batch_tokens // context),
        lr=tuning.lr or LEARNING_RATES[what],
        weight_decay=0.0,
        validation_tokens=tuning.validation_tokens,
        compile="off",
    )
    tokenizer = tokenizers.load(experts[0].path)
    with (
        tempfile.TemporaryDirectory(prefix="nacre-") as folder,
        accelerating(training, context) as accelerator,
    ):
        observer.phase("Tokenize", total)
        store = tokenize(
            tuning.sources, tokenizer, Path(folder) / "data",
            holdout=tuning.holdout, errors=tuning.errors, progress=observer.advance,
        )  # fmt: skip
        Loader(store, "train", context=context, batch_size=1, seed=tuning.seed)
        set_seed(tuning.seed)
        model, trained = prepare(load(), what)
        frozen = ledger.frozen_hashes(model)
        run = setup(
            model,
            Stage(tokens=tuning.tokens),
            training,
            store,
            accelerator,
            objective=Mixture(model),
            context=context,
            seed=tuning.seed,
            byte_lengths=tokenizers.byte_lengths(tokenizer),
            cursor=None,
        )
        observer.phase(f"Train the {what}", run.steps * run.batch_tokens)
        before = evaluate(run)
        observer.evaluated(before)
        try:
            train(run, [lambda run, metrics: observer.trained(metrics)])
        except DivergedError as error:
            fix = f"lower --lr (now {training.lr:g})"
            raise DivergedError(f"{str(error).partition(';')[0]}; {fix}") from None
        after = evaluate(run)
        observer.evaluated(after)
    ledger.verify_frozen(model, frozen)
    tensors = {name: t.detach().float().cpu().contiguous() for name, t in trained.items()}
    record = _record(what, run, trained, before, after)
    record |= {"experts": fingerprints(model, what), "sources": list(tuning.sources)}
    return Trained(tensors, record)


def prepare(
    model: ComposedForCausalLM, what: What
) -> tuple[ComposedForCausalLM, dict[str, nn.Parameter]]:
    """Let nothing of a composition train but what should; return it and that, by name.

    Raises CheckpointError for experts whose heads cannot be reached.
    """
    if what == "heads":
        if not all(model.exact):
            whole = model.expert_names[model.exact.index(False)]
            fix = "use a rule that is not trained, or adapter"
            raise CheckpointError(f"heads: expert {whole!r} does not end in its head alone; {fix}")
        model.untie()
    model.requires_grad_(False)
    named = model.trained_tensors(heads=what == "heads")
    trained = {name: t for name, t in named.items() if isinstance(t, nn.Parameter)}
    for parameter in trained.values():
        parameter.requires_grad_(True)
    return model, trained


def _record(
    what: str,
    run: StageRun,
    trained: Mapping[str, torch.Tensor],
    before: Mapping[str, float],
    after: Mapping[str, float],
) -> dict[str, Any]:
    return {
        "what": what,
        "trainable": sorted(trained),
        "parameters": sum(tensor.numel() for tensor in trained.values()),
        "tokens": run.progress.tokens,
        "seconds": run.progress.seconds,
        "peak_memory_bytes": run.progress.peak_memory_bytes,
        "lr": run.training.lr,
        "validation": {"before": dict(before), "after": dict(after)},
        "corpus": run.store.fingerprint,
    }


def fingerprints(model: ComposedForCausalLM, what: What) -> dict[str, str]:
    """Return for every expert the fingerprint of what did not train in it.

    Where nothing of it trained that is the fingerprint in its `stage.json`.
    """
    found: dict[str, str] = {}
    for name, expert, parts in zip(model.expert_names, model.experts, model.parts, strict=True):
        hashes = {
            tensor_name: ledger.tensor_hash(tensor)
            for tensor_name, tensor in expert.state_dict().items()
            if not (what == "heads" and tensor_name.startswith(f"{parts.head_name}."))
        }
        found[name] = ledger.fingerprint(hashes)
    return found


class Mixture(nn.Module):
    """The loss of a composition with gradients for what trains in it: its rule or its heads.

    The weights of a rule that is not trained are taken as given: no gradient goes through them.
    Logits are made a few rows at a time, and again in the backward pass.
    """

    def __init__(self, model: ComposedForCausalLM) -> None:
        super().__init__()
        self.model = model

    def train(self, mode: bool = True) -> Mixture:
        """Switch to training; experts stay without dropout."""
        super().train(mode)
        self.model.eval()
        return self

    def forward(
        self,
        ids_BT: torch.Tensor,
        targets_BT: torch.Tensor,
        below_BTD: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Return the mean of -log p(target) in nats, a scalar in fp32."""
        assert below_BTD is None, "a composition runs its experts itself"
        hidden = self.model.hidden(ids_BT)
        log_weights_EN = self._log_weights(hidden, ids_BT).flatten(1)
        targets_N = targets_BT.flatten()
        rows = [h_BTD.flatten(0, 1) for h_BTD in hidden]
        total = torch.zeros((), device=ids_BT.device)
        for part in self._chunks(len(targets_N), ids_BT.device.type):
            total = total + recomputed(
                self._nats,
                [h_ND[part] for h_ND in rows],
                log_weights_EN[:, part],
                targets_N[part],
                use_reentrant=False,
            )
        return total / len(targets_N)

    def _chunks(self, count: int, device: str) -> Iterator[slice]:
        model = self.model
        size = max(1, chunk_rows(model.config.vocab_size, device) // len(model.playing))
        return (slice(start, start + size) for start in range(0, count, size))

    @torch.no_grad()
    def _log_weights(self, hidden: Sequence[torch.Tensor], ids_BT: torch.Tensor) -> torch.Tensor:
        """Return the log weights of a rule that is not trained, `[E, B, T]`."""
        model = self.model
        every = model.rule.shares(len(model.experts))
        shares = [every[expert] for expert in model.playing]
        if not model.rule.reads_text:
            return fixed(shares, (ids_BT.shape[0], ids_BT.shape[1]), ids_BT.device)
        observed_EBT = torch.zeros(len(hidden), *ids_BT.shape, device=ids_BT.device)
        next_N = ids_BT.roll(-1, 1).flatten()
        for observed_BT, expert, h_BTD in zip(observed_EBT, model.playing, hidden, strict=True):
            h_ND = h_BTD.flatten(0, 1)
            likelihoods = [
                log_likelihood(model.logits(expert, h_ND[None, part]), next_N[None, part])[0]
                for part in self._chunks(len(h_ND), ids_BT.device.type)
            ]
            observed_BT[:, 1:] = torch.cat(likelihoods).view_as(ids_BT)[:, :-1]
        real_BT = torch.ones_like(ids_BT, dtype=torch.bool)
        real_BT[:, 0] = False
        return follow(model.rule, shares, observed_EBT, None, real_BT)[0]

    def _nats(
        self,
        hidden: Sequence[torch.Tensor],
        log_weights_En: torch.Tensor,
        targets_n: torch.Tensor,
    ) -> torch.Tensor:
        """Return the sum of -log p(target) over some rows, `[n, D]` of every expert."""
        model = self.model
        logits = [model.logits(e, h_nD) for e, h_nD in zip(model.playing, hidden, strict=True)]
        if isinstance(model.mixer, Adapter):
            z_nV = model.mixer([given.unsqueeze(1) for given in logits]).squeeze(1)
            return functional.cross_entropy(z_nV, targets_n, reduction="sum")
        if isinstance(model.mixer, Gate):
            log_weights_En = model.mixer([h_nD.unsqueeze(1) for h_nD in hidden]).squeeze(-1)
        if model.rule.mixes_logits:
            weights_En1 = log_weights_En.exp().unsqueeze(-1)
            z_nV = (torch.stack(logits).float() * weights_En1).sum(0)
            return functional.cross_entropy(z_nV, targets_n, reduction="sum")
        likelihoods = [
            -functional.cross_entropy(given.float(), targets_n, reduction="none")
            for given in logits
        ]
        return -(log_weights_En + torch.stack(likelihoods)).logsumexp(0).sum()
