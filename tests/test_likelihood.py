"""The model class that reads less: the same answers as lm-eval's HFLM, from fewer tokens."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from conftest import CONTEXT, VOCABULARY, Build
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    LlamaForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from nacre.errors import CheckpointError, ConfigError
from nacre.evaluate.likelihood import Likelihood
from nacre.models import stock
from nacre.models.composed import ComposedConfig, ComposedForCausalLM

LETTERS = "abcdefghijklmnopqrstuvwxyzABCDEFGHINQRSTW .,:?'\n-_012345"
END = "<end>"
LONG = 512


def letters(**special: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer with a token a letter."""
    ids = {token: index for index, token in enumerate([END, *LETTERS, "%"])}
    rust = Tokenizer(models.WordLevel(ids, unk_token="%"))
    rust.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    rust.decoder = decoders.Fuse()
    assert len(ids) <= VOCABULARY
    return PreTrainedTokenizerFast(tokenizer_object=rust, **special)


@pytest.fixture
def tokenizer() -> PreTrainedTokenizerFast:
    return letters(eos_token=END)


def tiny(context: int = LONG, seed: int = 0) -> PreTrainedModel:
    """Return a model that has opinions."""
    torch.manual_seed(seed)
    model = stock.build(stock.FAMILIES["llama"](VOCABULARY, 32, 2, 64, context, 2))
    for parameter in model.parameters():
        parameter.data += 0.1 * torch.randn_like(parameter)
    return model.eval()


def compose(pico: Build, rule: str) -> PreTrainedModel:
    config = ComposedConfig([{"name": "a"}, {"name": "b"}], {"name": rule}, VOCABULARY, CONTEXT)
    return ComposedForCausalLM(config, [pico("llama", seed=1), pico("gpt_neox", seed=2)])


def plain(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast) -> Any:
    return HFLM(pretrained=model, tokenizer=copy.deepcopy(tokenizer), backend="causal")


def instances(requests: list[tuple[str, str]]) -> list[Instance]:
    return [Instance("loglikelihood", {}, request, 0) for request in requests]


def answers(scorer: Any, requests: list[tuple[str, str]]) -> list[tuple[float, bool]]:
    return scorer.loglikelihood(instances(requests), disable_tqdm=True)


def same(found: list[tuple[float, bool]], expected: list[tuple[float, bool]]) -> None:
    assert [nats for nats, _ in found] == pytest.approx([n for n, _ in expected], abs=1e-4)
    assert [greedy for _, greedy in found] == [greedy for _, greedy in expected]


QUESTIONS = [
    (f"A task. Is it {i}?", option) for i in "012" for option in (" A", " a dog", " I see", " it")
]
REQUESTS = [
    *QUESTIONS, ("Who?", " A"), ("Who?", " B"), ("Who is it?", " a dog"), ("Who is it?", " a man"),
    ("", "a dog sits"), ("", "a dogs sits"), ("", "it"), ("a space ", "no"), ("it", " is") ,
    ("it", " is"), ("a longer text than all of the context there is", " yes, it is"),
]  # fmt: skip


