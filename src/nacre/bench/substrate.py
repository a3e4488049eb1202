"""Suite `substrate`: how long a glyph substrate of a large vocabulary takes."""

from __future__ import annotations

import hashlib
import unicodedata
from collections.abc import Iterator
from itertools import islice, product

from nacre.bench.measure import Effort, Row, Target, compare
from nacre.substrate import Substrate, SubstrateRecipe

SIZE, WIDTH = 65_536, 1024
_UNASSIGNED = ("Cn", "Cs", "Co")


def suite(effort: Effort) -> Iterator[Row]:
    """Yield the seconds of one build beside those of hashing its rows, which it cannot avoid."""
    size, width = (256, 64) if effort.quick else (SIZE, WIDTH)
    case = f"{size:,} tokens x {width:,}"
    effort.say(case)
    tokens, recipe = vocabulary(size), SubstrateRecipe()
    rows = Substrate.build(recipe, tokens, width).rows
    work = {
        "build": lambda: Substrate.build(recipe, tokens, width),
        "hash": lambda: hashlib.sha256(rows.data),
    }
    seconds = compare(work, effort.rounds, effort.seconds / 2)
    yield Row(
        suite="substrate",
        case=case,
        unit="s",
        better="lower",
        measured=seconds["build"].median,
        spread=seconds["build"].spread,
        rounds=len(seconds["build"].values),
        limit=seconds["hash"].median,
        limit_name="SHA-256 of its rows",
        target=Target("measured", 6.0),
    )


def vocabulary(size: int) -> list[str]:
    """Return `size` different tokens: three quarters code points or more, then pairs of letters.

    The code points are the assigned ones of the Basic Multilingual Plane in order, at most all.
    """
    points = [chr(point) for point in range(0x10000)]
    points = [char for char in points if unicodedata.category(char) not in _UNASSIGNED]
    letters = [char for char in points if char.isalpha()][:400]
    singles = points if size > len(points) else points[: size * 3 // 4]
    pairs = ("".join(pair) for pair in product(letters, repeat=2))
    return [*singles, *islice(pairs, size - len(singles))]
