"""The packages of the extra `eval`: asked for before anything expensive."""

from __future__ import annotations

import importlib.util

from nacre.errors import ConfigError, Problem, clone_install


def require(package: str, what: str) -> None:
    """Raise ConfigError where a package is not installed; `what` (plural) needs it."""
    if importlib.util.find_spec(package) is None:
        raise ConfigError(Problem(what, f"need the package {package}", clone_install("eval")))
