"""What every stage of a run stands on: tokenizer, tokens, substrate; made once, then checked."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from nacre import tokenizer as tokenizers
from nacre.data import corpus
from nacre.data.loader import Loader
from nacre.data.sampling import sample
from nacre.data.shards import TokenStore, tokenize
from nacre.errors import ConfigError, FingerprintError, Problem
from nacre.growth import ledger
from nacre.growth.plan import Plan
from nacre.substrate import Substrate, check_recipe
from nacre.train import checkpoint, files, folder
from nacre.train.observer import Observer

TOKENS_A_BYTE = 0.8
"""A text that needs more of a tokenizer that is given falls to its bytes."""


@dataclass(frozen=True)
class Parts:
    """Tokenizer, one token store for each distinct set of sources, substrate, fingerprints.

    `substrate` is None when the plan grows an existing checkpoint, `base`, whose embedding is kept.
    """

    tokenizer: PreTrainedTokenizerBase
    stores: dict[tuple[str, ...], TokenStore]
    substrate: Substrate | None
    fingerprints: dict[str, Any]
    base: str | Path | None


def source_sets(plan: Plan) -> list[tuple[str, ...]]:
    """Return the distinct sets of sources that the stages read, in order of first use."""
    return list(dict.fromkeys(plan.sources_of(stage) for stage in plan.stages))


def make_parts(plan: Plan, out: Path, observer: Observer) -> Parts:
    """Make or load tokenizer, tokens and substrate; refuse what does not fit together."""
    base = folder.base_of(plan, out)
    tokenizer = make_tokenizer(plan, base, out, observer)
    fingerprints: dict[str, Any] = {"tokenizer": tokenizers.fingerprint(tokenizer)}
    if base is not None and (Path(base) / files.RECORD).exists():
        found = files.read_record(Path(base))["fingerprint"]
        fingerprints["base"] = {"named": plan.start_from, "path": str(base), "fingerprint": found}
    substrate = None
    if plan.start_from is None:
        observer.phase("Substrate", len(tokenizer))
        substrate = make_substrate(plan, tokenizer, out, observer)
        fingerprints["substrate"] = substrate.fingerprint
    stores: dict[tuple[str, ...], TokenStore] = {}
    for number, sources in enumerate(source_sets(plan), start=1):
        observer.phase("Tokenize", corpus.check(sources).total_bytes)
        stores[sources] = store = tokenize(
            sources,
            tokenizer,
            out / "data" / f"{number:02d}",
            holdout=plan.data.holdout,
            errors=plan.data.errors,
            progress=observer.advance,
        )
        Loader(store, "train", context=plan.model.context, batch_size=1, seed=plan.seed)
        if plan.tokenizer.path is not None or plan.start_from is not None:
            warn_of_bytes(sources, store, observer)
    fingerprints["corpora"] = {" ".join(key): store.fingerprint for key, store in stores.items()}
    return Parts(tokenizer, stores, substrate, fingerprints, base)


def warn_of_bytes(sources: tuple[str, ...], store: TokenStore, observer: Observer) -> None:
    """Say so where a tokenizer that was learned from other text knows little of this one."""
    counts = store.counts.values()
    rate = sum(each.tokens for each in counts) / max(1, sum(each.bytes for each in counts))
    if rate > TOKENS_A_BYTE:
        observer.warn(
            f"{', '.join(sources)} takes {rate:.2f} tokens a byte: the tokenizer knows little of "
            "it but its bytes. Learn one from all your texts first (nacre tokenizer build --data "
            "ONE --data OTHER --out tokenizer) and grow every model with --tokenizer tokenizer"
        )


def make_tokenizer(
    plan: Plan, base: str | Path | None, out: Path, observer: Observer
) -> PreTrainedTokenizerBase:
    """Return the run's tokenizer: the one it has, the checkpoint's, a given one, or a new one."""
    target = out / "tokenizer"
    if target.exists():
        return tokenizers.load(target)
    given = plan.tokenizer.path
    if given is None and base is not None:
        given = base if Path(base).is_dir() else f"hf:{base}"
    if given is not None:
        tokenizer = tokenizers.load(given)
        if base is not None:
            _check_vocabulary(plan, base, tokenizer)
    else:
        observer.phase("Tokenizer", None)
        everything = dict.fromkeys(s for sources in source_sets(plan) for s in sources)
        texts = sample(tuple(everything), errors=plan.data.errors)
        tokenizer = tokenizers.build(texts, plan.tokenizer.size, alphabet=plan.tokenizer.alphabet)
    tokenizers.end_of_document(tokenizer)
    with files.new_folder(target) as partial:
        tokenizer.save_pretrained(partial)
    return tokenizer


def _check_vocabulary(plan: Plan, base: str | Path, tokenizer: PreTrainedTokenizerBase) -> None:
    rows = checkpoint.load_config(base).get_text_config().vocab_size
    if len(tokenizer) > rows:
        raise FingerprintError(
            "the tokenizer", f"at most {rows} tokens (the checkpoint's table)", str(len(tokenizer)),
            f"use the tokenizer that {plan.start_from} was trained with",
        )  # fmt: skip


def make_substrate(
    plan: Plan, tokenizer: PreTrainedTokenizerBase, out: Path, observer: Observer
) -> Substrate:
    """Return the run's substrate: the one it has, a given one, or a new one from the recipe."""
    target = out / "substrate"
    tokens = tokenizers.token_strings(tokenizer)
    source = target if target.exists() else plan.substrate.path
    if source is not None:
        substrate = Substrate.load(source)
        if list(substrate.tokens) != tokens:
            raise FingerprintError(
                f"the tokenizer of substrate {source}",
                _vocabulary_hash(list(substrate.tokens)), _vocabulary_hash(tokens),
                "build the substrate for this tokenizer, or name the tokenizer it was built for",
            )  # fmt: skip
        if substrate.width != plan.model.width:
            message = f"{plan.model.width}, but substrate {source} has {substrate.width} dimensions"
            raise ConfigError(Problem("model.width", message, "make them equal"))
    else:
        check_recipe(plan.substrate.recipe, len(tokens), plan.model.width)
        substrate = Substrate.build(
            plan.substrate.recipe, tokens, plan.model.width, observer.advance
        )
    if not target.exists():
        with files.new_folder(target) as partial:
            substrate.save(partial)
    return substrate


def _vocabulary_hash(tokens: list[str | bytes]) -> str:
    names = {str(index): repr(token) for index, token in enumerate(tokens)}
    return f"{len(tokens)} tokens, {ledger.fingerprint(names)[:12]}"
