"""The site builds without a warning, loads nothing from elsewhere, has every public name."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pytest

import nacre

ROOT = Path(__file__).parent.parent
LOADS = {"script": "src", "link": "href", "img": "src", "iframe": "src", "source": "src"}


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The built site."""
    folder = tmp_path_factory.mktemp("site")
    built = subprocess.run(
        [sys.executable, "-m", "mkdocs", "build", "--strict", "--site-dir", folder],
        cwd=ROOT,
        env=os.environ | {"NO_MKDOCS_2_WARNING": "1"},
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr
    return folder


class Loaded(HTMLParser):
    """Collects what a browser loads with a page, links to follow aside."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.found: list[str] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.found += [value for name, value in attrs if LOADS.get(tag) == name and value]
        self.found += [f"{tag} {value}" for name, value in attrs if name == "srcset" and value]


def test_a_page_loads_nothing_from_elsewhere(site: Path) -> None:
    pages = sorted(site.rglob("*.html"))
    assert len(pages) > 20
    for page in pages:
        text = page.read_text(encoding="utf-8")
        for address in Loaded(text).found:
            assert not re.match(r"(https?:)?//", address), (page.name, address)
        assert 'class="mermaid"' not in text, "the theme loads mermaid from a server"
        assert 'data-md-component="source"' not in text, "the theme asks the repository's server"
    for sheet in site.rglob("*.css"):
        assert not re.search(r"(url\(|@import )[\"']?(https?:)?//", sheet.read_text("utf-8")), sheet


def test_the_loads_of_a_page_are_found() -> None:
    page = '<script src="https://a/b.js"></script><a href="https://c"></a><link href="//d">'
    assert Loaded(page).found == ["https://a/b.js", "//d"]


def test_every_public_name_is_in_the_reference(site: Path) -> None:
    page = (site / "reference.html").read_text(encoding="utf-8")
    missing = [name for name in nacre.__all__ if f'id="nacre.{name}"' not in page]
    assert missing == []


def test_notebooks_are_pages(site: Path) -> None:
    for name in ("depths", "experts", "study"):
        assert "nacre" in (site / "notebooks" / f"{name}.html").read_text(encoding="utf-8")
    assert not list(site.rglob("*.ipynb"))
