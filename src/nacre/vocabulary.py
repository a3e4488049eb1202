"""What the ids of any fast tokenizer stand for: text, bytes, or nothing.

Reads byte-level vocabularies (GPT-2), byte fallback with "▁" for a space (Llama, Gemma), WordPiece
(BERT) and nacre's own off their `tokenizer.json`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt

from nacre.errors import ConfigError, Problem

if TYPE_CHECKING:
    from tokenizers import Tokenizer
    from transformers import PreTrainedTokenizerBase

MOST_CHARACTERS = 2**27
"""Of all tokens' texts."""

TokenString: TypeAlias = str | bytes
"""`str`: text, is drawn. `bytes`: no text (a raw byte, a special token's name), is hashed."""


def token_strings(tokenizer: PreTrainedTokenizerBase) -> list[TokenString]:
    """Return what each token id stands for: `str` for text, `bytes` for what is no text.

    One entry per id, added tokens and unused ids included, all different. A token's text is what it
    decodes to inside a sentence: a word start keeps its space, in every kind of vocabulary. Bytes
    are: byte tokens, byte-level tokens that are no valid UTF-8, special tokens (their name), unused
    ids (`<unused 17>`), and a token whose text an earlier one already has (its raw piece).
    """
    strings: list[TokenString] = []
    seen: set[TokenString] = set()
    for index, (raw, text) in enumerate(_pieces(tokenizer)):
        string = text or raw.encode()
        name = raw
        while string in seen:
            string = name.encode()
            name += f"#{index}"
        seen.add(string)
        strings.append(string)
    return strings


def byte_lengths(tokenizer: PreTrainedTokenizerBase) -> npt.NDArray[np.int32]:
    """Return the UTF-8 bytes of text behind each token id, int32 [V]; 0 for special and unused ids.

    For a lossless tokenizer the lengths of an encoding add up to the bytes of the text; for others
    (a prepended space, lower case) nearly.
    """
    return np.array(
        [_byte_length(text) for _, text in _pieces(tokenizer)],
        dtype=np.int32,
    )


def backend(tokenizer: PreTrainedTokenizerBase) -> Tokenizer:
    """Return the Rust tokenizer behind a fast tokenizer."""
    return tokenizer.backend_tokenizer  # type: ignore[attr-defined]


def definition(tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """Return the content of the tokenizer's `tokenizer.json`."""
    return json.loads(backend(tokenizer).to_str())


def _byte_length(text: TokenString | None) -> int:
    if text is None:
        return 0
    return len(text.encode() if isinstance(text, str) else text)


def _pieces(tokenizer: PreTrainedTokenizerBase) -> list[tuple[str, TokenString | None]]:
    """Return, per id, the raw piece and the text it stands for; None for special and unused ids."""
    rust = backend(tokenizer)
    vocabulary = rust.get_vocab(with_added_tokens=True)
    added = rust.get_added_tokens_decoder()
    size = max([len(tokenizer), *(index + 1 for index in vocabulary.values())])
    read = _reader(definition(tokenizer))
    room = MOST_CHARACTERS
    pieces: list[tuple[str, TokenString | None]] = [
        (f"<unused {index}>", None) for index in range(size)
    ]
    for raw, index in vocabulary.items():
        token = added.get(index)
        if token is None:
            pieces[index] = (raw, read(raw))
        else:
            pieces[index] = (raw, None if token.special else token.content)
        room -= len(pieces[index][1] or "")
        if room < 0:
            message = f"its tokens have more than {MOST_CHARACTERS:,} characters in all"
            raise ConfigError(Problem("tokenizer", message, "use another tokenizer"))
    return pieces


def _reader(parts_of: dict[str, Any]) -> Callable[[str], TokenString]:
    """Return the function from a raw piece to its text, read off the tokenizer's decoder."""
    parts = _flat(parts_of.get("decoder"))
    kinds = {part["type"] for part in parts + _flat(parts_of.get("pre_tokenizer"))}
    if "ByteLevel" in kinds:
        return _read_byte_level
    steps: list[Callable[[str], str]] = []
    falls_back = bool(parts_of["model"].get("byte_fallback"))
    for part in parts:
        if part["type"] == "ByteFallback":
            falls_back = True
        elif part["type"] == "Replace" and "String" in part["pattern"]:
            steps.append(_replacer(part["pattern"]["String"], part["content"]))
        elif part["type"] == "Metaspace":
            steps.append(_replacer(part["replacement"], " "))
        elif part["type"] == "BPEDecoder":
            steps.append(_replacer(part["suffix"], " "))
        elif part["type"] == "WordPiece":
            steps.append(_word_piece(part["prefix"]))

    def read(raw: str) -> TokenString:
        if falls_back and re.fullmatch(r"<0x[0-9A-Fa-f]{2}>", raw):
            return bytes([int(raw[3:5], 16)])
        for step in steps:
            raw = step(raw)
        return raw

    return read


def _flat(part: dict[str, Any] | None) -> list[dict[str, Any]]:
    """Return a decoder's or pre-tokenizer's parts without the nesting."""
    if part is None:
        return []
    inner = part.get("decoders") or part.get("pretokenizers")
    return [leaf for item in inner for leaf in _flat(item)] if inner else [part]


def _replacer(old: str, new: str) -> Callable[[str], str]:
    def read(raw: str) -> str:
        if raw.count(old) * len(new) > MOST_CHARACTERS:
            raise ConfigError(Problem("tokenizer", f"its decoder makes {raw[:20]!r} too long"))
        return raw.replace(old, new)

    return read


def _word_piece(prefix: str) -> Callable[[str], str]:
    """WordPiece marks what continues a word; the vocabularies here mark what begins one."""

    def read(raw: str) -> str:
        if raw.startswith(prefix) and raw != prefix:
            return raw[len(prefix) :]
        return " " + raw if raw[:1].isalnum() else raw

    return read


def _byte_alphabet() -> dict[str, int]:
    """Invert GPT-2's byte-level alphabet: printable bytes are themselves, others from U+0100."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    points = {chr(byte): byte for byte in printable}
    return points | {chr(0x100 + place): byte for place, byte in enumerate(others)}


_BYTES = _byte_alphabet()


def _read_byte_level(raw: str) -> TokenString:
    if any(char not in _BYTES for char in raw):
        return raw
    data = bytes(_BYTES[char] for char in raw)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data
