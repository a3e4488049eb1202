"""A table in every form that people take it in: HTML, Markdown, CSV and LaTeX.

A table is a sequence of rows, each a mapping from the column's title to its cell; all rows have the
same titles. What a `Cell` was made from goes into the CSV, its text into the other forms.
"""

from __future__ import annotations

import csv
import html
import io
import re
from collections.abc import Mapping, Sequence
from typing import Any

Value = str | int | float | None
Rows = Sequence[Mapping[str, Any]]


class Cell(str):
    """A cell's text, as people read it, with the value it was made from and an interval's ends."""

    value: Value
    interval: tuple[float, float] | None

    def __new__(cls, text: str, value: Value, interval: Sequence[float] | None = None) -> Cell:
        """Return a cell; `value` is None where nothing is known, whatever stands there instead."""
        cell = super().__new__(cls, text)
        cell.value = value
        cell.interval = None if interval is None else (interval[0], interval[1])
        return cell


def to_html(rows: Rows, code: Sequence[str] = (), empty: str = "") -> str:
    """Return a table that scrolls sideways on a narrow screen, or a line where it is empty.

    The columns `code` are shown as code.
    """
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


def to_markdown(rows: Rows) -> str:
    """Return a table in Markdown, without a line break at its end."""
    head = list(rows[0])
    lines = [head, ["---"] * len(head), *([row[name] for name in head] for row in rows)]
    escaped = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in escaped)


def to_csv(rows: Rows) -> str:
    """Return a table as CSV with every digit of what its cells were made from.

    Beside a column that has intervals stand their ends, "TITLE low" and "TITLE high".
    """
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    wide = [name for name in rows[0] if any(_interval(row[name]) for row in rows)]
    ends = {name: (f"{name} low", f"{name} high") if name in wide else () for name in rows[0]}
    writer.writerow([title for name in rows[0] for title in (name, *ends[name])])
    for row in rows:
        line: list[Any] = []
        for name in rows[0]:
            cell = row[name]
            line.append(cell.value if isinstance(cell, Cell) else cell)
            line += (_interval(cell) or (None, None)) if name in wide else ()
        writer.writerow(line)
    return text.getvalue()


def _interval(cell: Any) -> tuple[float, float] | None:
    return cell.interval if isinstance(cell, Cell) else None


def to_latex(rows: Rows) -> str:
    r"""Return a table as a `tabular` that `\input` takes; it needs the package booktabs.

    Columns of numbers stand to the right, those of text to the left.
    """
    sides = "".join("r" if _is_numbers([row[name] for row in rows]) else "l" for name in rows[0])
    head, *body = (_latex_row(line) for line in [list(rows[0]), *(row.values() for row in rows)])
    lines = [
        r"% \usepackage{booktabs}",
        rf"\begin{{tabular}}{{{sides}}}",
        r"\toprule", head, r"\midrule", *body, r"\bottomrule",
        r"\end{tabular}",
    ]  # fmt: skip
    return "\n".join(lines) + "\n"


def _is_numbers(cells: Sequence[str]) -> bool:
    values = [cell.value if isinstance(cell, Cell) else cell for cell in cells]
    return not any(isinstance(value, str) for value in values)


def _latex_row(cells: Sequence[str] | Any) -> str:
    line = " & ".join(map(escape_latex, cells))
    # After \\ and \midrule a star or a bracket would be their argument.
    return (f"{{{line[0]}}}{line[1:]}" if line[:1] in ("[", "*") else line) + r" \\"


LATEX = str.maketrans({
    "\\": r"\textbackslash{}", "{": r"\{", "}": r"\}", "$": r"\$", "&": r"\&", "#": r"\#",
    "%": r"\%", "_": r"\_", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}",
    "<": r"\textless{}", ">": r"\textgreater{}", "|": r"\textbar{}", '"': r"\symbol{34}",
    "–": "--", "—": "---", "−": "$-$", "×": r"$\times$",
})  # fmt: skip
"""What LaTeX takes for a command, or sets otherwise in its oldest font encoding."""


def escape_latex(text: str) -> str:
    """Return plain text as LaTeX that prints it; line breaks become spaces, minus signs signs."""
    apart = re.sub("-(?=-)", "\0", " ".join(text.split()))  # two hyphens would be a dash
    signed = re.sub(r"(?<!\w)-(?=\d)", "−", apart)
    return signed.translate(LATEX).replace("\0", "-{}")


def files(name: str, rows: Rows) -> dict[str, str]:
    """Return a table as the files `NAME.csv` and `NAME.tex` beside a page; none if it is empty."""
    return {f"{name}.csv": to_csv(rows), f"{name}.tex": to_latex(rows)} if rows else {}
