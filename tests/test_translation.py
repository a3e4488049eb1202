"""BLEU and chrF: sacrebleu's numbers, the language's words, how sure they are; the prompt."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import sacrebleu

from nacre.errors import ConfigError
from nacre.evaluate import translation
from nacre.evaluate.parallel import ParallelText

EXPECTED = ["The dog sees the man.", "It is the sea and the sky.", "So it is, and so it was."]
WRITTEN = [" The dog sees a man.", "It is the sea, the sky.\n", "So it was."]


def test_the_prompt_names_the_languages() -> None:
    text = ParallelText("translate-zh-en", "zh", "en", (Path("zh-en.tsv"),))
    assert translation.prompts(text, [("你好。", "Hello.")]) == [
        "Translate from Chinese to English:\n你好。\nAnswer:"
    ]


def test_scores_are_sacrebleus() -> None:
    metrics = translation.metrics("en")
    stripped = [text.strip() for text in WRITTEN]
    expected = {
        "bleu": sacrebleu.corpus_bleu(stripped, [EXPECTED]).score,
        "chrf": sacrebleu.corpus_chrf(stripped, [EXPECTED]).score,
    }
    for name, metric in metrics.items():
        assert translation.score(metric, WRITTEN, EXPECTED) == pytest.approx(expected[name])
        assert translation.score(metric, EXPECTED, EXPECTED) == pytest.approx(100.0)
        assert translation.score(metric, ["", "", ""], EXPECTED) == 0.0
        low, high = translation.interval(metric, WRITTEN, EXPECTED) or (0, 0)
        assert 0 <= low < expected[name] < high <= 100
        assert translation.interval(metric, WRITTEN, EXPECTED) == (low, high), "seeded"
        assert translation.interval(metric, ["", ""], EXPECTED[:2]) == (0.0, 0.0)
        assert translation.interval(metric, WRITTEN[:1], EXPECTED[:1]) is None


@pytest.mark.parametrize(("language", "text"), [("zh", "他看见了海和天。"), ("ja", "海と空。犬。")])
def test_languages_without_spaces_have_words(language: str, text: str) -> None:
    bleu = translation.metrics(language)["bleu"]
    assert translation.score(bleu, [text], [text]) == pytest.approx(100.0)


def test_without_sacrebleu_there_is_one_message(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sacrebleu", None)
    with pytest.raises(ConfigError) as caught:
        translation.metrics("en")
    assert str(caught.value) == (
        "translations: need the package sacrebleu (in a clone of nacre: pip install -e '.[eval]')"
    )
