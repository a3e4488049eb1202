"""Probes: the same everywhere, right, fair, apart from the text to train on; and how models do."""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Callable
from functools import cache
from pathlib import Path
from string import ascii_letters, digits
from typing import Any

import pytest
import torch
from conftest import CONTEXT, VOCABULARY, Build
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedModel, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from nacre import tokenizer as tokenizers
from nacre.errors import CheckpointError, ConfigError
from nacre.evaluate import language, probes
from nacre.evaluate.probes import PROBES, Example
from nacre.models import stock
from nacre.models.composed import ComposedConfig, ComposedForCausalLM

EVERY = pytest.mark.parametrize("name", PROBES)
FIRST = {
    "copy": ("j6d5i1j2|", "j"),
    "induction": ("c5b0g8i6f7e2h3j4;g", "8"),
    "khop-1": ("b>c;a>i;j>g;e>h;e=", "h"),
    "khop-2": ("a>e;j>l;g>d;h>g;l>k;b>c;f>a;i>b;h=", "d"),
    "brackets": ("(f)c{j[c]j", "}"),
    "modular": ("6+2+3+3=4;0+3+2+5=0;0+7+3+7=", "7"),
}
"""The first example of seed 0: what was published under a version stays so."""


@cache
def built() -> PreTrainedTokenizerBase:
    """A tokenizer of ours, learned from text of every probe: what it can join, it joins."""
    return tokenizers.build([d for name in PROBES for d in probes.text(name, 1, 200)], 1024)


def tokens(characters: str) -> PreTrainedTokenizerFast:
    """A tokenizer with a token for each of these characters; the end of a document is the id 0."""
    ids = {token: index for index, token in enumerate(["<end>", *characters, "?"])}
    rust = Tokenizer(models.WordLevel(ids, unk_token="?"))
    rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    return PreTrainedTokenizerFast(tokenizer_object=rust, eos_token="<end>")


def made(name: str, count: int = 300, seed: int = 0) -> list[Example]:
    return probes.examples(name, built(), seed, count)


# --- what they ask ---


@pytest.mark.parametrize("name", FIRST)
def test_examples_are_the_same_everywhere_and_always(name: str) -> None:
    example = made(name, 1)[0]
    assert (example.prompt, example.answer) == FIRST[name]
    assert PROBES[name].version == "1"


def follow(prompt: str, hops: int) -> tuple[str, set[str]]:
    *links, question = prompt.split(";")
    pairs = dict(link.split(">") for link in links)
    assert len(pairs) == len(links) == len(set(pairs.values())) == 4 * hops
    node, walked = question[0], 0
    while node in pairs:
        node, walked = pairs[node], walked + 1
    assert walked == hops
    assert question[0] not in pairs.values(), "a question begins where a chain begins"
    return node, set(pairs.values()) - pairs.keys()


def solve(name: str, prompt: str) -> tuple[str, set[str]]:
    """Answer a prompt in another way than it was made; return that and what may be answered."""
    if name == "copy":
        sequence, again = prompt.split("|")
        assert sequence.startswith(again)
        answer = sequence[len(again)]
        return answer, set(digits if answer.isdigit() else ascii_letters[:10])
    if name == "induction":
        before, cue = prompt.split(";")
        return before[before.index(cue) + 1], set(before[1::2])
    if name.startswith("khop"):
        return follow(prompt, int(name[-1]))
    if name == "brackets":
        stack = ""
        for bracket in prompt[::2]:
            if bracket in probes.BRACKETS:
                stack += bracket
            else:
                assert bracket == probes.BRACKETS[stack[-1]]
                stack = stack[:-1]
        assert prompt[-2] in probes.CLOSING
        return probes.BRACKETS[stack[-1]], set(probes.CLOSING)
    assert name == "modular"
    *shown, asked = prompt.split(";")
    for done in shown:
        total, result = done.split("=")
        assert sum(map(int, total.split("+"))) % 10 == int(result)
    return str(sum(map(int, asked[:-1].split("+"))) % 10), set(digits)


@EVERY
def test_answers_are_right_and_candidates_are_what_is_possible(name: str) -> None:
    for example in made(name):
        answer, possible = solve(name, example.prompt)
        assert answer == example.answer
        assert set(example.candidates) == possible
        assert len(example.candidates) == len(possible)


