from __future__ import annotations

import argparse
import json
import logging
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from nacre import tokenizer as subject
from nacre.errors import ConfigError, DataError

ENGLISH = (
    "It was a bright cold day in April, and the clocks were striking thirteen.\n"
    "The substrate never changes; the blocks that stand on it are laid down one by one.\n\n"
    "  def grow(model, stage):  # 1,234 lines\r\n\treturn model\n"
)
OTHERS = [
    "Мороз и солнце; день чудесный! ",
    "天地玄黃，宇宙洪荒。",
    "naïve café Ångström ",
    "👩‍👩‍👧 🦋",
]
CORPUS = [ENGLISH * 5, *(text * 20 for text in OTHERS)]
NASTY = [
    "",
    "\0",
    "\r\n\r\r\n\n",
    "\ufeffbom",
    "<0x41>",
    "<0x41><0xF0><0x9F>",
    "a<|endoftext|>b <|pad|>",
    "👩🏽‍🚀👨‍👩‍👧‍👦🏳️‍🌈",
    "𠀀𪚥 𝔘𝔫𝔦 \U0010ffff \ue000 \ufffd \ufffe",
    "e\u0301\u0323\u0301 \u0301",
    "\u00a0\u2003\u2028\u2029\u3000\x85\x1c \t ",
    "▁the Ġthe ##ing don't I'LL",
    "  two  spaces  ",
    " ,it 's n't . ? !",
]


@pytest.fixture(scope="module")
def tiny() -> PreTrainedTokenizerFast:
    return subject.build(CORPUS, 512)


@pytest.fixture(scope="module")
def plane() -> PreTrainedTokenizerFast:
    return subject.build(CORPUS, 65_536, alphabet="bmp")


@pytest.fixture(scope="module")
def lengths(tiny, plane) -> tuple[np.ndarray, np.ndarray]:
    return subject.byte_lengths(tiny), subject.byte_lengths(plane)


def round_trip(tokenizer: PreTrainedTokenizerFast, text: str) -> str:
    return tokenizer.decode(tokenizer.encode(text, add_special_tokens=False))  # type: ignore[return-value]


@pytest.mark.parametrize("text", NASTY)
def test_nasty_text_survives(tiny, plane, text):
    for tokenizer in (tiny, plane):
        assert round_trip(tokenizer, text) == text
        corpus_ids = subject.encoder(tokenizer).encode(text, add_special_tokens=False).ids
        assert corpus_ids == tokenizer.encode(text, add_special_tokens=False)
        assert not set(corpus_ids) & set(tokenizer.all_special_ids)


