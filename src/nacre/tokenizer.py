"""The Unicode tokenizer: code points, frequent n-grams and bytes, as a stock fast tokenizer.

A vocabulary is, in this order: two special tokens, the 256 bytes as `<0xNN>`, code points, and the
n-grams that byte-pair encoding learned from a corpus. Text that no code point covers falls back to
its UTF-8 bytes, so `decode(encode(text)) == text` for every Unicode string. `build` makes one; the
other functions take any fast tokenizer.

Literature: Sennrich et al. 2016 (arXiv 1508.07909) for byte-pair encoding; the vocabulary of code
points plus n-grams follows Bochkov 2025 (arXiv 2507.04886), with bytes instead of `<unk>`.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt

from nacre import hub, tokenizer_files
from nacre.errors import ConfigError, DataError, Problem, nearest
from nacre.untrusted import is_path
from nacre.vocabulary import TokenString, backend, byte_lengths, definition, token_strings

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

__all__ = [
    "TokenString",
    "build",
    "byte_lengths",
    "check_text",
    "encoder",
    "end_of_document",
    "fingerprint",
    "load",
    "split",
    "splits_exactly",
    "token_strings",
]

logger = logging.getLogger(__name__)

PAD = "<|pad|>"
END = "<|endoftext|>"
SMALLEST, LARGEST = 512, 131_072
LEARN_FROM = 100_000_000
"""The most characters that a tokenizer learns from."""

ALPHABETS = ("corpus", "bmp")

# Words with their leading space, up to three digits, runs of signs, line ends with the blanks
# before them, other blanks. No match holds both a "<" and a letter, so that no n-gram can be
# spelled like a byte token or a special token: the decoder would take it for one.
_WORDS = r" ?[\p{L}\p{M}]+| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]+|\s*[\r\n]+|\s+(?!\S)|\s+"
# Places where `_WORDS` always ends one match and begins the next, whatever stands around them.
_EXACT_CUT = re.compile(r"(?<=\n)(?=\S)|(?<=[A-Za-z])(?= [A-Za-z])")
_LONGEST_NGRAM = 16
_ALWAYS = "\t\n" + "".join(map(chr, range(0x20, 0x7F)))
_UNASSIGNED = ("Cn", "Cs", "Co")


def build(
    texts: Iterable[str],
    size: int,
    *,
    alphabet: Literal["corpus", "bmp"] = "corpus",
    progress: Callable[[int], None] | None = None,
) -> PreTrainedTokenizerFast:
    """Learn a lossless tokenizer of `size` tokens from `texts`.

    `alphabet="corpus"` gives at most three quarters of the free places to the corpus's code points,
    most frequent first; `"bmp"` takes every assigned code point of the Basic Multilingual Plane as
    far as the size allows, the corpus's first. N-grams get the rest. At most the first 100 million
    characters are read; `data.sample` gives each of several sources an equal share of them. The
    result depends on the texts alone (and, for `"bmp"`, on the Unicode version of this Python). A
    corpus too small for the size gives a smaller vocabulary and a warning. `progress` receives the
    number of characters read since its last call.

    Raises ConfigError for a size outside 512 to 131,072 or an unknown alphabet, DataError for no
    text or lone surrogates.
    """
    _check_options(size, alphabet)
    sample = _sample(texts)
    counts = _count_code_points(sample)
    places = size - 2 - 256
    chosen = _code_points(counts, places, alphabet)
    seen = [char for char in chosen if counts[ord(char)] or char in _ALWAYS]
    room = places - len(chosen)
    ngrams, merges = _learn(sample, seen, room, counts, progress) if room else ([], [])
    found = size - room + len(ngrams)
    if found < size:
        logger.warning(
            "the corpus is too small for %d tokens: no further n-gram occurs twice; "
            "the vocabulary has %d",
            size,
            found,
        )
    byte_tokens = [f"<0x{byte:02X}>" for byte in range(256)]
    return _assemble([PAD, END, *byte_tokens, *chosen, *ngrams], merges)


def load(path: str | Path) -> PreTrainedTokenizerFast:
    """Load a fast tokenizer from a folder, or from "hf:NAME" (a hub name or a folder).

    Raises ConfigError when nothing is there, it cannot be read, or it has no fast implementation.
    """
    name = str(path)
    target = name.removeprefix("hf:")
    if not is_path(target):
        message = f"{name[:100]!r} is no path of a folder, and no name"
        raise ConfigError(Problem("tokenizer", message, "give a folder, or hf:NAME"))
    is_folder = Path(target).is_dir()
    if not is_folder and target == name:
        raise ConfigError(
            Problem(
                "tokenizer",
                f"there is no folder {name!r}",
                "give a folder that holds tokenizer.json, or hf:NAME for one from the hub",
            )
        )
    try:
        tokenizer = tokenizer_files.read(Path(target) if is_folder else hub.fetch(target))
    except Exception as error:  # transformers and tokenizers raise about anything here
        reason = str(error).strip().splitlines()
        raise ConfigError(
            Problem(
                "tokenizer",
                f"cannot load {name!r}: {reason[0] if reason else type(error).__name__}",
                "a folder needs tokenizer.json and tokenizer_config.json"
                if is_folder
                else "check the name and the network, or give a folder that holds it",
            )
        ) from error
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None and backend.get_vocab_size(with_added_tokens=False) == 0:
        message = f"{name!r} holds no tokenizer: its vocabulary would be empty"
        raise ConfigError(Problem("tokenizer", message, "a folder needs tokenizer.json"))
    if not getattr(tokenizer, "is_fast", False):
        raise ConfigError(
            Problem(
                "tokenizer",
                f"{name!r} has no fast implementation ({type(tokenizer).__name__})",
                "nacre needs a tokenizer with a tokenizer.json",
            )
        )
    return tokenizer


def fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return the SHA-256 (hex) of the tokenizer's definition and its special tokens."""
    content = definition(tokenizer)
    for passing in ("truncation", "padding", "version"):
        content.pop(passing, None)
    names = {
        role: str(getattr(tokenizer, role, None) or "")
        for role in ("bos_token", "eos_token", "sep_token", "pad_token", "unk_token")
    }
    canonical = json.dumps([content, names], sort_keys=True, ensure_ascii=True)
    return hashlib.sha256(canonical.encode()).hexdigest()


