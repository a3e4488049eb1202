"""What every page of a report is made of: pictures for any screen, the page around them."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from string import Template
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from nacre.errors import CheckpointError
from nacre.report.canvas import DARK, LIGHT, Theme
from nacre.train.files import new_folder


@dataclass(frozen=True)
class Picture:
    """A chart as PNG for light and dark, wide and narrow screens, and what it shows in words.

    `paper` is the one that is light and wide, for SVG.
    """

    name: str
    images: Mapping[tuple[Theme, bool], bytes]
    text: str
    paper: Figure


def render(name: str, draw: Callable[[Theme, bool], Figure], text: str) -> Picture:
    """Draw a chart for every kind of screen."""
    kinds = [(theme, wide) for theme in (LIGHT, DARK) for wide in (True, False)]
    figures = {kind: draw(*kind) for kind in kinds}
    images = {kind: png(figure) for kind, figure in figures.items()}
    return Picture(name, images, text, figures[LIGHT, True])


def png(figure: Figure) -> bytes:
    """Render a figure; nothing in the bytes depends on the time or the version of a library."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
    return buffer.getvalue()


def svg(figure: Figure) -> bytes:
    """Render a figure as SVG, its text as outlines: it needs no font. The bytes are as of `png`."""
    buffer = io.BytesIO()
    with rc_context({"svg.hashsalt": "nacre"}):
        figure.savefig(buffer, format="svg", metadata={"Creator": None, "Date": None})
    return buffer.getvalue()


def picture(drawn: Picture) -> str:
    """Return a `<picture>` that holds a chart for light and dark, wide and narrow screens."""
    media = {
        (DARK, False): "(prefers-color-scheme: dark) and (max-width: 40rem)",
        (DARK, True): "(prefers-color-scheme: dark)",
        (LIGHT, False): "(max-width: 40rem)",
    }
    sources = "".join(
        f'<source media="{rule}" srcset="{_data(drawn.images[key])}">'
        for key, rule in media.items()
    )
    fallback = f'<img src="{_data(drawn.images[LIGHT, True])}" alt="{html.escape(drawn.text)}">'
    return f"<picture>{sources}{fallback}</picture>"


def _data(image: bytes) -> str:
    return "data:image/png;base64," + base64.b64encode(image).decode("ascii")


def figure(drawn: Picture, caption: str = "") -> str:
    """Return a picture with a caption, which is HTML."""
    below = f"\n<figcaption>{caption}</figcaption>" if caption else ""
    return f"<figure>{picture(drawn)}{below}</figure>"


def tiles(figures: Mapping[str, str]) -> str:
    """Return headline figures, by what they are."""
    cells = "".join(
        f"<div><dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd></div>"
        for name, value in figures.items()
    )
    return f'<dl class="tiles">{cells}</dl>'


def pairs(values: Mapping[str, Any]) -> str:
    """Return names and values as a definition list."""
    items = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(str(value))}</dd>"
        for name, value in values.items()
    )
    return f'<dl class="pairs">{items}</dl>'


def document(template: str, title: str, **parts: str) -> str:
    """Return a whole page: the body `template` with its parts, which are HTML."""
    shell, body = (
        resources.files("nacre.report").joinpath(name).read_text(encoding="utf-8")
        for name in ("page.html", template)
    )
    inside = Template(body).substitute(parts)
    return Template(shell).substitute(title=html.escape(title), body=inside)


def write_folder(
    target: Path, page: str, pictures: Sequence[Picture], others: Mapping[str, str]
) -> Path:
    """Write a report anew, as a whole or not at all, and return its `index.html`.

    Beside it stand the pictures as PNG and SVG; `others` are further files, by name. Raises
    CheckpointError if the folder cannot be written.
    """
    try:
        with new_folder(target) as partial:
            for drawn in pictures:
                (partial / f"{drawn.name}.png").write_bytes(drawn.images[LIGHT, True])
                (partial / f"{drawn.name}.svg").write_bytes(svg(drawn.paper))
            for name, text in others.items():
                (partial / name).write_text(text, encoding="utf-8")
            (partial / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target / "index.html"
