"""What every page of a report is made of: pictures for any screen, tables, the page around them."""

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

from matplotlib.figure import Figure

from nacre.errors import CheckpointError
from nacre.report.canvas import DARK, LIGHT, Theme
from nacre.train.files import new_folder


@dataclass(frozen=True)
class Picture:
    """A chart as PNG for light and dark, wide and narrow screens, and what it shows in words."""

    name: str
    images: Mapping[tuple[Theme, bool], bytes]
    text: str


def render(name: str, draw: Callable[[Theme, bool], Figure], text: str) -> Picture:
    """Draw a chart for every kind of screen."""
    kinds = [(theme, wide) for theme in (LIGHT, DARK) for wide in (True, False)]
    return Picture(name, {kind: png(draw(*kind)) for kind in kinds}, text)


def png(figure: Figure) -> bytes:
    """Render a figure; nothing in the bytes depends on the time or the version of a library."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", metadata={"Software": None})
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


def table(rows: Sequence[Mapping[str, str]], code: Sequence[str] = (), empty: str = "") -> str:
    """Return a table that scrolls sideways on a narrow screen, or a line where it is empty."""
    if not rows:
        return f"<p>{empty}</p>"
    head = "".join(f'<th scope="col">{html.escape(name)}</th>' for name in rows[0])
    body = "".join(
        "<tr>"
        + "".join(
            f"<td><code>{html.escape(cell)}</code></td>"
            if name in code
            else f"<td>{html.escape(cell)}</td>"
            for name, cell in row.items()
        )
        + "</tr>"
        for row in rows
    )
    return (
        '<div class="scroll" tabindex="0"><table>'
        f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>"
    )


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

    `others` are further files, by name. Raises CheckpointError if the folder cannot be written.
    """
    try:
        with new_folder(target) as partial:
            for drawn in pictures:
                (partial / f"{drawn.name}.png").write_bytes(drawn.images[LIGHT, True])
            for name, text in others.items():
                (partial / name).write_text(text, encoding="utf-8")
            (partial / "index.html").write_text(page, encoding="utf-8")
    except OSError as error:
        raise CheckpointError(f"{target}: cannot be written: {error.strerror or error}") from None
    return target / "index.html"