def test_examples_of_the_document_are_right() -> None:
    page = (Path(__file__).parent.parent / "docs" / "evaluation.md").read_text(encoding="utf-8")
    shown = re.findall(r"^\| `([\w-]+)`.*? \| `(.+?)` → `(.)`", page, re.MULTILINE)
    assert len(shown) == 5
    for name, prompt, answer in shown:
        asked = "khop-2" if name == "khop-1" else name
        assert solve(asked, prompt.replace("\\|", "|"))[0] == answer


@EVERY
def test_answers_are_as_often_each_candidate(name: str) -> None:
    """Within four standard deviations: who knows nothing has the chance that is said."""
    examples = made(name, 2000)
    kinds = {len(example.candidates) for example in examples}
    (candidates,) = kinds
    counts = Counter(example.candidates.index(example.answer) for example in examples)
    expected = len(examples) / candidates
    deviation = math.sqrt(expected * (1 - 1 / candidates))
    assert len(counts) == candidates
    assert all(abs(count - expected) < 4 * deviation for count in counts.values())


@EVERY
def test_the_longest_prompt_is_the_context_that_is_said(name: str) -> None:
    assert max(example.place for example in made(name, 1000)) + 1 == PROBES[name].context


def test_places_to_ask_are_all_of_a_copy() -> None:
    assert {example.place for example in made("copy")} == set(range(9, 17))


@EVERY
def test_every_character_is_a_token_of_its_own(name: str) -> None:
    """Also where a tokenizer learned from the probes; ours, and one that splits as GPT-2's does."""
    documents = list(probes.text(name, 2, 300))
    bytewise = Tokenizer(models.BPE())
    bytewise.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    trainer = trainers.BpeTrainer(vocab_size=1000, show_progress=False)  # pyright: ignore
    bytewise.train_from_iterator(documents, trainer)
    for rust in (tokenizers.encoder(built()), bytewise):
        for document, encoded in zip(documents, rust.encode_batch(documents), strict=True):
            assert len(encoded.ids) == len(document)


# --- examples and text to train on ---


def cores(name: str, document: str) -> list[str]:
    if name == "modular":
        return [done.partition("=")[0] for done in document.split(";")]
    if name == "brackets":
        closing = [place for place in range(2, 32, 2) if document[place] in probes.CLOSING]
        return [document[:place] for place in closing if document[place - 2] in probes.CLOSING]
    if name == "copy":
        return [document.partition("|")[0]]
    return [document.partition("=")[0].rpartition(";")[0]]


@EVERY
def test_text_to_train_on_holds_no_example(name: str) -> None:
    documents = [d for seed in (0, 1, 7) for d in probes.text(name, seed, 500)]
    trained = {core for document in documents for core in cores(name, document)}
    assert len(trained) > 1400
    assert not any(map(probes.is_held_out, trained))
    for example in [*made(name, 200), *made(name, 200, seed=1)]:
        asked = example.prompt if name == "brackets" else cores(name, example.text)[-1]
        assert probes.is_held_out(asked)
        assert not any(document.startswith(example.prompt) for document in documents)


@EVERY
def test_answers_in_text_to_train_on_are_right(name: str) -> None:
    for document in probes.text(name, 3, 100):
        if name.startswith("khop"):
            parts = document.split(";")
            links, ends = parts[:-4], parts[-4:]
            assert [solve(name, ";".join([*links, end[:2]]))[0] for end in ends] == [
                end[2] for end in ends
            ]
        elif name == "copy":
            assert document[:8] == document[9:]
        elif name == "induction":
            pairs = [[side[i : i + 2] for i in range(0, 16, 2)] for side in document.split(";")]
            assert sorted(pairs[0]) == sorted(pairs[1])
        elif name == "modular":
            assert solve(name, document[:-1])[0] == document[-1]
        else:
            for prompt in cores(name, document):
                assert solve(name, prompt)[0] == document[len(prompt)]


@EVERY
def test_examples_follow_from_the_seed(name: str) -> None:
    assert made(name, 20) == made(name, 300)[:20]
    assert made(name, 20, seed=1) != made(name, 20)
    assert list(probes.text(name, 0, 9)) == list(probes.text(name, 0, 99))[:9]
    assert list(probes.text(name, 0, 9)) != list(probes.text(name, 1, 9))
    assert len({example.text for example in made(name)}) > 290


# --- tokenizers and models that cannot ---


def refused(action: Callable[[], Any]) -> str:
    with pytest.raises(ConfigError) as caught:
        action()
    return str(caught.value)


def test_letters_are_those_that_the_tokenizer_has() -> None:
    tokenizer = tokens("zyxwvutsrq" + digits + "|")
    letters = {c for e in probes.examples("copy", tokenizer, 0, 50) for c in e.text if c.isalpha()}
    assert letters == set("qrstuvwxyz")


