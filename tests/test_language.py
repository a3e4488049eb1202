"""Scores of texts: windows against a loop of one by one, domains, intervals, refusals."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import CONTEXT, VOCABULARY, Build
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from nacre.errors import ConfigError, DataError
from nacre.evaluate import language, scores
from nacre.evaluate.language import DocumentScore
from nacre.models.composed import ComposedConfig, ComposedForCausalLM

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ .,<>é水"
END = "<end>"


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    """A token a letter; the end of a document is the id 0."""
    ids = {token: index for index, token in enumerate([END, *LETTERS, "?"])}
    rust = Tokenizer(models.WordLevel(ids, unk_token="?"))
    rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    assert len(ids) <= VOCABULARY
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token=END)


def text(length: int, seed: int = 0) -> str:
    return "".join(np.random.default_rng(seed).choice(list(LETTERS), length))


TEXTS = ["é", text(200, 1), text(CONTEXT, 2), text(CONTEXT + 1, 3), text(5, 4), text(77, 5), ""]


def naive(
    model: Any, tokenizer: PreTrainedTokenizerFast, text: str, context: int, stride: int
) -> tuple[float, int]:
    """Score one text window by window in fp64; return nats and how many tokens were counted."""
    ids = [0, *tokenizer.convert_tokens_to_ids(list(text))]
    nats, counted, begin = 0.0, 0, 0
    while counted < len(ids) - 1:
        piece = torch.tensor([ids[begin : begin + context]])
        with torch.no_grad():
            log_p = model(input_ids=piece).logits.double().log_softmax(-1)[0]
        for place, target in enumerate(ids[begin + 1 : begin + context + 1]):
            if begin + place + 1 > counted:
                nats -= log_p[place, target].item()
                counted = begin + place + 1
        begin += stride
    return nats, counted


def build(kind: str, pico: Build) -> Any:
    if kind != "composed":
        return pico(kind)
    experts = [{"name": "a"}, {"name": "b"}]
    config = ComposedConfig(experts, {"name": "posterior"}, VOCABULARY, CONTEXT)
    return ComposedForCausalLM(config, [pico("llama", seed=1), pico("gpt_neox", seed=2)])


# --- scores ---


@pytest.mark.parametrize("kind", ["llama", "gpt_neox", "gpt2", "opt", "qwen3_sliding", "composed"])
def test_scores_are_those_of_one_window_after_the_other(
    kind: str, pico: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(kind, pico)
    for context, stride in [(CONTEXT, CONTEXT // 2), (CONTEXT, CONTEXT), (11, 1)]:
        scores = language.score(model, tokenizer, TEXTS, context=context, stride=stride)
        for document, found in zip(TEXTS, scores, strict=True):
            nats, counted = naive(model, tokenizer, document, context, stride)
            assert found.tokens == counted == len(document)
            assert found.bytes == len(document.encode())
            assert found.nats == pytest.approx(nats, abs=1e-4)


@pytest.mark.parametrize("kind", ["llama", "composed"])
def test_scores_do_not_depend_on_the_batch(
    kind: str, pico: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = build(kind, pico)
    whole = language.score(model, tokenizer, TEXTS)
    for batch_tokens in (1, 100, 10**6):
        apart = language.score(model, tokenizer, TEXTS, batch_tokens=batch_tokens)
        assert [s.nats for s in apart] == pytest.approx([s.nats for s in whole], abs=1e-4)
    (alone,) = language.score(model, tokenizer, TEXTS[1:2])
    assert alone.nats == pytest.approx(whole[1].nats, abs=1e-4)


@pytest.mark.parametrize("stride", [1, 7, 16, 31, 32])
def test_every_token_counts_exactly_once(
    stride: int, pico: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    """A model without knowledge needs log V nats for each token, wherever windows begin."""
    model: Any = pico("llama")
    torch.nn.init.zeros_(model.lm_head.weight)
    steps: list[int] = []
    scores = language.score(model, tokenizer, TEXTS, stride=stride, progress=steps.append)
    for document, found in zip(TEXTS, scores, strict=True):
        assert found.nats == pytest.approx(len(document) * math.log(VOCABULARY), abs=1e-3)
    assert sum(steps) == sum(map(len, TEXTS))
    assert min(steps) > 0


def test_context_is_the_models_and_stride_half_of_it(
    pico: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = pico("gpt2")
    stated = language.score(model, tokenizer, TEXTS, context=CONTEXT, stride=CONTEXT // 2)
    assert language.score(model, tokenizer, TEXTS) == stated
    model.train()
    assert language.score(model, tokenizer, TEXTS) == stated, "no dropout"


def test_names_of_special_tokens_in_a_text_stay_text(
    pico: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    assert tokenizer(f"a{END}b").input_ids[1] == 0, "what must not happen in a corpus"
    (found,) = language.score(pico("llama"), tokenizer, [f"a{END}b"])
    assert found.tokens == found.bytes == 2 + len(END)


def test_impossible_contexts_and_strides_are_refused(
    pico: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    model = pico("llama")

    def refused(model: PreTrainedModel = model, **options: int) -> str:
        with pytest.raises(ConfigError) as caught:
            language.score(model, tokenizer, ["a"], **options)
        return str(caught.value)

    for context in (0, 33):
        expected = f"context: {context} is not 1 to 32 (leave it out for the model's own)"
        assert refused(context=context) == expected
    for stride in (0, 9):
        expected = f"stride: {stride} is not 1 to 8, the context (half the context is usual)"
        assert refused(context=8, stride=stride) == expected
    shape = {"hidden_size": 32, "n_layer": 1, "n_head": 2}
    endless = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, **shape))
    assert refused(endless) == (
        "context: the model's configuration does not say it (give the number of tokens it can read)"
    )
    assert refused(endless, context=0).startswith("context: 0 is not 1 or more")
    assert language.score(endless, tokenizer, ["a"], context=100)
    tokenizer.eos_token = None
    assert "no eos, bos or sep token" in refused(context=8)


def test_bits_per_byte_are_pooled() -> None:
    scores = [DocumentScore(8 * math.log(2), 3, 4), DocumentScore(2 * math.log(2), 1, 16)]
    assert [score.bits_per_byte for score in scores] == pytest.approx([2.0, 0.125])
    assert language.bits_per_byte(scores) == pytest.approx(0.5)
    assert math.isnan(language.bits_per_byte([]))


# --- intervals ---


def scores_of(nats: Any, sizes: Any) -> list[DocumentScore]:
    return [DocumentScore(float(n), 1, int(s)) for n, s in zip(nats, sizes, strict=True)]


def test_an_interval_has_the_sign_of_a_clear_difference() -> None:
    generator = np.random.default_rng(1)
    sizes = generator.integers(50, 500, 40)
    base = sizes * generator.uniform(0.5, 4.0, 40)  # documents differ far more than the models
    more = scores_of(base + sizes * (0.02 + 0.01 * generator.standard_normal(40)), sizes)
    less = scores_of(base, sizes)
    difference = language.bits_per_byte(more) - language.bits_per_byte(less)
    found = language.interval(more, less)
    assert found is not None
    assert 0 < found[0] < difference < found[1] < 0.05
    turned = language.interval(less, more)
    assert turned == pytest.approx((-found[1], -found[0]))
    assert language.interval(more, less) == found, "seeded"
    assert language.interval(more, less, seed=1) != found


def test_an_interval_is_as_wide_as_theory_says() -> None:
    generator = np.random.default_rng(2)
    noise = generator.standard_normal(400)
    found = language.interval(scores_of(noise, np.full(400, 1)), scores_of(noise * 0, [1] * 400))
    assert found is not None
    half = 1.96 * noise.std() / math.sqrt(400) / math.log(2)
    middle = noise.mean() / math.log(2)
    assert found == pytest.approx((middle - half, middle + half), abs=0.1 * half)


def test_an_interval_of_one_model_is_that_of_its_difference_to_nothing() -> None:
    generator = np.random.default_rng(3)
    sizes = generator.integers(50, 500, 40)
    scores = scores_of(sizes * generator.uniform(1, 2, 40), sizes)
    found = language.interval(scores)
    assert found == language.interval(scores, scores_of(np.zeros(40), sizes))
    assert found is not None
    assert found[0] < language.bits_per_byte(scores) < found[1]
    assert language.interval(scores[:1]) is None


def test_perplexity_is_pooled_over_tokens() -> None:
    scores = [DocumentScore(6.0, 2, 9), DocumentScore(2.0, 2, 1), DocumentScore(1.0, 1, 1)]
    assert language.perplexity(scores) == pytest.approx(math.exp(9 / 5))
    assert math.isnan(language.perplexity([]))
    found = language.perplexity_interval(scores)
    assert found == pytest.approx((math.exp(1), math.exp(3)), rel=1e-6)
    assert language.perplexity_interval(scores[:1]) is None
    assert language.perplexity([DocumentScore(1e6, 1, 1)]) < math.inf


def test_an_interval_of_the_same_scores_is_zero_and_of_one_document_none() -> None:
    scores = scores_of([3.0, 5.0, 9.0], [2, 3, 4])
    assert language.interval(scores, scores) == (0.0, 0.0)
    assert language.interval(scores[:1], scores[:1]) is None
    with pytest.raises(ValueError, match="different documents"):
        language.interval(scores, scores[::-1])


def test_an_interval_is_the_same_however_many_are_drawn_at_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    more, less = scores_of([3, 5, 9, 4], [2, 3, 4, 5]), scores_of([2, 6, 7, 4], [2, 3, 4, 5])
    whole = language.interval(more, less)
    monkeypatch.setattr(scores, "DRAWN_AT_ONCE", 400)
    assert language.interval(more, less) == whole


# --- documents ---


def write(root: Path, **files: str) -> None:
    for name, content in files.items():
        path = root / name.replace("__", "/").replace("_", ".")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content, encoding="utf-8")


def test_domains_are_folders_and_languages_their_first_part(tmp_path: Path) -> None:
    write(
        tmp_path, ru__text_txt="да", en__novels__b_txt="two", en__novels__a_txt="one", zh_txt="水",
        en__wiki_jsonl='{"text": "x"}\n{"text": "y"}\n', en__notes_pdf="no text", _hidden_txt="h",
        _git__text_txt="hidden", en___b_txt="hidden too",
    )  # fmt: skip
    (tmp_path / "de.old.txt.gz").write_bytes(gzip.compress(b"alt"))
    documents = language.read_documents(tmp_path)
    assert [(d.language, d.domain, d.text) for d in documents] == [
        ("de.old", "de.old", "alt"), ("en", "en", "x"), ("en", "en", "y"),
        ("en", "en/novels", "one"), ("en", "en/novels", "two"), ("ru", "ru", "да"),
        ("zh", "zh", "水"),
    ]  # fmt: skip
    assert documents[1].source == f"{tmp_path / 'en' / 'wiki.jsonl'}, line 1"
    assert language.read_documents(str(tmp_path)) == documents


def test_a_folder_with_the_name_of_a_source_is_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write(tmp_path, default__en_txt="mine")
    monkeypatch.chdir(tmp_path)
    assert [d.text for d in language.read_documents("default")] == ["mine"]


def test_a_fingerprint_is_that_of_domains_and_texts(tmp_path: Path) -> None:
    write(tmp_path, a__en__x_txt="text", b__en__other_txt="text", c__ru__x_txt="text")
    a, b, c = (language.fingerprint(language.read_documents(tmp_path / n)) for n in "abc")
    assert a == b, "a file's name is none of it"
    assert a != c
    first, second = language.EvalDocument("bc", "a", ""), language.EvalDocument("c", "ab", "")
    assert language.fingerprint([first]) != language.fingerprint([second])


def test_folders_without_texts_are_refused(tmp_path: Path) -> None:
    def refused(folder: Path) -> str:
        with pytest.raises(DataError) as caught:
            language.read_documents(folder)
        return str(caught.value)

    fix = "name one that holds a folder, or a file, of text for each domain"
    none, file, empty = tmp_path / "none", tmp_path / "file.txt", tmp_path / "empty"
    file.write_text("text")
    assert refused(none) == f"{none}: there is no such folder; {fix}"
    assert refused(file) == f"{file}: is no folder; {fix}"
    (empty / "en").mkdir(parents=True)
    assert refused(empty).startswith(f"{empty}: the folder has no file that nacre reads; ")
    (empty / "en" / "a.txt").write_text("")
    assert refused(empty) == f"{empty / 'en' / 'a.txt'}: the file is empty"
    (empty / "en" / "a.txt").write_bytes(b"\xff\xfe")
    assert "invalid UTF-8 at byte 0 (0xFF); convert it to UTF-8 (" in refused(empty)
    (empty / "en" / "a.txt").unlink()
    (empty / "en" / "b.jsonl").write_text(json.dumps({"text": ""}))
    assert refused(empty) == f"{empty / 'en' / 'b.jsonl'}: there is no text in it"
