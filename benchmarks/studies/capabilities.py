"""Gather what the study `six-arms` evaluates: python benchmarks/studies/capabilities.py SHARED

Benchmark files of SHARED (`bench/`) are copied into runs/bench; its held-out paragraphs
(`en/wiki/dev.txt`) go into runs/heldout, each a document. Minimal pairs in the form of BLiMP
(Warstadt et al. 2020) are made from words of 19th-century novels: two sentences that differ in one
word, of which one is English. Nothing of BLiMP's own is in them.
"""

from __future__ import annotations

import json
import random
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

COUNT = 500  # pairs of a paradigm
FILES = ("squad/dev-v1.1.json", "lambada/*.txt", "arc/ARC-Challenge-Test.jsonl")

NOUNS = [
    "man", "woman", "friend", "servant", "lady", "gentleman", "brother", "sister", "child",
    "letter", "house", "room", "door", "window", "horse", "carriage", "tree", "garden", "book",
    "table", "chair", "hand", "face", "voice", "road", "hill", "church", "ship", "captain",
    "soldier", "stranger", "doctor", "master", "daughter", "cousin", "boy", "girl", "dog",
    "bird",
]  # fmt: skip
PLURALS = {"man": "men", "woman": "women", "lady": "ladies", "gentleman": "gentlemen",
           "child": "children", "church": "churches"}  # fmt: skip
MEN = ["man", "gentleman", "brother", "captain", "soldier", "master", "boy", "king"]
WOMEN = ["woman", "lady", "sister", "daughter", "girl", "queen", "mother", "aunt"]
ADJECTIVES = [
    "old", "poor", "good", "little", "great", "strange", "beautiful", "quiet", "large", "small",
    "dark", "young",
]  # fmt: skip
STATES = [
    "very old", "in the garden", "quite alone", "far away", "there before us", "as good as ever",
]  # fmt: skip
PLACES = ["of", "near", "behind", "with", "beside"]
ACTS = ["asked", "hurt", "saw", "blamed", "thought of", "believed", "forgot", "knew"]
VERBS = [("was", "were"), ("is", "are"), ("has been", "have been")]

Pair = tuple[str, str]


def plural(noun: str) -> str:
    return PLURALS.get(noun, noun + "s")


def agreement(draw: random.Random) -> Pair:
    """The subject and its verb, side by side."""
    noun, verb, many = draw.choice(NOUNS), draw.choice(VERBS), draw.random() < 0.5
    start = f"The {draw.choice(ADJECTIVES)} {plural(noun) if many else noun}"
    rest = draw.choice(STATES)
    return f"{start} {verb[many]} {rest}.", f"{start} {verb[not many]} {rest}."


def agreement_with_attractor(draw: random.Random) -> Pair:
    """A noun of the other number stands between the subject and its verb."""
    subject, between = draw.sample(NOUNS, 2)
    verb, many = draw.choice(VERBS), draw.random() < 0.5
    nouns = (plural(subject), between) if many else (subject, plural(between))
    start = f"The {nouns[0]} {draw.choice(PLACES)} the {nouns[1]}"
    rest = draw.choice(STATES)
    return f"{start} {verb[many]} {rest}.", f"{start} {verb[not many]} {rest}."


def determiner(draw: random.Random) -> Pair:
    """A demonstrative and its noun, an adjective between them."""
    noun, adjective, many = draw.choice(NOUNS), draw.choice(ADJECTIVES), draw.random() < 0.5
    right = draw.choice(("these", "those") if many else ("this", "that"))
    wrong = {"these": "this", "those": "that", "this": "these", "that": "those"}[right]
    ends = f"{adjective} {plural(noun) if many else noun}"
    return f"I had never seen {right} {ends} before.", f"I had never seen {wrong} {ends} before."


def reflexive(draw: random.Random) -> Pair:
    """A reflexive pronoun and whom it means."""
    verb = draw.choice(
        ["asked", "hurt", "saw", "blamed", "thought_of", "believed", "forgot", "knew"]
    )
    verb = verb.replace("_", " ")
    man = draw.random() < 0.5
    right, wrong = ("himself", "herself") if man else ("herself", "himself")
    start = f"The {draw.choice(ADJECTIVES)} {draw.choice(MEN if man else WOMEN)} {verb}"
    return f"{start} {right}.", f"{start} {wrong}."


PARADIGMS: tuple[Callable[[random.Random], Pair], ...] = (
    agreement, agreement_with_attractor, determiner, reflexive,
)  # fmt: skip


def pairs(paradigm: Callable[[random.Random], Pair]) -> Iterator[dict[str, str]]:
    """Yield `COUNT` different pairs of a paradigm, the same every time."""
    draw, seen = random.Random(paradigm.__name__), set()
    while len(seen) < COUNT:
        pair = paradigm(draw)
        if pair not in seen:
            seen.add(pair)
            good, bad = pair
            yield {"UID": paradigm.__name__, "sentence_good": good, "sentence_bad": bad}


def main(shared: Path, folder: Path, heldout: Path) -> None:
    for pattern in FILES:
        (source,) = (shared / "bench").glob(pattern)
        target = folder / source.name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(source, target)
    (folder / "blimp").mkdir(exist_ok=True)
    for paradigm in PARADIGMS:
        lines = "".join(json.dumps(pair) + "\n" for pair in pairs(paradigm))
        (folder / "blimp" / f"{paradigm.__name__}.jsonl").write_text(lines)
    (heldout / "en").mkdir(parents=True, exist_ok=True)
    paragraphs = (shared / "en/wiki/dev.txt").read_text().splitlines()
    lines = "".join(json.dumps({"text": paragraph}) + "\n" for paragraph in paragraphs)
    (heldout / "en/wiki-dev.jsonl").write_text(lines)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path("runs/bench"), Path("runs/heldout"))
