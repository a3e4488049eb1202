"""A tokenizer's files: checked before anything reads them, loaded, and tried on short texts.

A tokenizer is small programs (normalizers, regular expressions) that somebody else wrote.
What would fill the memory when a text is encoded is refused by its definition; what takes for ever
shows on texts of a few characters.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeVar

from nacre import model_config
from nacre.errors import one_line
from nacre.untrusted import as_object, check_links, read_bytes, read_json

T = TypeVar("T")

DEFINITION = "tokenizer.json"
MOST_TOKENS = 2**22
"""One more than the highest id: tables of a vocabulary have so many rows, used or not."""

MOST_GROWTH = 256
"""How many times longer a text may become by the replacements of a normalizer or decoder."""

MOST_ADDED = 1024
"""Special tokens around a text."""

LONGEST_PADDING = 2**14

TRIED = tuple("aA1 \n!é日")
TRIED_LENGTHS = (1, 8, 12, 16, 20, 24)
TRIED_ENDS = ("", "!", "b")
TRIED_SECONDS = 1.0


def read(folder: Path) -> Any:
    """Load what `transformers` takes for the tokenizer in a folder; no code of it is run.

    Raises ValueError for a definition that asks for too much, and about anything else for one that
    cannot be loaded.
    """
    from transformers import AutoTokenizer

    check_links(folder)
    for path in sorted(folder.iterdir()):
        if path.name == model_config.CONFIG:
            _named(path, model_config.check)
        elif path.suffix == ".json" and ("token" in path.name or path.name == "vocab.json"):
            _named(path, _check_json)
        elif path.suffix in (".txt", ".model", ".jinja", ".tiktoken"):
            _named(path, read_bytes)
    tokenizer = without_panic(
        lambda: AutoTokenizer.from_pretrained(
            folder, trust_remote_code=False, local_files_only=True
        )
    )
    if (backend := getattr(tokenizer, "backend_tokenizer", None)) is not None:
        without_panic(lambda: _check_backend(backend))
    return tokenizer


def without_panic(call: Callable[[], T]) -> T:
    """Return what `call` returns; a panic of the Rust code becomes a ValueError.

    Panics derive from BaseException, and would end the program.
    """
    try:
        return call()
    except Exception:
        raise
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise ValueError(one_line(error)) from None


def _named(path: Path, check: Callable[[Path], object]) -> None:
    try:
        check(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path.name}: {error}") from None


def _check_json(path: Path) -> None:
    data = as_object(read_json(path))
    if path.name == DEFINITION:
        check_definition(data)
    if path.name == "tokenizer_config.json":
        _check_settings(path.parent, data)
    if path.name in ("vocab.json", "added_tokens.json"):
        _check_ids(data.values())


def _check_settings(folder: Path, settings: dict[str, Any]) -> None:
    """Refuse files of other folders, and what a class would be called with."""
    if settings.get("init_inputs"):
        raise ValueError("init_inputs is not read; take the field out")
    for key, value in settings.items():
        if key.endswith("_file") and isinstance(value, str) and "\0" not in value:
            place = Path(value).resolve()
            if place.exists() and not place.is_relative_to(folder.resolve()):
                raise ValueError(f"{key} names a file of another folder: {value}")
    if isinstance(added := settings.get("added_tokens_decoder"), dict):
        _check_ids(int(index) for index in added if index.isdecimal())


def _check_ids(ids: Iterable[Any]) -> None:
    """Raise ValueError for an id without measure: tables are made that reach to it."""
    highest = max((index for index in ids if isinstance(index, int)), default=0)
    if highest >= MOST_TOKENS:
        raise ValueError(f"it has the id {highest:,}, at most {MOST_TOKENS - 1:,} is allowed")


def check_definition(data: Mapping[str, Any]) -> None:
    """Raise ValueError for a `tokenizer.json` that makes much out of little."""
    model, added = data.get("model"), data.get("added_tokens")
    if isinstance(model, dict) and isinstance(vocabulary := model.get("vocab"), dict):
        _check_ids(vocabulary.values())
    if isinstance(added, list):
        _check_ids(token.get("id") for token in added if isinstance(token, dict))
    for part in ("normalizer", "pre_tokenizer", "decoder"):
        growth = 1.0
        for step in _steps(data.get(part)):
            growth *= _growth(step)
        if growth > MOST_GROWTH:
            raise ValueError(f"its {part} makes a text more than {MOST_GROWTH} times longer")
    padding = data.get("padding")
    if isinstance(padding, dict):
        strategy = padding.get("strategy")
        sizes = [padding.get("pad_to_multiple_of")]
        sizes += list(strategy.values()) if isinstance(strategy, dict) else []
        if any(isinstance(size, int) and size > LONGEST_PADDING for size in sizes):
            raise ValueError(f"it pads to more than {LONGEST_PADDING:,} tokens")


def _steps(part: Any) -> Iterator[dict[str, Any]]:
    """Yield the parts of a normalizer, pre-tokenizer or decoder without their nesting."""
    if not isinstance(part, dict):
        return
    yield part
    for key in ("normalizers", "pretokenizers", "decoders"):
        for inner in part.get(key) or () if isinstance(part.get(key), list) else ():
            yield from _steps(inner)


def _growth(step: dict[str, Any]) -> float:
    """Return how many times longer a step can make a text."""
    pattern, content = step.get("pattern"), step.get("content")
    if step.get("type") == "Replace" and isinstance(content, str):
        literal = pattern.get("String") if isinstance(pattern, dict) else None
        if isinstance(literal, str) and literal:
            return max(1.0, len(content) / len(literal))
        return 1.0 + len(content)
    names = ("prepend", "replacement", "suffix", "prefix")
    return 1.0 + max((len(v) - 1 for n in names if isinstance(v := step.get(n), str)), default=0)


def _check_backend(backend: Any) -> None:
    """Raise ValueError for ids, tokens and special tokens without measure, and for slowness."""
    _check_ids(backend.get_vocab(with_added_tokens=True).values())
    if (added := backend.num_special_tokens_to_add(False)) > MOST_ADDED:
        raise ValueError(f"it puts {added:,} special tokens around a text")
    begin = time.perf_counter()
    for length, char, end in itertools.product(TRIED_LENGTHS, TRIED, TRIED_ENDS):
        backend.encode(char * length + end)
        if (seconds := time.perf_counter() - begin) > TRIED_SECONDS:
            raise ValueError(f"it takes {seconds:.1f} s for texts of {length} characters")
