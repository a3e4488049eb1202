"""Which blocks of a composition's experts run once for whom.

Blocks that several experts share from the bottom up (the same embedding, the same blocks, by their
hashes) become one module. A segment is a run of blocks that serves the same experts all along.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import nn

from . import stock


@dataclass(eq=False)
class Segment:
    """Blocks `start` to `stop` (None: to the end, norm included) that run for some experts.

    They are modules of expert `owner`; what they return goes to `above`, or to that expert's head.
    `place` is the segment's index among all.
    """

    place: int
    owner: int
    start: int
    stop: int | None
    experts: tuple[int, ...]
    above: list[Segment] = field(default_factory=list)


class Layout:
    """All segments of some experts; `roots` are those that read token ids.

    `parts` are all experts' named parts, `hashes` their embedding's and blocks' (nothing for one
    that shares none), `playing` the experts that run. Makes what they share the same modules.
    """

    def __init__(
        self,
        parts: Sequence[stock.Parts],
        hashes: Sequence[Sequence[str]],
        playing: Sequence[int],
    ) -> None:
        self.parts = parts
        self.hashes = hashes
        self.segments: list[Segment] = []
        self.roots = self._grow(playing, 0)

    def _grow(self, experts: Sequence[int], start: int) -> list[Segment]:
        """Return the segments from block `start` on of experts that are the same below it."""
        groups: dict[Any, list[int]] = {}
        for expert in experts:
            hashes = self.hashes[expert]
            shared = start + 1 < len(hashes)
            key = (hashes[0], hashes[start + 1]) if shared else ("alone", expert)
            groups.setdefault(key, []).append(expert)
        return [self._segment(group, start) for group in groups.values()]

    def _segment(self, group: list[int], start: int) -> Segment:
        """Return the longest segment from `start` on that all of `group` share."""
        owner = group[0]
        segment = Segment(len(self.segments), owner, start, None, tuple(group))
        self.segments.append(segment)
        if len(group) == 1:
            return segment
        hashes = [self.hashes[expert][1:] for expert in group]
        stop = start
        while all(stop < len(h) and h[stop] == hashes[0][stop] for h in hashes):
            stop += 1
        for expert in group[1:]:
            self._share(owner, expert, stop)
        segment.stop = stop
        segment.above = self._grow(group, stop)
        return segment

    def _share(self, owner: int, expert: int, stop: int) -> None:
        """Let an expert use the owner's embedding and first blocks: the same modules."""
        mine, theirs = self.parts[expert], self.parts[owner]
        for index in range(stop):
            mine.blocks[index] = theirs.blocks[index]
        mine.embedding.weight = theirs.embedding.weight


def view(model: Any, segment: Segment) -> nn.Module:
    """Return the module that runs a segment of the model that owns it; it shares every weight.

    Called like a decoder, with `input_ids` where the segment starts at 0, else `inputs_embeds`.
    """
    if segment.stop is not None:
        if segment.start:
            return stock.middle(model, segment.start, segment.stop)
        return stock.lower(model, segment.stop)
    if segment.start:
        return stock.upper(model, segment.start)
    return stock.find_parts(model).decoder