def reads(model: PreTrainedModel) -> list[int]:
    """Return a list that grows by the size of the ids of every call of the model."""
    sizes: list[int] = []

    def note(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        ids = arguments[0] if arguments else named["input_ids"]
        sizes.append(ids.numel())

    model.register_forward_pre_hook(note, with_kwargs=True)
    return sizes


class Bare(LlamaForCausalLM):
    """A model that always makes all logits, as some on the hub do."""

    def forward(self, input_ids: Any, past_key_values: Any = None, use_cache: Any = None) -> Any:
        return super().forward(input_ids, past_key_values=past_key_values, use_cache=use_cache)


class Forgetful(LlamaForCausalLM):
    """A model that takes no cache."""

    def forward(self, input_ids: Any, use_cache: Any = None) -> Any:
        return super().forward(input_ids, use_cache=False)


@pytest.mark.parametrize("kind", [Bare, Forgetful])
def test_models_that_can_less_get_the_same_answers(
    kind: type[LlamaForCausalLM], tokenizer: PreTrainedTokenizerFast
) -> None:
    model = tiny(context=CONTEXT)
    lesser = kind(model.config)
    lesser.load_state_dict(model.state_dict())
    expected = answers(plain(model, tokenizer), REQUESTS)
    same(answers(Likelihood(lesser, tokenizer), REQUESTS), expected)
    same(answers(Likelihood(lesser, tokenizer), QUESTIONS), expected[: len(QUESTIONS)])


FAMILIES = ["llama", "gpt_neox", "gpt2", "opt", "qwen3", "qwen3_sliding", "gemma2", "bloom"]
RULES = ["mean-logits", "posterior", "fixed-share", "top-k"]


@pytest.mark.parametrize("kind", [*FAMILIES, *RULES])
def test_answers_are_those_of_hflm(
    kind: str, pico: Build, tokenizer: PreTrainedTokenizerFast
) -> None:
    if kind == "bloom":
        shape = {"hidden_size": 32, "n_layer": 2, "n_head": 2}
        model: PreTrainedModel = BloomForCausalLM(BloomConfig(vocab_size=VOCABULARY, **shape))
    else:
        model = compose(pico, kind) if kind in RULES else pico(kind)
    expected = answers(plain(model, tokenizer), REQUESTS)
    for batch_size in (1, 3, 64):
        same(answers(Likelihood(model, tokenizer, batch_size=batch_size), REQUESTS), expected)
    sizes = reads(model)
    same(answers(Likelihood(model, tokenizer), QUESTIONS), expected[: len(QUESTIONS)])
    whole = {context + option[:-1] for context, option in QUESTIONS}
    assert sum(sizes) < 0.6 * sum(map(len, whole)), "what they begin with is read once"


def test_examples_before_the_questions_are_read_once(tokenizer: PreTrainedTokenizerFast) -> None:
    model, head = tiny(), "It is so. It is so: " * 12
    requests = [(f"{head}Is it {i}?", f" {o}") for i in "012345" for o in "ABCD"]
    expected = answers(plain(model, tokenizer), requests)
    sizes = reads(model)
    same(answers(Likelihood(model, tokenizer), requests), expected)
    assert sum(sizes) < 2 * len(head)


def test_whole_documents_are_scored_as_hflm_does(tokenizer: PreTrainedTokenizerFast) -> None:
    """lm-eval's tasks of language modelling come through the same method."""
    model = tiny(context=16)
    rolling = [Instance("loglikelihood_rolling", {}, (text,), 0) for text in ("it", "a dog " * 9)]
    expected = plain(model, tokenizer).loglikelihood_rolling(rolling, disable_tqdm=True)
    found = Likelihood(model, tokenizer).loglikelihood_rolling(rolling, disable_tqdm=True)
    assert found == pytest.approx(expected, abs=1e-4)


def test_the_same_text_may_end_a_context_or_begin_an_option(
    tokenizer: PreTrainedTokenizerFast,
) -> None:
    """HFLM takes the wrong logits for the shorter one of two such continuations, if asked both."""
    model, requests = tiny(), [("Who?", " is A"), ("Who? is", " B"), ("Who? is", " C")]
    expected = [answers(plain(model, tokenizer), [request])[0] for request in requests]
    same(answers(Likelihood(model, tokenizer), requests), expected)


def test_an_option_that_is_one_token_with_the_contexts_end_is_scored() -> None:
    """Byte-pair encoding without a pre-tokenizer merges across the border; HFLM stops there."""
    ids = {token: index for index, token in enumerate([END, "a", ":", " ", "b", ": b"])}
    rust = Tokenizer(models.Unigram([(token, -len(ids)) for token in ids], unk_id=0))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=rust, eos_token=END)
    assert tokenizer("a: b").input_ids == [1, 5]
    model, requests = tiny(), [("a:", " b"), ("a:", " a")]
    with pytest.raises(AssertionError):
        answers(plain(model, tokenizer), requests[:1])
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([[1, 2, 3]])).logits.log_softmax(-1)[0]
    expected = [(log_p[1, 3] + log_p[2, last]).item() for last in (4, 1)]
    found = [nats for nats, _ in answers(Likelihood(model, tokenizer), requests)]
    assert found == pytest.approx(expected, abs=1e-4)


def test_a_text_begins_after_the_beginning_the_end_or_the_separator() -> None:
    model = tiny()
    with torch.no_grad():
        log_p = model(input_ids=torch.tensor([[0, 1, 2]])).logits.log_softmax(-1)[0]
    expected = [log_p[0, 1].item(), log_p[1, 2].item()]
    for role in ("bos_token", "eos_token", "sep_token"):
        tokenizer = letters(**{role: END})
        before = tokenizer.special_tokens_map
        scorer = Likelihood(model, tokenizer)
        ((nats, _),) = answers(scorer, [("", "ab")])
        assert nats == pytest.approx(sum(expected), abs=1e-4)
        assert tokenizer.special_tokens_map == before, "the tokenizer is left as it was"
    with pytest.raises(ConfigError, match="no eos, bos or sep token"):
        Likelihood(model, letters())


def test_an_answer_longer_than_the_context_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    with pytest.raises(ConfigError) as caught:
        answers(Likelihood(tiny(context=16), tokenizer), [("Who?", " the sun and the sea")])
    assert str(caught.value) == (
        "an answer to score: 'the sun and the sea' is 20 tokens, the model reads 16 (leave its "
        "task out)"
    )


def test_a_model_without_finite_likelihoods_is_refused(tokenizer: PreTrainedTokenizerFast) -> None:
    model: Any = tiny()
    torch.nn.init.constant_(model.lm_head.weight, math.nan)
    long = f" {'sea ' * 12}"
    for option, shown in ((" a dog", "'a dog'"), (long, f"'{'sea ' * 10}...'")):
        with pytest.raises(CheckpointError) as caught:
            answers(Likelihood(model, tokenizer, name="mine"), [("Who?", option)])
        assert str(caught.value) == (
            f"mine gives no finite likelihood for {shown} (nan nats): it diverged in training or "
            "its weights are damaged; make it again"
        )
