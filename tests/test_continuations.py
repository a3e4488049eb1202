"""What models write: together as alone, drawn as their distribution says, cut where asked."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import pytest
import torch
from conftest import CONTEXT, VOCABULARY, Build
from test_likelihood import END, FAMILIES, RULES, compose, letters, tiny
from transformers import BloomConfig, BloomForCausalLM, GenerationConfig, PreTrainedModel

from nacre.errors import CheckpointError
from nacre.evaluate import continuations
from nacre.train.observer import Observer

PROMPTS = ["a dog", "Is it so?", "it", "", "A man sees a dog", "the sea", "so"]


def by_hand(model: PreTrainedModel, prompt: str, tokens: int) -> str:
    """Take the likeliest token each time, of one text and without a cache."""
    tokenizer = letters(eos_token=END)
    ids = tokenizer(prompt).input_ids or [tokenizer.eos_token_id]
    begun = len(ids)
    for _ in range(tokens):
        with torch.no_grad():
            logits: Any = model(input_ids=torch.tensor([ids]), use_cache=False).logits
        ids.append(int(logits[0, -1].argmax()))
        if ids[-1] == tokenizer.eos_token_id:
            break
    return str(tokenizer.decode(ids[begun:], skip_special_tokens=True))


@pytest.mark.parametrize("kind", [*[f for f in FAMILIES if f != "bloom"], *RULES])
def test_texts_are_those_that_are_written_one_by_one(
    kind: str, pico: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = compose(pico, kind) if kind in RULES else pico(kind)
    tokenizer = letters(eos_token=END)
    expected = [[by_hand(model, prompt, 6)] for prompt in PROMPTS]
    write = continuations.write
    assert write(model, tokenizer, PROMPTS, new_tokens=6) == expected
    assert write(model, tokenizer, PROMPTS, new_tokens=6, copies=3) == [t * 3 for t in expected]
    monkeypatch.setitem(continuations.BATCH_TOKENS, "cpu", 1)
    assert write(model, tokenizer, PROMPTS, new_tokens=6) == expected


def say(model: Any, **weights: float) -> Any:
    """Make a model that draws letters with these weights, whatever it reads."""
    tokenizer = letters(eos_token=END)
    torch.nn.init.zeros_(model.lm_head.weight)
    bias = torch.full((VOCABULARY,), -math.inf)
    for name, weight in weights.items():
        bias[tokenizer.convert_tokens_to_ids({"end": END, "line": "\n"}.get(name, name))] = (
            math.log(weight)
        )
    model.lm_head.bias = torch.nn.Parameter(bias)
    return model


def test_tokens_are_drawn_as_the_model_says_and_from_the_seed() -> None:
    model, tokenizer = say(tiny(), a=0.6, b=0.3, c=0.1), letters(eos_token=END)

    def drawn(seed: int) -> list[list[str]]:
        return continuations.write(
            model, tokenizer, ["Is it?", "so"], new_tokens=2, copies=500, sample=True, seed=seed
        )

    before = torch.random.get_rng_state()
    first = drawn(0)
    assert torch.equal(torch.random.get_rng_state(), before), "no random state is left behind"
    assert drawn(0) == first
    assert drawn(1) != first
    assert [len(texts) for texts in first] == [500, 500]
    counts = Counter("".join(text for texts in first for text in texts))
    shares = [counts[letter] / 2000 for letter in "abc"]
    assert shares == pytest.approx([0.6, 0.3, 0.1], abs=0.04)
    assert continuations.write(model, tokenizer, ["so"], new_tokens=3) == [["aaa"]]


def test_a_text_ends_at_the_end_and_before_what_stops_it() -> None:
    tokenizer = letters(eos_token=END)

    def texts(model: Any, stop: str = "") -> set[str]:
        options = {"new_tokens": 40, "copies": 100, "sample": True, "stop": stop}
        return set(continuations.write(model, tokenizer, ["so"], **options)[0])

    assert any("\na" in text for text in texts(say(tiny(), a=0.8, line=0.2)))
    found = texts(say(tiny(), a=0.8, line=0.2), "\n")
    assert all(set(text) <= {"a"} for text in found)
    assert {"", "a"} < found
    assert len(max(texts(say(tiny(), a=0.5, end=0.5)), key=len)) < 20


class Watch(Observer):
    def __init__(self) -> None:
        self.warnings: list[str] = []
        self.counted = 0

    def warn(self, text: str) -> None:
        self.warnings.append(text)

    def advance(self, units: int) -> None:
        self.counted += units


def test_a_prompt_that_does_not_fit_loses_its_beginning(pico: Build) -> None:
    model, tokenizer, watch = pico("llama"), letters(eos_token=END), Watch()
    long = "the dog and the man and the sea"
    options: Any = {"new_tokens": 4, "where": "mine: x", "observer": watch}
    cut, whole = continuations.write(model, tokenizer, [long, long[-28:]], **options)
    assert cut == whole == [by_hand(model, long[-28:], 4)]
    assert watch.warnings == [
        "mine: x: 1 of 2 prompts are longer than 28 tokens, what the context leaves beside 4 new "
        "ones: their beginning was cut off"
    ]
    assert watch.counted == 2
    assert continuations.room(model, 100) == (CONTEXT // 2, CONTEXT // 2)


def test_a_models_own_defaults_change_nothing(pico: Build) -> None:
    model, tokenizer = pico("llama"), letters(eos_token=END)
    expected = continuations.write(model, tokenizer, PROMPTS, new_tokens=5)
    own = GenerationConfig(repetition_penalty=50.0, min_new_tokens=5, suppress_tokens=[1, 2, 3])
    model.generation_config = own
    assert continuations.write(model, tokenizer, PROMPTS, new_tokens=5) == expected
    assert model.generation_config is own


@pytest.mark.parametrize("sample", [False, True])
def test_a_model_whose_scores_are_no_numbers_is_refused(sample: bool) -> None:
    model: Any = tiny()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    with pytest.raises(CheckpointError) as caught:
        continuations.write(
            model, letters(eos_token=END), ["so"], new_tokens=1, sample=sample, where="mine"
        )
    assert str(caught.value) == (
        "mine gives scores that are no numbers: it diverged in training or its weights are "
        "damaged; make it again"
    )


def test_a_model_of_any_length_has_room_for_all() -> None:
    shape = {"hidden_size": 32, "n_layer": 2, "n_head": 2}
    model = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, **shape))
    assert continuations.room(model, 100) == (None, 100)
    prompt = "a dog " * 30
    found = continuations.write(model, letters(eos_token=END), [prompt, "it"], new_tokens=3)
    assert found == [[by_hand(model.eval(), text, 3)] for text in (prompt, "it")]
