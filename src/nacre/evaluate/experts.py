"""Who lost what: a composition beside each of its experts alone, on the same texts.

What is returned and written is plain data. Everything reads with the same context, so that the only
difference between two numbers of a row is the model.
"""

from __future__ import annotations

import gc
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nacre import composition
from nacre import tokenizer as tokenizers
from nacre.atomic import write_text
from nacre.composition.card import card
from nacre.composition.expert import RECORD
from nacre.evaluate import language
from nacre.evaluate.language import DocumentScore, EvalDocument
from nacre.evaluate.scores import RESAMPLES
from nacre.train import files
from nacre.train.observer import Observer

SMALL = 0.0005
"""Bits per byte that two models may differ by and still be called as good as each other."""


def compare(
    folder: str | Path, documents: Sequence[EvalDocument], observer: Observer | None = None
) -> dict[str, Any]:
    """Score documents with a composition and with each of its experts alone; return who lost what.

    The `rows` are one for each domain, for each language of several domains, and for all documents:
    bits per byte of the composition and of every expert, the best expert, the difference to it with
    its 95% interval (None for one document), the `outcome` (better, as good, worse) and a `verdict`
    in words. One model is in memory at a time. Raises CheckpointError and FingerprintError as
    `composition.load` does, and CheckpointError for a model without finite scores.
    """
    folder, watch = Path(folder), observer or Observer()
    record = composition.read_record(folder)
    tokenizer = tokenizers.load(folder)
    texts = [document.text for document in documents]
    tokens = sum(map(len, language.encode(tokenizer, texts)))
    context = min(record["context"], language.LONGEST)
    settings = {"context": context, "stride": max(1, context // 2)}

    def scored(what: str, place: Path) -> list[DocumentScore]:
        watch.phase(f"Score {what}", tokens)
        gc.collect()  # models refer to themselves: the one before would stay
        model = composition.load_on_device(place)
        return language.score(model, tokenizer, texts, progress=watch.advance, **settings)

    composed = scored("the composition", folder)
    experts = {
        expert["name"]: scored(f"expert {expert['name']}", folder / expert["path"])
        for expert in record["experts"]
    }
    for name, scores in experts.items():
        language.check_finite(f"{folder}: expert {name}", documents, scores)
    language.check_finite(f"{folder}: the composition", documents, composed)
    return {
        "texts": language.fingerprint(documents),
        "settings": {**settings, "resamples": RESAMPLES},
        "rows": [
            {"kind": kind, "name": name}
            | _row(
                [composed[index] for index in chosen],
                {expert: [scores[i] for i in chosen] for expert, scores in experts.items()},
            )
            for kind, name, chosen in language.groups(documents)
        ],
    }


def write_report(folder: str | Path, report: Mapping[str, Any]) -> dict[str, Any]:
    """Put what `compare` found into a composition's record and card; return the record."""
    record = composition.read_record(folder) | {"report": dict(report)}
    files.write_json(Path(folder) / RECORD, record)
    write_text(Path(folder) / "README.md", card(record))
    return record


def _row(
    composed: Sequence[DocumentScore], experts: Mapping[str, Sequence[DocumentScore]]
) -> dict[str, Any]:
    """Return what a row says of some documents, besides its name."""
    alone = {name: language.bits_per_byte(scores) for name, scores in experts.items()}
    best = min(alone, key=alone.__getitem__)
    together = language.bits_per_byte(composed)
    between = language.interval(composed, experts[best])
    outcome, sentence = verdict(best, together - alone[best], between)
    return {
        "documents": len(composed),
        "bytes": sum(score.bytes for score in composed),
        "composition": together,
        "experts": alone,
        "best": best,
        "difference": together - alone[best],
        "interval": None if between is None else list(between),
        "outcome": outcome,
        "verdict": sentence,
    }


def verdict(best: str, difference: float, interval: tuple[float, float] | None) -> tuple[str, str]:
    """Return the outcome (better, as good, worse) and a sentence for people.

    `difference` is how many more bits per byte the composition has than its best expert. Without an
    interval its sign decides.
    """
    whom, size = f"its best expert ({best})", abs(difference)
    if size < SMALL:
        return "as good", f"as good as {whom}: less than {SMALL} bits per byte apart"
    if interval is not None and interval[0] <= 0 <= interval[1]:
        within = f"{difference:+z.3f} bits per byte, {interval[0]:+z.3f} to {interval[1]:+z.3f}"
        return "as good", f"as good as {whom} within the interval: {within}"
    said = "one document: no interval"
    if interval is not None:
        said = " to ".join(f"{bound:.3f}" for bound in sorted(map(abs, interval)))
    if difference < 0:
        return "better", f"better than {whom} by {size:.3f} bits per byte ({said})"
    return "worse", f"worse than {whom}: {size:.3f} bits per byte more ({said})"
