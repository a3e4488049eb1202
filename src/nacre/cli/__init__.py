"""The `nacre` command. Commands only: each reads its options, calls the library, prints.

People read stderr; with `--json` a command prints one JSON object on stdout. Exit code 0 only on
success, 2 for a user's mistake (one clear message, no traceback), 3 where a signal stopped a growth
whose state was saved.
"""

# In the order of `nacre --help`.
from nacre.cli import (  # noqa: I001
    grow, plan, listing, generate, compose, evaluate, play, publish, fleet, machine, parts,  # noqa: F401
)  # fmt: skip
from nacre.cli.console import main

__all__ = ["main"]
