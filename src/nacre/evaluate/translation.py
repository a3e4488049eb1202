"""Translation: the prompt, and what BLEU and chrF say of what a model wrote.

BLEU (Papineni et al. 2002) and chrF (Popovic 2015) are sacrebleu's, from 0 to 100.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from nacre.evaluate.extra import require
from nacre.evaluate.parallel import LANGUAGES, Pair, ParallelText

VERSION = "1"
NEW_TOKENS = 128
STOP = "\n"
RESAMPLES = 1000

TOKENIZERS = {"zh": "zh", "ja": "char", "ko": "char", "th": "char"}
"""What BLEU cuts a language into words with, where it is not sacrebleu's `13a`."""


def prompts(text: ParallelText, pairs: Sequence[Pair]) -> list[str]:
    """Return what a model is asked, for every pair."""
    head = f"Translate from {LANGUAGES[text.source]} to {LANGUAGES[text.target]}:"
    return [f"{head}\n{source}\nAnswer:" for source, _ in pairs]


def metrics(target: str) -> dict[str, Any]:
    """Return sacrebleu's metrics for a target language; raise ConfigError where it is missing."""
    require("sacrebleu", "translations")
    from sacrebleu.metrics.bleu import BLEU
    from sacrebleu.metrics.chrf import CHRF

    return {"bleu": BLEU(tokenize=TOKENIZERS.get(target, "13a")), "chrf": CHRF()}


def score(metric: Any, written: Sequence[str], expected: Sequence[str]) -> float:
    """Return a metric of all translations together."""
    return float(metric.corpus_score([text.strip() for text in written], [expected]).score)


def interval(
    metric: Any, written: Sequence[str], expected: Sequence[str]
) -> tuple[float, float] | None:
    """Return the 95% interval of a metric, bootstrapped over sentences as sacrebleu does (seeded).

    None for fewer than two sentences.
    """
    if len(written) < 2:
        return None
    stripped = [text.strip() for text in written]
    found = metric.corpus_score(stripped, [expected], n_bootstrap=RESAMPLES)
    signature = metric.get_signature().format()
    about = json.loads(found.format(width=9, signature=signature, is_json=True))
    mean, half = about.get("confidence_mean", 0.0), about.get("confidence_var", 0.0)
    return max(0.0, mean - half), min(100.0, mean + half)
