"""The lowest versions: every dependency has one, and that of an extra's extras too."""

from __future__ import annotations

import runpy
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
lowest = runpy.run_path(str(ROOT / "tools" / "lowest.py"))["lowest"]


def test_every_dependency_has_a_lowest_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    base, everything = lowest([]), lowest(list(project["optional-dependencies"]))
    assert len(base) == len(project["dependencies"])
    assert base["transformers"] == "5.17"
    assert everything.items() >= base.items()
    assert {"datasets", "lm-eval", "pytest"} <= everything.keys()
    assert lowest(["dev"]).items() >= lowest(["data", "eval"]).items() - base.items()
    assert project["name"] not in everything


def test_an_extra_that_there_is_not() -> None:
    with pytest.raises(KeyError, match="no-such-extra"):
        lowest(["no-such-extra"])
