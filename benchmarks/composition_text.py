"""The text of the composition study: four domains, and documents that mix two of them.

English novels and Wikipedia, Russian novels, modern Chinese, and the Python sources of the running
interpreter's standard library. Held out are whole documents, never seen in training. Training text
is cut into pieces of some pages, shuffled, and as many tokens long in every domain:

    TEXT/all/DOMAIN.jsonl            {"text": ...} a line; the tokenizer is learned from these
    TEXT/train/DOMAIN.jsonl          the first TRAIN_TOKENS of it
    TEXT/own/DOMAIN/*.txt            one domain each
    TEXT/pairs/A-B/{switches,mixed}/*.txt
        switches: half from A, half from B, or the other way round; mixed: A and B by turns, four
        pieces of each. About 256 tokens a document, so a switch stands in every window.
"""

from __future__ import annotations

import itertools
import json
import random
import sysconfig
from collections.abc import Callable, Iterator
from pathlib import Path

DOMAINS = ("en", "ru", "zh", "code")
ALL_BYTES = 8_000_000  # of each domain
TRAIN_TOKENS = 1_300_000  # of each domain, more than an expert reads
TRAIN_PIECE = 12_000  # characters of a piece of training text
HELD_OUT_BYTES = 400_000  # of each domain
DOCUMENT = {"en": 4000, "ru": 4000, "zh": 1200, "code": 3000}  # characters of a held-out document
WINDOW = {"en": 900, "ru": 900, "zh": 300, "code": 720}  # characters of about 256 tokens
PAIR_DOCUMENTS = 120


def english(data: Path) -> Iterator[str]:
    """Yield novels and Wikipedia paragraphs by turns, a novel's worth of each."""
    novels = sorted((data / "en" / "novels").glob("*.txt"))
    wiki = (data / "en" / "wiki" / "train.txt").read_text(encoding="utf-8").splitlines()
    size = -(-len(wiki) // len(novels))
    for number, novel in enumerate(novels):
        yield novel.read_text(encoding="utf-8")
        yield "\n".join(wiki[number * size : (number + 1) * size])


def russian(data: Path) -> Iterator[str]:
    """Yield works."""
    for work in sorted((data / "ru" / "novels").glob("*.txt")):
        yield work.read_text(encoding="utf-8")


def chinese(data: Path) -> Iterator[str]:
    """Yield runs of 2,000 consecutive sentences."""
    lines = (data / "zh" / "modern" / "modern.txt").read_text(encoding="utf-8").splitlines()
    for start in range(0, len(lines), 2000):
        yield "\n".join(lines[start : start + 2000])


def code(data: Path) -> Iterator[str]:
    """Yield the standard library's sources, its tests left out."""
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        inside = path.relative_to(root).parts
        if "site-packages" in inside or "test" in inside or "tests" in inside:
            continue
        text = path.read_text(encoding="utf-8", errors="ignore")
        if text.strip():
            yield text


READERS: dict[str, Callable[[Path], Iterator[str]]] = {
    "en": english, "ru": russian, "zh": chinese, "code": code,
}  # fmt: skip


def prepare(data: Path, out: Path) -> None:
    """Write everything but `train`; the same for the same data and Python."""
    held_out: dict[str, list[str]] = {}
    for domain, reader in READERS.items():
        documents = list(reader(data))
        random.Random(f"order of {domain}").shuffle(documents)
        held_out[domain] = _take(documents, HELD_OUT_BYTES)
        rest = [piece for text in documents for piece in _pieces(text, TRAIN_PIECE)]
        random.Random(f"pieces of {domain}").shuffle(rest)
        _write_jsonl(out / "all" / f"{domain}.jsonl", _take(rest, ALL_BYTES))
        pieces = [p for text in held_out[domain] for p in _pieces(text, DOCUMENT[domain])]
        _write(out / "own" / domain, pieces[: HELD_OUT_BYTES // len(pieces[0].encode())])
    for one in range(len(DOMAINS)):
        for other in range(one + 1, len(DOMAINS)):
            a, b = DOMAINS[one], DOMAINS[other]
            pair = out / "pairs" / f"{a}-{b}"
            _write(pair / "switches", _alternating(held_out, a, b, 1))
            _write(pair / "mixed", _alternating(held_out, a, b, 4))


def cut(out: Path, tokens: Callable[[list[str]], list[int]]) -> None:
    """Write `train`; `tokens` counts the tokens of texts."""
    for domain in DOMAINS:
        lines = (out / "all" / f"{domain}.jsonl").read_text(encoding="utf-8").splitlines()
        texts = [json.loads(line)["text"] for line in lines]
        before = itertools.accumulate(tokens(texts), initial=0)
        kept = [text for text, start in zip(texts, before, strict=False) if start < TRAIN_TOKENS]
        _write_jsonl(out / "train" / f"{domain}.jsonl", kept)


def _take(documents: list[str], size: int) -> list[str]:
    """Remove and return documents from the end of a list until they hold `size` bytes."""
    taken: list[str] = []
    while documents and size > 0:
        taken.append(documents.pop())
        size -= len(taken[-1].encode())
    return taken


def _pieces(text: str, characters: int) -> list[str]:
    """Cut a text into pieces of whole lines of about so many characters; a shorter rest goes."""
    pieces: list[str] = []
    piece = ""
    for line in text.splitlines(keepends=True):
        piece += line
        if len(piece) >= characters:
            pieces.append(piece)
            piece = ""
    return pieces


def _alternating(held_out: dict[str, list[str]], a: str, b: str, turns: int) -> list[str]:
    """Return documents in which A and B take turns, so many times each; half begin with B."""
    chance = random.Random(f"{a} {b} {turns}")
    pools = {
        domain: [p[:size] + "\n" for text in held_out[domain] for p in _pieces(text, size)]
        for domain in (a, b)
        for size in [WINDOW[domain] // (2 * turns)]
    }
    documents: list[str] = []
    for number in range(PAIR_DOCUMENTS):
        order = (a, b) if number % 2 == 0 else (b, a)
        chosen = [chance.choice(pools[domain]) for _ in range(turns) for domain in order]
        documents.append("".join(chosen))
    return documents


def _write_jsonl(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts]
    path.write_text("".join(lines), encoding="utf-8")


def _write(folder: Path, documents: list[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for number, text in enumerate(documents):
        (folder / f"{number:04d}.txt").write_text(text, encoding="utf-8")
