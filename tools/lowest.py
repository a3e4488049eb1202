"""The lowest versions that pyproject.toml allows, one a line, as a constraints file.

    python tools/lowest.py [EXTRA ...] > lowest.txt
    pip install --constraint lowest.txt . pytest pytest-timeout hypothesis
    pytest -o filterwarnings=default

Tests have to tell libraries that old from their own warnings: newer packages below them warn.
"""

from __future__ import annotations

import sys
import tomllib
from pathlib import Path

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

PYPROJECT = Path(__file__).parents[1] / "pyproject.toml"


def lowest(extras: list[str]) -> dict[str, str]:
    """Return by name the lowest version of every dependency, those of `extras` too.

    Raises ValueError for one without a lower bound, KeyError for an extra that there is not.
    """
    project = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]
    listed = [*project["dependencies"]]
    for extra in extras:
        listed += project["optional-dependencies"][extra]
    found: dict[str, str] = {}
    for requirement in map(Requirement, listed):
        if requirement.name == project["name"]:
            found |= lowest(sorted(requirement.extras))
            continue
        bounds = [spec.version for spec in requirement.specifier if spec.operator == ">="]
        if len(bounds) != 1:
            raise ValueError(f"{requirement}: has no lower bound")
        found[canonicalize_name(requirement.name)] = bounds[0]
    return found


if __name__ == "__main__":
    for name, version in sorted(lowest(sys.argv[1:]).items()):
        print(f"{name}=={version}")
