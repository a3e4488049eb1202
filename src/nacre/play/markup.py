"""Pieces of HTML that the tabs share. Whatever comes from a file or a person is escaped here."""

from __future__ import annotations

import html
from collections.abc import Iterable

LONGEST_TEXT = 4000
"""Characters of a text that a person types; what is longer is refused before anything runs."""


def notice(text: str) -> str:
    """Return an error or a warning in words, a line of the text a line."""
    lines = "<br>".join(html.escape(line) for line in text.splitlines())
    return f'<div class="notice" role="alert">{lines}</div>'


def empty(title: str, advice: str, command: str = "") -> str:
    """Return what a tab shows that has nothing to show: why, and what to do."""
    code = f"<code>{html.escape(command)}</code>" if command else ""
    return (
        f'<div class="empty"><h2>{html.escape(title)}</h2><p>{html.escape(advice)}</p>{code}</div>'
    )


def waiting(what: str) -> str:
    """Return what stands where something is still being loaded or made."""
    return f'<p class="waiting" role="status">{html.escape(what)}</p>'


def token(text: str, classes: str, title: str, strength: float | None = None) -> str:
    """Return one token as a `<span>`; `strength` (0 to 1) is how much of its colour it has.

    Line ends are shown, and a token without text of its own (inside a character) is a dot.
    """
    shown = html.escape(text or "·").replace("\n", '<i class="end">↵</i>\n')
    style = "" if strength is None else f' style="--s:{max(0.0, min(1.0, strength)):.0%}"'
    return f'<span class="token {classes}"{style} title="{html.escape(title)}">{shown}</span>'


def tokens(spans: Iterable[str], label: str) -> str:
    """Return tokens as running text."""
    return (
        f'<div class="tokens" role="group" aria-label="{html.escape(label)}">{"".join(spans)}</div>'
    )


def details(summary: str, inside: str) -> str:
    """Return something that opens when it is asked for."""
    return f'<details class="more"><summary>{html.escape(summary)}</summary>{inside}</details>'


def section(title: str, about: str = "") -> str:
    """Return a heading with a line under it."""
    below = f"<p>{html.escape(about)}</p>" if about else ""
    return f'<div class="section"><h2>{html.escape(title)}</h2>{below}</div>'


def quoted(text: str) -> str:
    """Return a token's text for a tooltip or a table, with what cannot be seen made visible."""
    return f"“{text}”" if text.strip() and text.isprintable() else repr(text)