def test_tokenizers_with_too_few_characters_are_refused() -> None:
    few = tokens("abc" + digits)
    assert refused(lambda: probes.examples("copy", few)) == (
        "copy: needs characters that are tokens: 10 of a to z and A to Z (there are 3), and "
        "0123456789| (there is no |) (leave it out: the tokenizer has too few)"
    )
    assert "28 of a to z and A to Z (there are 3)" in refused(lambda: probes.check("khop-6", few))
    assert probes.check("modular", tokens(digits + "+=;"))


def test_models_with_a_short_context_are_refused() -> None:
    assert refused(lambda: probes.check("khop-2", built(), 34)) == (
        "khop-2: reads 35 tokens before an answer, the model at most 34 (leave it out)"
    )
    assert probes.check("khop-2", built(), 35)


def test_unknown_probes_are_refused() -> None:
    assert refused(lambda: list(probes.text("khop2", 0, 1))) == (
        "probe: there is no 'khop2' (did you mean 'khop-2'?)"
    )
    assert "(there are: copy, induction, khop-1, " in refused(lambda: probes.check("x", built()))


# --- scores ---


def build(kind: str, pico: Build) -> PreTrainedModel:
    if kind != "composed":
        return pico(kind)
    config = ComposedConfig([{"name": "a"}, {"name": "b"}], {"name": "posterior"}, VOCABULARY, 32)
    return ComposedForCausalLM(config, [pico("llama", seed=1), pico("gpt_neox", seed=2)])


FITS = tokens(digits + "|;+=" + ascii_letters[:10] + "".join(probes.BRACKETS) + probes.CLOSING)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "composed"])
@pytest.mark.parametrize("name", ["copy", "brackets"])
def test_scores_are_those_of_one_example_after_the_other(kind: str, name: str, pico: Build) -> None:
    model: Any = build(kind, pico)
    right: list[bool] = []
    for example in probes.examples(name, FITS, 0, 60):
        ids = torch.tensor([[0, *FITS.convert_tokens_to_ids(list(example.prompt))]])
        with torch.no_grad():
            log_p = model(input_ids=ids).logits[0, -1].log_softmax(-1)
        best = max(example.candidates, key=lambda c: log_p[FITS.convert_tokens_to_ids(c)].item())
        right.append(best == example.answer)
    done: list[int] = []
    for batch_tokens in (1, 100, 10**6):
        found = probes.score(
            name, model, FITS, count=60, batch_tokens=batch_tokens, progress=done.append
        )
        assert (found.value, found.n) == (sum(right) / 60, 60)
    assert sum(done) == 3 * 60
    assert found.task, found.metric == (name, "accuracy")
    assert found.chance == pytest.approx(0.1 if name == "copy" else 0.25)


def test_a_model_without_knowledge_is_at_chance(pico: Build) -> None:
    for seed in range(2):
        found = probes.score("copy", pico("llama", seed=seed), FITS, count=500)
        assert found.interval is not None
        assert found.chance == 0.1
        assert found.interval[0] <= 0.1 <= found.interval[1]


def test_a_model_that_gives_nan_is_refused(pico: Build) -> None:
    model: Any = pico("llama")
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(CheckpointError) as caught:
        probes.score("copy", model, FITS, count=10, where="runs/a")
    assert str(caught.value) == (
        "runs/a gives no likelihood for copy (nan): it diverged in training or its weights are "
        "damaged; make it again"
    )


def test_a_model_that_trained_on_the_text_of_a_probe_can_do_it() -> None:
    """One block that has read other copies repeats new ones; before that it was at chance."""
    batch, steps = 64, 200
    documents = list(probes.text("copy", 0, batch * steps))
    tokenizer = built()
    encoded = language.encode(tokenizer, documents)
    model: Any = stock.build(stock.llama_config(len(tokenizer), 64, 4, 256, CONTEXT, 1))
    before = probes.score("copy", model, tokenizer, count=400)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    end_id = tokenizers.end_of_document(tokenizer)
    for step in range(steps):
        rows = [[end_id, *ids] for ids in encoded[step * batch : (step + 1) * batch]]
        ids_BT = torch.tensor(rows)
        model(input_ids=ids_BT, labels=ids_BT).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    after = probes.score("copy", model, tokenizer, count=400)
    assert before.interval is not None
    assert before.interval[0] <= 0.1 <= before.interval[1]
    assert after.value > 0.9
    assert after.corrected is not None
    assert after.corrected > 0.88
