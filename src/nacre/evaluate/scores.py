"""What an evaluation says: plain records, each with how many examples it rests on and how sure.

N examples, R resamples.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from nacre.errors import CheckpointError

RESAMPLES = 2000
DRAWN_AT_ONCE = 4_000_000  # examples of resamples in memory


@dataclass(frozen=True)
class Score:
    """One number of one task.

    `subset` is a part of the task (a domain, a language, a subject), empty for all of it; `n` the
    examples or documents it rests on; `interval` 95%, None where it is undefined; `chance` what
    guessing gives, None where there is no such thing.
    """

    task: str
    metric: str
    value: float
    n: int
    subset: str = ""
    interval: tuple[float, float] | None = None
    chance: float | None = None

    @property
    def corrected(self) -> float | None:
        """How far from chance (0) to perfect (1) the value is; None without a chance line."""
        if self.chance is None or self.chance >= 1:
            return None
        return (self.value - self.chance) / (1 - self.chance)

    def record(self) -> dict[str, Any]:
        """Return the score as plain data, with `corrected`."""
        interval = None if self.interval is None else list(self.interval)
        return asdict(self) | {"interval": interval, "corrected": self.corrected}


def bounded_exp(nats: float) -> float:
    """Return e to the power of `nats`, which a float may not hold: at most e to the 700."""
    return math.exp(min(nats, 700.0))


def damaged(finding: str) -> CheckpointError:
    """Return the error for a model whose scores are no numbers; `finding` says which."""
    return CheckpointError(
        f"{finding}: it diverged in training or its weights are damaged; make it again"
    )


def mean_interval(
    values: Sequence[float], *, resamples: int = RESAMPLES, seed: int = 0
) -> tuple[float, float] | None:
    """Return the 95% interval of a mean over examples; None for fewer than two."""
    values_N = np.asarray(values, dtype=np.float64)
    return ratio_interval(values_N, np.ones(len(values_N)), resamples, seed)


def ratio_interval(
    sums_N: npt.NDArray[np.float64],
    sizes_N: npt.NDArray[np.number[Any]],
    resamples: int = RESAMPLES,
    seed: int = 0,
) -> tuple[float, float] | None:
    """Return the 95% interval of sum / size of all examples together; None for fewer than two.

    A percentile bootstrap (Efron and Tibshirani 1993, "An Introduction to the Bootstrap", chapter
    13) over examples.
    """
    count = len(sizes_N)
    if count < 2:
        return None
    generator = np.random.default_rng(seed)
    rows = max(1, DRAWN_AT_ONCE // count)
    ratios: list[float] = []
    for begin in range(0, resamples, rows):
        drawn_RN = generator.integers(count, size=(min(rows, resamples - begin), count))
        ratios += (sums_N[drawn_RN].sum(1) / sizes_N[drawn_RN].sum(1)).tolist()
    low, high = np.percentile(ratios, [2.5, 97.5])
    return float(low), float(high)
