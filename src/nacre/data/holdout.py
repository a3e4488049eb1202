"""Which documents are held out for validation: decided by their content, the same for every arm.

A document is held out when the hash of its text, as a fraction, is below `holdout`: whatever its
order, its neighbors or the seed, and with all its exact copies. A document of more than a tenth of
the corpus is never held out whole (two files would lose one): it is cut near its end, at a
paragraph or line where there is one, and its last part is held out. When neither holds out
anything, the document with the smallest hash is.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LARGE = 0.1
"""The share of the corpus from which a document is cut instead of assigned."""

_FAR = 1_000_000  # tokens from the intended place that are searched for a better one
_BLOCK = 1 << 20  # documents at a time

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """Documents whose hash is below `below` are held out, unless their hash is among the `large`.

    `cuts`: hash of a large document -> how many of its tokens train. Without a cut all of them do.
    """

    below: int
    large: frozenset[int]
    cuts: dict[int, int]

    def holds_out(self, content: int) -> bool:
        """Say whether documents of this hash are held out whole."""
        return content < self.below and content not in self.large


class ContentHash:
    """64 bits that depend on a text alone, which may come in pieces."""

    def __init__(self) -> None:
        self._total = hashlib.blake2b(digest_size=8, person=b"nacre holdout")

    def update(self, data: bytes) -> None:
        """Add UTF-8 bytes of the text."""
        self._total.update(data)

    def value(self) -> int:
        """Return the hash of what was added."""
        return int.from_bytes(self._total.digest(), "little")


def content_hash(text: str) -> int:
    """Return 64 bits that depend on the text alone."""
    total = ContentHash()
    total.update(text.encode())
    return total.value()


def assign(
    hashes: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int64],
    tokens: npt.NDArray[Any],
    strings: Sequence[str | bytes],
    holdout: float,
) -> Assignment:
    """Divide N documents of `lengths` tokens (their end token included), which fill `tokens`.

    The arrays may be memory-mapped: they are read in blocks.
    """
    large = _large(hashes, lengths)
    cuts = _cuts(large, hashes, lengths, tokens, _LineEnds(strings), holdout)
    below = int(holdout * 2**64)
    if cuts:
        logger.info(
            "%d documents are each over %d%% of the corpus: their last %.3g%% is held out",
            len(cuts),
            LARGE * 100,
            holdout * 100,
        )
    else:
        smallest = _smallest(hashes, large)
        if smallest is not None and smallest >= below:
            below = smallest + 1
    return Assignment(below, large, cuts)


def _blocks(count: int) -> Iterator[slice]:
    for begin in range(0, count, _BLOCK):
        yield slice(begin, begin + _BLOCK)


def _large(hashes: npt.NDArray[np.uint64], lengths: npt.NDArray[np.int64]) -> frozenset[int]:
    """Return the hashes whose documents together are more than `LARGE` of the tokens.

    The first pass adds up the hashes' first 16 bits, where fewer than ten sums can be that large;
    the second looks only at the hashes behind those.
    """
    buckets = np.zeros(1 << 16)
    for block in _blocks(len(hashes)):
        buckets += np.bincount(_bucket(hashes[block]), lengths[block], minlength=len(buckets))
    limit = LARGE * buckets.sum()
    sums: dict[int, float] = {}
    for block in _blocks(len(hashes)):
        chosen = (buckets > limit)[_bucket(hashes[block])]
        values, member = np.unique(hashes[block][chosen], return_inverse=True)
        for value, size in zip(
            values.tolist(), np.bincount(member, lengths[block][chosen]).tolist(), strict=True
        ):
            sums[value] = sums.get(value, 0.0) + size
    return frozenset(value for value, size in sums.items() if size > limit)


def _bucket(hashes: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    return (hashes >> np.uint64(48)).astype(np.int64)


def _cuts(
    large: frozenset[int],
    hashes: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int64],
    tokens: npt.NDArray[Any],
    line_ends: _LineEnds,
    holdout: float,
) -> dict[int, int]:
    """Return where the large documents are cut: copies at the same place, tiny ones nowhere."""
    cuts: dict[int, int] = {}
    before = 0
    wanted = np.array(sorted(large), np.uint64)
    for block in _blocks(len(hashes) if large else 0):
        ends = before + np.cumsum(lengths[block])
        found, first = np.unique(hashes[block], return_index=True)
        for place in first[np.isin(found, wanted)].tolist():
            content, length = int(hashes[block][place]), int(lengths[block][place])
            if content not in cuts and length > 2:  # two tokens and the end: something on each side
                stop = int(ends[place]) - 1
                cuts[content] = line_ends.cut(tokens[stop + 1 - length : stop], holdout)
        before = int(ends[-1])
    return cuts


def _smallest(hashes: npt.NDArray[np.uint64], large: frozenset[int]) -> int | None:
    """Return the smallest hash of a document that is not large."""
    wanted = np.array(sorted(large), np.uint64)
    smallest = [
        int(others.min())
        for block in _blocks(len(hashes))
        if len(others := hashes[block][~np.isin(hashes[block], wanted)])
    ]
    return min(smallest, default=None)


class _LineEnds:
    """Finds the place to cut a document, from what its tokens stand for."""

    def __init__(self, strings: Sequence[str | bytes]) -> None:
        newline = [string in ("\n", b"\n", "\r\n") for string in strings]
        self.newline = np.array(newline)
        self.line = np.array([_ends(string, "\n") for string in strings])
        self.paragraph = np.array([_ends(string, "\n\n", "\n\r\n") for string in strings])

    def cut(self, tokens: npt.NDArray[Any], holdout: float) -> int:
        """Return how many of at least two tokens stay for training."""
        count = len(tokens)
        target = min(max(round(count * (1 - holdout)), 1), count - 1)
        low = max(int(count * (1 - 2 * holdout)), target - _FAR, 1)
        high = min(int(count * (1 - holdout / 2)), target + _FAR, count - 1)
        places = np.arange(low, high + 1)
        before = tokens[places - 1]
        line = self.line[before] & ~self.newline[tokens[places]]
        two_before = tokens[np.maximum(places - 2, 0)]
        paragraph = self.paragraph[before] | (self.newline[before] & self.line[two_before])
        for candidates in (places[line & paragraph], places[line]):
            if len(candidates):
                return int(candidates[np.abs(candidates - target).argmin()])
        return target


def _ends(string: str | bytes, *endings: str) -> bool:
    if isinstance(string, bytes):
        return string.endswith(tuple(ending.encode() for ending in endings))
    return string.endswith(endings)
