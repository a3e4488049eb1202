"""The notebooks run from top to bottom, and show what is kept in them; they become pages."""

from __future__ import annotations

import json
import runpy
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "docs" / "notebooks").glob("*.ipynb"))
TOOL: dict[str, Any] = runpy.run_path(str(ROOT / "tools" / "notebook_pages.py"))


def shown(notebook: dict[str, Any]) -> list[list[str]]:
    """Return for every code cell the kinds of what it shows; the numbers differ by machine."""
    return [
        [kind for output in cell["outputs"] for kind in output.get("data", {"stdout": 0})]
        for cell in TOOL["code_cells"](notebook)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_shows_what_it_kept(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept, again = TOOL["read"](path), TOOL["read"](path)
    monkeypatch.chdir(tmp_path)
    TOOL["run"](again)
    assert shown(again) == shown(kept)
    assert any(shown(kept)), "run tools/notebook_pages.py to fill in what it shows"


def test_there_are_three() -> None:
    assert [path.stem for path in NOTEBOOKS] == ["depths", "experts", "study"]


def test_cells_share_their_names_and_show_text_and_pictures() -> None:
    sources = ["a = 2\n", "print(a)\n", "from PIL import Image\nImage.new('L', (a, a))\n", "None"]
    cells = [{"cell_type": "code", "source": [source]} for source in sources]
    notebook = TOOL["run"]({"cells": [{"cell_type": "markdown", "source": ["# Two\n"]}, *cells]})
    assert shown(notebook) == [[], ["stdout"], ["text/plain", "image/png"], []]
    json.dumps(notebook)
    page = TOOL["markdown"](notebook)
    assert page.startswith("# Two\n")
    assert "```python\nprint(a)\n\n```\n\n```text\n2\n```" in page
    assert "![](data:image/png;base64,iVBOR" in page