def end_of_document(tokenizer: PreTrainedTokenizerBase) -> int:
    """Return the id that separates documents: end of sequence, else its beginning, else separator.

    Raises ConfigError when the tokenizer has none of them.
    """
    for role in ("eos_token_id", "bos_token_id", "sep_token_id"):
        index = getattr(tokenizer, role, None)
        if isinstance(index, int):
            return index
    raise ConfigError(
        Problem(
            "tokenizer",
            "it has no eos, bos or sep token to separate documents with",
            "set eos_token in its tokenizer_config.json",
        )
    )


def check_text(text: str, where: str) -> None:
    """Raise DataError when `text` holds a lone surrogate, which no UTF-8 can carry."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise DataError(
            f"{where}: lone surrogate U+{ord(text[error.start]):04X} at character {error.start}; "
            "half of a UTF-16 pair is no character: repair the text where it was cut or decoded"
        ) from None


def encoder(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return a copy of the Rust tokenizer for corpora.

    It neither truncates nor pads, and the names of special tokens in a text stay text.
    """
    from tokenizers import Tokenizer

    copy = Tokenizer.from_str(backend(tokenizer).to_str())
    copy.no_truncation()
    copy.no_padding()
    copy.encode_special_tokens = True
    return copy


def splits_exactly(tokenizer: PreTrainedTokenizerBase) -> bool:
    """Say whether `split` leaves the tokens of a text as they are: true for what `build` made."""
    content = definition(tokenizer)
    return (
        content.get("pre_tokenizer") == _split_words_definition()
        and content.get("normalizer") is None
        and all(token["special"] for token in content["added_tokens"])
    )


def split(text: str, size: int) -> list[str]:
    """Cut `text` into parts of about `size` characters where a built tokenizer begins a new word.

    The parts' tokens, one after the other, are the tokens of the whole; see `splits_exactly`.
    """
    parts: list[str] = []
    begin = 0
    while len(text) - begin > size:
        cut = _EXACT_CUT.search(text, begin + size)
        if cut is None or cut.start() == len(text):
            break
        parts.append(text[begin : cut.start()])
        begin = cut.start()
    parts.append(text[begin:])
    return parts


def _check_options(size: int, alphabet: str) -> None:
    problems: list[Problem] = []
    if size < SMALLEST:
        problems.append(
            Problem(
                "size",
                f"{size} tokens are too small for the bytes and a basic alphabet",
                f"choose {SMALLEST:,} to {LARGEST:,}",
            )
        )
    if size > LARGEST:
        problems.append(
            Problem("size", f"{size} tokens are too many", f"choose {SMALLEST:,} to {LARGEST:,}")
        )
    if alphabet not in ALPHABETS:
        hint = nearest(alphabet, ALPHABETS)
        problems.append(
            Problem("alphabet", f"{alphabet!r} is not 'corpus' or 'bmp'", hint or "use 'corpus'")
        )
    if problems:
        raise ConfigError(problems, "tokenizer")


