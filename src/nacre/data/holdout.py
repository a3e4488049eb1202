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
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

LARGE = 0.1
"""The share of the corpus from which a document is cut instead of assigned."""

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Assignment:
    """`held_out`: bool [N], documents held out whole. `cuts`: document -> tokens that train."""

    held_out: npt.NDArray[np.bool_]
    cuts: dict[int, int]


def content_hash(text: str) -> int:
    """Return 64 bits that depend on the text alone."""
    digest = hashlib.blake2b(text.encode(), digest_size=8, person=b"nacre holdout").digest()
    return int.from_bytes(digest, "little")


def assign(
    hashes: npt.NDArray[np.uint64],
    lengths: npt.NDArray[np.int64],
    tokens: npt.NDArray[Any],
    strings: Sequence[str | bytes],
    holdout: float,
) -> Assignment:
    """Divide N documents of `lengths` tokens (their end token included), which fill `tokens`."""
    _, member = np.unique(hashes, return_inverse=True)
    share = np.bincount(member, weights=lengths) / lengths.sum()
    large = share[member] > LARGE
    held_out = (hashes < np.uint64(int(holdout * 2**64))) & ~large
    cuts: dict[int, int] = {}
    begins = np.cumsum(lengths) - lengths
    line_ends = _LineEnds(strings)
    for document in np.flatnonzero(large).tolist():
        length = int(lengths[document])
        if length > 2:  # two tokens and the end: something on both sides
            begin = int(begins[document])
            cuts[document] = line_ends.cut(tokens[begin : begin + length - 1], holdout)
    if cuts:
        logger.info(
            "%d documents are each over %d%% of the corpus: their last %.3g%% is held out",
            len(cuts),
            LARGE * 100,
            holdout * 100,
        )
    elif not held_out.any() and not large.all():
        smallest = hashes[~large].min()
        held_out = hashes == smallest
    return Assignment(held_out, cuts)


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
        low = max(int(count * (1 - 2 * holdout)), 1)
        high = min(int(count * (1 - holdout / 2)), count - 1)
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
