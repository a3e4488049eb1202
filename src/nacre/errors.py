"""What nacre says when a person's input is wrong: one clear message, no traceback.

Every error a user can cause derives from `NacreError`; the command line prints its text and exits
with code 2. A bug of ours raises anything else and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass


class NacreError(Exception):
    """A user's mistake or a situation the user can mend; its text is the whole message."""


@dataclass(frozen=True)
class Problem:
    """One thing wrong with one field: what came, what is allowed, what to do.

    `involves` names other fields that the problem rests on: where one of them is wrong itself, this
    problem may be none.
    """

    field: str
    message: str
    fix: str = ""
    involves: tuple[str, ...] = ()

    def __str__(self) -> str:
        return f"{self.field}: {self.message}" + (f" ({self.fix})" if self.fix else "")


def clone_install(extra: str) -> str:
    """Return how an extra is installed: nacre is on no index, and PyPI's `nacre` is another's."""
    return f"in a clone of nacre: pip install -e '.[{extra}]'"


class ConfigError(NacreError):
    """A plan, an option or a combination of them that cannot work; lists every problem at once."""

    def __init__(self, problems: Problem | Sequence[Problem], where: str = "") -> None:
        self.problems = (problems,) if isinstance(problems, Problem) else tuple(problems)
        head = f"{where}: " if where else ""
        if len(self.problems) == 1:
            text = f"{head}{self.problems[0]}"
        else:
            lines = "\n".join(f"  - {problem}" for problem in self.problems)
            text = f"{head}{len(self.problems)} problems\n{lines}"
        super().__init__(text)


class DataError(NacreError):
    """Text that is missing, unreadable, not text, or too short."""


class CheckpointError(NacreError):
    """A folder that does not hold what was asked of it, or holds something damaged."""


class FirstFailed(NacreError):
    """The first of several processes met an error. It says what: the others only end."""


class DivergedError(NacreError):
    """Training that left the finite numbers; the run can be continued from its last good state."""


class FingerprintError(NacreError):
    """Two things that must be made from the same parts are not."""

    def __init__(self, what: str, expected: str, found: str, fix: str) -> None:
        super().__init__(f"{what} does not match: expected {expected}, found {found} ({fix})")


def one_line(error: BaseException) -> str:
    """Return the beginning of what an error of a library says, in one line."""
    return " ".join(str(error).split())[:300] or type(error).__name__


def nearest(word: str, allowed: Iterable[str]) -> str:
    """Return "did you mean X?" for the allowed word nearest to `word`, or an empty string."""
    close = difflib.get_close_matches(word, list(allowed), n=1, cutoff=0.6)
    return f"did you mean {close[0]!r}?" if close else ""