def _sample(texts: Iterable[str]) -> list[str]:
    """Keep the texts up to `LEARN_FROM` characters."""
    sample: list[str] = []
    room = LEARN_FROM
    for text in texts:
        sample.append(text[:room])
        if len(text) > room:
            logger.info("the tokenizer learns from the first %d characters", LEARN_FROM)
            break
        room -= len(text)
    if not any(sample):
        raise DataError("tokenizer: there is no text to learn from")
    return sample


def _count_code_points(sample: list[str]) -> npt.NDArray[np.int64]:
    counts = np.zeros(0x110000, dtype=np.int64)
    for number, text in enumerate(sample):
        check_text(text, f"text {number + 1}")
        for begin in range(0, len(text), 1 << 22):
            block = np.frombuffer(text[begin : begin + (1 << 22)].encode("utf-32-le"), dtype="<u4")
            found = np.bincount(block)
            counts[: len(found)] += found
    return counts


def _code_points(counts: npt.NDArray[np.int64], places: int, alphabet: str) -> list[str]:
    """Choose the single characters of the vocabulary, in code point order."""
    order = np.lexsort((np.arange(len(counts)), -counts))
    wanted = [chr(point) for point in order[: np.count_nonzero(counts)].tolist()]
    limit = places * 3 // 4
    if alphabet == "bmp":
        plane = map(chr, range(0x10000))
        wanted += [char for char in plane if unicodedata.category(char) not in _UNASSIGNED]
        limit = places
    return sorted(list(dict.fromkeys([*_ALWAYS, *wanted]))[:limit])


def _learn(
    sample: list[str],
    seen: list[str],
    room: int,
    counts: npt.NDArray[np.int64],
    progress: Callable[[int], None] | None,
) -> tuple[list[str], list[tuple[str, str]]]:
    """Learn up to `room` n-grams over the characters `seen`; return them and the merges."""
    from tokenizers import Tokenizer, models, trainers

    kept = set(seen)
    left_out = [chr(point) for point in np.flatnonzero(counts).tolist() if chr(point) not in kept]
    # The trainer would close the gap that a left-out character leaves and pair its neighbors.
    gap = re.compile("[" + "".join(map(re.escape, left_out)) + "]+") if left_out else None

    def feed() -> Iterator[str]:
        for text in sample:
            yield gap.sub("\n", text) if gap else text
            if progress:
                progress(len(text))

    learner = Tokenizer(models.BPE())
    learner.pre_tokenizer = _split_words()
    learner.train_from_iterator(
        feed(),
        trainers.BpeTrainer(
            vocab_size=len(seen) + room,
            min_frequency=2,
            initial_alphabet=seen,
            limit_alphabet=len(seen),
            max_token_length=_LONGEST_NGRAM,
            show_progress=False,
        ),
    )
    model = json.loads(learner.to_str())["model"]
    ngrams = [token for token in sorted(model["vocab"], key=model["vocab"].get) if len(token) > 1]
    assert not any(re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", ngram) for ngram in ngrams)
    return ngrams, [(left, right) for left, right in model["merges"]]


def _assemble(vocabulary: list[str], merges: list[tuple[str, str]]) -> PreTrainedTokenizerFast:
    from tokenizers import Tokenizer, decoders, models
    from transformers import PreTrainedTokenizerFast

    assert len(set(vocabulary)) == len(vocabulary)
    ids = {token: index for index, token in enumerate(vocabulary)}
    tokenizer = Tokenizer(models.BPE(vocab=ids, merges=merges, byte_fallback=True))
    tokenizer.pre_tokenizer = _split_words()
    tokenizer.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Fuse()])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END,
        eos_token=END,
        pad_token=PAD,
        clean_up_tokenization_spaces=False,
        split_special_tokens=True,
    )


def _split_words() -> Any:
    from tokenizers import Regex, pre_tokenizers

    return pre_tokenizers.Split(Regex(_WORDS), "isolated")


def _split_words_definition() -> dict[str, Any]:
    return {
        "type": "Split",
        "pattern": {"Regex": _WORDS},
        "behavior": "Isolated",
        "invert": False,
    }
