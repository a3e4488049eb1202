"""Notebooks as pages of the site, without a further package; and their outputs, made anew.

`mkdocs build` loads this file as a hook: a file that ends in `.ipynb` becomes a page of Markdown.
`python tools/notebook_pages.py docs/notebooks/*.ipynb` runs notebooks and writes what they show
into them, in this interpreter: neither Jupyter nor a kernel is needed.
"""

from __future__ import annotations

import ast
import base64
import contextlib
import io
import json
import os
import re
import sys
import tempfile
from pathlib import Path
from typing import Any

Notebook = dict[str, Any]


def read(path: Path) -> Notebook:
    return json.loads(path.read_text(encoding="utf-8"))


def run(notebook: Notebook) -> Notebook:
    """Run the code cells of a notebook in order, in the current folder; fill in what they show.

    That is what they print, and the picture that the value of a cell's last line is.
    """
    names: dict[str, Any] = {}
    for number, cell in enumerate(code_cells(notebook), start=1):
        body = ast.parse("".join(cell["source"])).body
        last = body.pop() if body and isinstance(body[-1], ast.Expr) else None
        with contextlib.redirect_stdout(io.StringIO()) as printed:
            exec(compile(ast.Module(body, []), f"cell {number}", "exec"), names)
            value = (
                eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), names)
                if last
                else None
            )
        cell["execution_count"] = number
        cell["outputs"] = outputs(number, printed.getvalue(), value)
    return notebook


def code_cells(notebook: Notebook) -> list[dict[str, Any]]:
    return [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]


def outputs(number: int, printed: str, value: Any) -> list[dict[str, Any]]:
    """Return a cell's outputs as Jupyter writes them."""
    found: list[dict[str, Any]] = []
    if printed:
        text = printed.splitlines(keepends=True)
        found.append({"name": "stdout", "output_type": "stream", "text": text})
    if value is not None:
        shown: dict[str, Any] = {"text/plain": [f"<{type(value).__name__}>"]}
        if png := getattr(value, "_repr_png_", None):
            shown["image/png"] = base64.b64encode(png()).decode()
        found.append(
            {
                "data": shown,
                "execution_count": number,
                "metadata": {},
                "output_type": "execute_result",
            }
        )
    return found


def markdown(notebook: Notebook) -> str:
    """Return a notebook as Markdown: text as it is, code and what it shows as blocks."""
    parts: list[str] = []
    for cell in notebook["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(source)
            continue
        parts.append(f"```python\n{source}\n```")
        for output in cell["outputs"]:
            if output["output_type"] == "stream":
                parts.append(f"```text\n{''.join(output['text']).rstrip()}\n```")
            elif "image/png" in output["data"]:
                parts.append(f"![](data:image/png;base64,{output['data']['image/png']})")
    return "\n\n".join(parts) + "\n"


def on_files(files: Any, config: Any) -> Any:
    """Tell mkdocs that a notebook is a page."""
    from mkdocs.structure.files import File

    for file in list(files):
        if file.src_uri.endswith(".ipynb"):
            files.remove(file)
            page = re.sub(r"\.ipynb$", ".md", file.src_uri)
            text = markdown(read(Path(file.abs_src_path)))
            files.append(File.generated(config, page, content=text))
    return files


if __name__ == "__main__":
    for name in sys.argv[1:]:
        path, here = Path(name).resolve(), Path.cwd()
        notebook = read(path)
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            run(notebook)
            os.chdir(here)
        path.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
