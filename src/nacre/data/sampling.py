"""The text that a tokenizer learns from: all of it, or an equal share of every source."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence

from nacre import tokenizer
from nacre.data.corpus import Errors, Piece, check, pieces

logger = logging.getLogger(__name__)


def sample(sources: Sequence[str], *, errors: Errors = "strict") -> list[str]:
    """Return the texts of the sources in order, `tokenizer.LEARN_FROM` characters at most.

    Of longer text every source gives an equal share, its first characters; what a source does not
    fill is left to the others, and a log message says how long the share is. Nothing is read far
    past its share. Raises as `corpus.read` does.
    """
    limit = tokenizer.LEARN_FROM
    drawn = [
        _Drawn(piece for part in parts for piece in pieces(part, errors))
        for parts in check(sources).by_source
    ]
    share = 0
    while (larger := _share([source.size for source in drawn], limit)) > share:
        share = larger
        for source in drawn:
            source.draw(share)
    if any(source.length > share for source in drawn):
        whose = " of each source" if len(drawn) > 1 else ""
        logger.info("the tokenizer learns from the first %d characters%s", share, whose)
    return [text for source in drawn for text in source.texts(share)]


def _share(sizes: Sequence[float], limit: int) -> int:
    """Return the most that each may give so that all together give at most `limit`."""
    room = limit
    for place, size in enumerate(sorted(sizes)):
        share = room // (len(sizes) - place)
        if size > share:
            return share
        room -= int(size)
    return limit


class _Drawn:
    """What was read of one source so far."""

    def __init__(self, unread: Iterable[Piece]) -> None:
        self._unread = iter(unread)
        self._read: list[tuple[str, bool]] = []
        self._ended = False
        self.length = 0

    @property
    def size(self) -> float:
        """The characters of the source, infinite while its end is not read."""
        return self.length if self._ended else math.inf

    def draw(self, share: int) -> None:
        """Read until there is more than the share, or no more."""
        while self.length <= share and not self._ended:
            piece = next(self._unread, None)
            if piece is None:
                self._ended = True
            else:
                self._read.append((piece.text, piece.last))
                self.length += len(piece.text)

    def texts(self, share: int) -> list[str]:
        """Return the documents in the first `share` characters; those without text are left out."""
        found: list[str] = []
        begun: list[str] = []
        room = share
        for text, last in self._read:
            begun.append(text[:room])
            room -= len(begun[-1])
            if last or not room:
                found.append("".join(begun))
                begun = []
        return [text for text in found if text]
