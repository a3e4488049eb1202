"""One input of a fuzz campaign: read in bounded time, and what became of it."""

from __future__ import annotations

import resource
import signal
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any

from targets import Target

from nacre.errors import NacreError

SECONDS, WAITS = 5.0, 60.0
"""Of the processor, and of the clock: who shares a machine waits for his turn."""

BYTES = 500 * 2**20


class Hang(BaseException):
    """An input that was read for longer than `SECONDS` or waited for longer than `WAITS`."""


@dataclass(frozen=True)
class Outcome:
    """`kind` is accepted, refused, crash, hang or memory; `where` is the place in the code."""

    kind: str
    where: str = ""
    said: str = ""

    @property
    def sound(self) -> bool:
        """True for what may happen."""
        return self.kind in ("accepted", "refused")


@contextmanager
def _limited() -> Iterator[None]:
    def stop(number: int, frame: FrameType | None) -> None:
        raise Hang

    limits = (
        (signal.SIGPROF, signal.ITIMER_PROF, SECONDS),
        (signal.SIGALRM, signal.ITIMER_REAL, WAITS),
    )
    before = [signal.signal(number, stop) for number, _, _ in limits]
    for _, timer, seconds in limits:
        signal.setitimer(timer, seconds)
    try:
        yield
    finally:
        for (number, timer, _), handler in zip(limits, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(number, handler)


def attempt(target: Target, given: Any) -> Outcome:
    """Read one input as the library does."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        with _limited():
            target.read(given)
        outcome = Outcome("accepted")
    except NacreError as error:
        outcome = Outcome("refused", said=str(error))
    except Hang as error:
        outcome = Outcome("hang", _place(error))
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # a panic of Rust code is no Exception
        outcome = Outcome("crash", _place(error), f"{type(error).__name__}: {error}"[:300])
    grown = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024
    return Outcome("memory", said=f"{grown:,} bytes") if grown > BYTES else outcome


def _place(error: BaseException) -> str:
    """Return where in the library an error came up, the innermost place of ours."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if "nacre" in Path(frame.filename).parts]
    return f"{Path(ours[-1].filename).name}:{ours[-1].lineno}" if ours else "?"