@settings(max_examples=400, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"])))
@example(text="".join(chr(point) for point in range(0x3000) if not 0xD800 <= point < 0xE000))
def test_every_text_survives(tiny, plane, text):
    for tokenizer in (tiny, plane):
        assert round_trip(tokenizer, text) == text


@settings(max_examples=200, deadline=None)
@given(text=st.lists(st.sampled_from([*NASTY, *OTHERS, ENGLISH, "<0x", "4", "1>", "<|", "|>"])))
def test_mixed_pieces_survive_and_their_bytes_add_up(tiny, plane, lengths, text):
    joined = "".join(text)
    for tokenizer, length in zip((tiny, plane), lengths, strict=True):
        ids = tokenizer.encode(joined, add_special_tokens=False)
        assert tokenizer.decode(ids) == joined
        assert length[ids].sum() == len(joined.encode())


def test_every_code_point_survives(tiny):
    every = [chr(point) for point in range(0x110000) if not 0xD800 <= point < 0xE000]
    for begin in range(0, len(every), 65_536):
        text = "".join(every[begin : begin + 65_536])
        assert round_trip(tiny, text) == text


@pytest.mark.parametrize("size", [512, 1000, 2000])
def test_size_is_exact_and_ids_are_laid_out(size):
    tokenizer = subject.build([*CORPUS, Path(argparse.__file__).read_text(encoding="utf-8")], size)
    strings = subject.token_strings(tokenizer)
    assert len(tokenizer) == len(strings) == size
    assert strings[:2] == [b"<|pad|>", b"<|endoftext|>"]
    assert strings[2:258] == [bytes([byte]) for byte in range(256)]
    letters = [string for string in strings[258:] if len(string) == 1]
    assert strings[258 : 258 + len(letters)] == sorted(letters)
    assert set(map(chr, range(0x20, 0x7F))) <= set(letters)
    assert all(isinstance(string, str) for string in strings[258:])
    assert any(len(string) > 2 for string in strings[258:])


def test_ngrams_do_not_cross_words_and_stay_short():
    strings = subject.token_strings(subject.build([("=" * 50 + " in the end ") * 50], 512))
    ngrams = [string for string in strings[258:] if len(string) > 1]
    assert max(map(len, ngrams)) <= 16
    assert " the" in ngrams
    assert not any(" " in string.strip() for string in ngrams if isinstance(string, str))


def test_no_ngram_looks_like_a_byte_or_special_token():
    tokenizer = subject.build(["<0x41><0x42> <|endoftext|><|pad|>\n" * 200], 600)
    strings = subject.token_strings(tokenizer)
    assert not {"<0x41>", "<|endoftext|>", "<|pad|>"} & set(strings)
    assert round_trip(tokenizer, "<0x41><|pad|>") == "<0x41><|pad|>"


def test_bmp_has_every_assigned_code_point(plane):
    strings = set(subject.token_strings(plane))
    assert len(strings) == len(plane) > 50_000
    assert {"ÿ", "Ж", "漢", "한", "\u0301", "⠿", "﷽"} <= strings
    assert " substrate" in strings


def test_bmp_in_a_small_size_takes_the_corpus_first():
    tokenizer = subject.build(CORPUS, 1024, alphabet="bmp")
    strings = set(subject.token_strings(tokenizer))
    assert len(tokenizer) == 1024
    assert set("".join(CORPUS)) - {"\r"} <= strings
    assert {"ÿ", "ƀ"} <= strings


def test_learned_alphabet_prefers_frequent_characters():
    many = "".join(map(chr, range(0x4E00, 0x4E00 + 500)))
    strings = subject.token_strings(subject.build([many + "丏" * 9 + " and so on" * 99], 512))
    letters = [string for string in strings[258:] if len(string) == 1]
    assert len(letters) == 254 * 3 // 4
    assert "丏" in letters
    assert chr(0x4E00 + 499) not in letters


def test_a_left_out_character_does_not_join_its_neighbors():
    rare = "".join(map(chr, range(0x4E00, 0x4E00 + 2000)))
    text = " ".join(f"q{char}z" for char in rare) + " the end" * 9
    strings = subject.token_strings(subject.build([text], 512))
    assert "qz" not in strings


def test_building_is_deterministic_across_processes(tmp_path):
    code = (
        "import json, sys; from nacre import tokenizer as t;"
        "print(t.fingerprint(t.build(json.load(open(sys.argv[1])), 700)))"
    )
    path = tmp_path / "corpus.json"
    path.write_text(json.dumps(CORPUS))
    seen = {
        subprocess.run(
            [sys.executable, "-c", code, path],
            env={"PYTHONPATH": "src", "PYTHONHASHSEED": seed, "RAYON_NUM_THREADS": threads},
            cwd=Path(__file__).parents[1],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        for seed, threads in (("1", "1"), ("2", "2"))
    }
    assert seen == {subject.fingerprint(subject.build(iter(CORPUS), 700))}


def test_too_small_a_corpus_says_so_and_gives_less(caplog):
    with caplog.at_level(logging.WARNING, "nacre"):
        tokenizer = subject.build(["abcabc abc\n"], 4096)
    assert 258 + 97 < len(tokenizer) < 400
    assert "too small for 4096 tokens: no further n-gram occurs twice" in caplog.text
    assert f"the vocabulary has {len(tokenizer)}" in caplog.text


def test_progress_counts_every_character():
    seen: list[int] = []
    subject.build(CORPUS, 512, progress=seen.append)
    assert sum(seen) == sum(map(len, CORPUS))


def test_learning_stops_after_the_sample(monkeypatch, caplog):
    monkeypatch.setattr(subject, "LEARN_FROM", 1000)
    with caplog.at_level(logging.INFO, "nacre"):
        part = subject.build(["ab " * 500, "unread"], 512)
    assert subject.fingerprint(part) == subject.fingerprint(
        subject.build([("ab " * 500)[:1000]], 512)
    )
    assert "learns from the first 1000 characters" in caplog.text


def test_text_that_just_fits_is_learned_from_without_a_word(monkeypatch, caplog):
    monkeypatch.setattr(subject, "LEARN_FROM", 1500)
    with caplog.at_level(logging.INFO, "nacre"):
        subject.build(["ab " * 500], 512)
    assert "learns from" not in caplog.text


@pytest.mark.parametrize(
    ("size", "alphabet", "words"),
    [
        (511, "corpus", ["511 tokens are too small for the bytes", "512 to 131,072"]),
        (131_073, "corpus", ["131073 tokens are too many", "512 to 131,072"]),
        (512, "bpm", ["'bpm' is not 'corpus' or 'bmp'", "did you mean 'bmp'?"]),
        (5, "x", ["2 problems", "too small for the bytes", "'x' is not"]),
    ],
)
def test_bad_options(size, alphabet, words):
    with pytest.raises(ConfigError) as caught:
        subject.build(CORPUS, size, alphabet=alphabet)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize("texts", [[], [""]])
def test_no_text_to_learn_from(texts):
    with pytest.raises(DataError, match="there is no text to learn from"):
        subject.build(texts, 512)


def test_lone_surrogates_are_named():
    with pytest.raises(DataError, match=r"here: lone surrogate U\+D83D at character 2"):
        subject.check_text("ab\ud83d", "here")
    with pytest.raises(DataError, match=r"text 2: lone surrogate U\+DE00 at character 0"):
        subject.build(["fine", "\ude00"], 512)


def test_stock_transformers_load_it_without_nacre(tiny, tmp_path):
    # A checkpoint's config.json beside it must not change the tokenizer's class.
    for model_type in ("", "llama", "gpt_neox", "qwen3"):
        tiny.save_pretrained(tmp_path / f"of-{model_type}")
        if model_type:
            config = json.dumps({"model_type": model_type})
            (tmp_path / f"of-{model_type}" / "config.json").write_text(config)
    code = """
import json, sys, pathlib
sys.modules["nacre"] = None
from transformers import AutoTokenizer
texts = json.loads(sys.stdin.read())
for folder in pathlib.Path(sys.argv[1]).glob("of-*"):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = [tokenizer.encode(text, add_special_tokens=False) for text in texts]
    assert [tokenizer.decode(each) for each in ids] == texts
    assert [tokenizer(text)["input_ids"] for text in texts] == ids
    names = [tokenizer.eos_token, tokenizer.bos_token, tokenizer.pad_token, len(tokenizer)]
    print(json.dumps([ids, *names]))
"""
    texts = [*NASTY, *CORPUS]
    done = subprocess.run(
        [sys.executable, "-I", "-c", code, tmp_path],
        input=json.dumps(texts),
        cwd=tmp_path,
        check=True,
        capture_output=True,
        text=True,
    )
    expected = [tiny.encode(text, add_special_tokens=False) for text in texts]
    printed = [json.loads(line) for line in done.stdout.splitlines()]
    assert printed == [[expected, "<|endoftext|>", "<|endoftext|>", "<|pad|>", 512]] * 4


def test_save_and_load_keep_the_fingerprint(tiny, plane, tmp_path):
    for name, tokenizer in (("a", tiny), ("b", plane)):
        tokenizer.save_pretrained(tmp_path / name)
        again = subject.load(tmp_path / name)
        assert subject.fingerprint(again) == subject.fingerprint(tokenizer)
        assert subject.token_strings(again) == subject.token_strings(tokenizer)
        assert subject.splits_exactly(again)
    assert subject.fingerprint(subject.load(f"hf:{tmp_path / 'a'}")) == subject.fingerprint(tiny)
    assert subject.fingerprint(tiny) != subject.fingerprint(plane)


def test_use_does_not_change_the_fingerprint(tiny):
    before = subject.fingerprint(tiny)
    tiny(["a", "some more text"], padding=True, truncation=True, max_length=3)
    assert subject.fingerprint(tiny) == before
    ids = subject.encoder(tiny).encode("a" * 50).ids
    assert len(ids) > 3


def test_a_folder_that_is_missing_or_holds_no_tokenizer(tmp_path):
    with pytest.raises(ConfigError, match="there is no folder '/no/such/place'"):
        subject.load("/no/such/place")
    with pytest.raises(ConfigError, match="cannot load"):
        subject.load(tmp_path)
    (tmp_path / "tokenizer.json").write_text("{")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "TokenizersBackend"}')
    with pytest.raises(ConfigError, match="cannot load"):
        subject.load(tmp_path)


def test_a_hub_that_is_out_of_reach(monkeypatch):
    def refuse(*_, **__):
        raise OSError("We couldn't connect\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(ConfigError) as caught:
        subject.load("hf:some/name")
    assert "cannot load 'hf:some/name': We couldn't connect (check the name" in str(caught.value)


@pytest.mark.parametrize("name", ["x" * 300, "hf:" + "x" * 5000, "a\0b", "hf:"])
def test_what_is_no_path_is_refused(name):
    with pytest.raises(ConfigError, match="is no path of a folder, and no name"):
        subject.load(name)


def test_a_slow_tokenizer_is_refused(tmp_path):
    (tmp_path / "vocab.json").write_text("{}")
    (tmp_path / "tokenizer_config.json").write_text('{"tokenizer_class": "ByT5Tokenizer"}')
    with pytest.raises(ConfigError, match=r"has no fast implementation \(ByT5Tokenizer\)"):
        subject.load(tmp_path)


def wrap(tokenizer: Tokenizer, **names: str) -> PreTrainedTokenizerFast:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)


def byte_level() -> PreTrainedTokenizerFast:
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    inner.train_from_iterator(
        [text for text in CORPUS for _ in range(3)],
        trainers.BpeTrainer(
            vocab_size=450,
            special_tokens=["<|endoftext|>"],
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        ),
    )
    inner.add_tokens(["<tool>"])
    return wrap(inner, eos_token="<|endoftext|>")


def metaspace() -> PreTrainedTokenizerFast:
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    pieces = ["▁", "t", "h", "e", "▁t", "▁th", "▁the", "\n", " "]
    names = ["<unk>", "<s>", "</s>", *byte_tokens, *pieces]
    inner = Tokenizer(
        models.BPE(
            vocab={name: index for index, name in enumerate(names)},
            merges=[("▁", "t"), ("▁t", "h"), ("▁th", "e")],
            byte_fallback=True,
            unk_token="<unk>",
            fuse_unk=True,
        )
    )
    inner.normalizer = normalizers.Sequence(
        [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
    )
    inner.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return wrap(inner, bos_token="<s>", eos_token="</s>", unk_token="<unk>")


def word_piece() -> PreTrainedTokenizerFast:
    names = ["[UNK]", "[SEP]", "sing", "ing", "##ing", ",", "##,", "##s", "##"]
    inner = Tokenizer(
        models.WordPiece(vocab={name: i for i, name in enumerate(names)}, unk_token="[UNK]")
    )
    inner.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    inner.decoder = decoders.WordPiece("##")
    return wrap(inner, sep_token="[SEP]", unk_token="[UNK]")


def test_token_strings_of_byte_level():
    tokenizer = byte_level()
    strings = subject.token_strings(tokenizer)
    ids = tokenizer.get_vocab()
    assert strings[ids["Ġthe"]] == " the"
    assert strings[ids["Ċ"]] == "\n"
    assert strings[ids["A"]] == "A"
    assert strings[ids["ð"]] == b"\xf0"
    assert strings[ids["<|endoftext|>"]] == b"<|endoftext|>"
    assert strings[ids["<tool>"]] == "<tool>"
    assert len(strings) == len(set(strings)) == len(tokenizer)
    text = ENGLISH + "".join(OTHERS)
    encoding = tokenizer.encode(text)
    joined = b"".join(
        string.encode() if isinstance(string, str) else string
        for string in (strings[index] for index in encoding)
    )
    assert joined == text.encode()
    assert subject.byte_lengths(tokenizer)[encoding].sum() == len(text.encode())
    assert subject.byte_lengths(tokenizer)[ids["<|endoftext|>"]] == 0


def test_token_strings_of_byte_fallback_and_metaspace():
    tokenizer = metaspace()
    strings = subject.token_strings(tokenizer)
    ids = tokenizer.get_vocab()
    assert strings[ids["▁the"]] == " the"
    assert strings[ids["▁"]] == " "
    assert strings[ids[" "]] == b" #267"  # " " is taken, and b" " is the byte token's
    assert strings[ids["<0x0A>"]] == b"\n"
    assert strings[ids["\n"]] == "\n"
    assert strings[ids["</s>"]] == b"</s>"
    assert len(set(strings)) == len(strings)
    lengths = subject.byte_lengths(tokenizer)
    assert lengths[ids["▁the"]] == 4
    assert lengths[tokenizer.encode("the ф\n", add_special_tokens=False)].sum() == 1 + len(
        "the ф\n".encode()
    )


def test_token_strings_of_word_piece():
    strings = subject.token_strings(word_piece())
    assert strings == [b"[UNK]", b"[SEP]", " sing", " ing", "ing", ",", b"##,", "s", "##"]


def test_unused_ids_get_a_name(tiny):
    inner = Tokenizer(models.WordLevel({"a": 0, "b": 3, "<unused 1>": 4}, unk_token="a"))
    tokenizer = wrap(inner)
    assert subject.token_strings(tokenizer) == [
        "a",
        b"<unused 1>",
        b"<unused 2>",
        "b",
        "<unused 1>",
    ]
    assert subject.byte_lengths(tokenizer).tolist() == [1, 0, 0, 1, 10]
    assert subject.byte_lengths(tokenizer).dtype == np.int32


def test_the_end_of_a_document():
    assert subject.end_of_document(byte_level()) == 0
    assert subject.end_of_document(metaspace()) == 2
    assert subject.end_of_document(word_piece()) == 1
    with pytest.raises(ConfigError, match="no eos, bos or sep token"):
        subject.end_of_document(wrap(Tokenizer(models.WordLevel({"a": 0}, unk_token="a"))))


@settings(max_examples=200, deadline=None)
@given(
    pieces=st.lists(
        st.sampled_from([*NASTY, "\n", " ", "a b", "x.\n", "\r", "\u0301", "1 2", "\x1c"])
    ),
    size=st.integers(1, 20),
)
def test_splitting_does_not_change_the_tokens(tiny, pieces, size):
    text = "".join(pieces)
    parts = subject.split(text, size)
    assert "".join(parts) == text
    rust = subject.encoder(tiny)
    assert [i for part in parts for i in rust.encode(part).ids] == rust.encode(text).ids


def test_only_built_tokenizers_split_exactly(tiny):
    assert subject.splits_exactly(tiny)
    assert not subject.splits_exactly(byte_level())
    assert not subject.splits_exactly(metaspace())
    assert len(subject.split(ENGLISH * 10, 100)) > 10


def test_importing_it_is_light():
    code = (
        "import sys, nacre.tokenizer;"
        "assert not {'torch', 'transformers', 'tokenizers'} & set(sys.modules)"
    )
    subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": "src"},
        cwd=Path(__file__).parents[1],
        check=True,
    )
