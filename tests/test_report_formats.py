"""Tables as HTML, Markdown, CSV and LaTeX: every digit, every special character, intervals."""

from __future__ import annotations

import csv
import io
import shutil
import subprocess
from pathlib import Path

import pytest

from nacre.report import formats
from nacre.report.formats import Cell, escape_latex, to_csv, to_html, to_latex, to_markdown

ROWS = [
    {"arm": "50%_grown & ~co", "bits": Cell("1.234 (1.2 to 1.3)", 1.23456789, (1.2, 1.3))},
    {"arm": "[x] | <y>", "bits": Cell("–", None)},
]


def read(text: str) -> list[dict[str, str]]:
    return list(csv.DictReader(io.StringIO(text)))


def test_csv_has_every_digit_and_the_ends_of_intervals() -> None:
    assert read(to_csv(ROWS)) == [
        {"arm": "50%_grown & ~co", "bits": "1.23456789", "bits low": "1.2", "bits high": "1.3"},
        {"arm": "[x] | <y>", "bits": "", "bits low": "", "bits high": ""},
    ]
    third = 1 / 3
    (row,) = read(to_csv([{"a": Cell("0.33", third), "b": Cell("0", 0)}]))
    assert float(row["a"]) == third
    assert row == {"a": repr(third), "b": "0"}, "without intervals no columns for them"


def test_latex_is_a_booktabs_tabular() -> None:
    assert to_latex(ROWS).splitlines() == [
        r"% \usepackage{booktabs}",
        r"\begin{tabular}{lr}",
        r"\toprule",
        r"arm & bits \\",
        r"\midrule",
        r"50\%\_grown \& \textasciitilde{}co & 1.234 (1.2 to 1.3) \\",
        r"{[}x] \textbar{} \textless{}y\textgreater{} & -- \\",
        r"\bottomrule",
        r"\end{tabular}",
    ]


@pytest.mark.parametrize(
    ("text", "latex"),
    [
        (r"\end{x}", r"\textbackslash{}end\{x\}"),
        ("5% of $3 #1 a_b^c", r"5\% of \$3 \#1 a\_b\textasciicircum{}c"),
        ("3–4, 0.5 [−0.1, -0.2]", "3--4, 0.5 [$-$0.1, $-$0.2]"),
        ("-0.3 to 1.9e-06", "$-$0.3 to 1.9e-06"),
        ("2026-01-02, f-x, a--b", "2026-01-02, f-x, a-{}-b"),
        ("two\nlines", "two lines"),
        ("«русский» 中", "«русский» 中"),
    ],
)
def test_latex_prints_the_text(text: str, latex: str) -> None:
    assert escape_latex(text) == latex


@pytest.mark.skipif(not shutil.which("pdflatex"), reason="needs pdflatex")
def test_latex_takes_a_table(tmp_path: Path) -> None:
    rows = [{"*": r'*\ { } $ & # % _ ~ ^ < > | " – − × --', "n": Cell("-0.1", -0.1)}, *(
        {"*": row["arm"], "n": row["bits"]} for row in ROWS
    )]  # fmt: skip
    (tmp_path / "table.tex").write_text(to_latex(rows), encoding="utf-8")
    (tmp_path / "paper.tex").write_text(
        r"\documentclass{article}\usepackage{booktabs}\begin{document}\input{table}\end{document}"
    )
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "paper.tex"]
    made = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert made.returncode == 0, made.stdout


def test_markdown_and_html_keep_cells_whole() -> None:
    lines = to_markdown(ROWS).splitlines()
    assert lines[:2] == ["| arm | bits |", "| --- | --- |"]
    assert lines[3] == r"| [x] \| <y> | – |"
    assert "<td>[x] | &lt;y&gt;</td>" in to_html(ROWS)
    assert to_html([], empty="none") == "<p>none</p>"


def test_an_empty_table_has_no_files() -> None:
    assert formats.files("arms", []) == {}
    assert list(formats.files("arms", ROWS)) == ["arms.csv", "arms.tex"]
