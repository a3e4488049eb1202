"""The default corpus: about 2 MB of English that every Python installation carries.

The help topics of `pydoc` and the docstrings of the standard library. Modules are parsed, never
imported. The text depends on the Python version alone.
"""

from __future__ import annotations

import ast
import functools
import inspect
import sysconfig
import warnings
from collections.abc import Iterator
from pathlib import Path

ABOUT_BYTES = 2_100_000
"""The corpus's size, known without reading it; exact to about a tenth."""

_LIMIT = 2_500_000  # bytes; 3.11 to 3.13 stay below
# Tests, installed packages, and programs whose docstrings say little.
_SKIPPED = {
    "__phello__",
    "__pycache__",
    "dist-packages",
    "encodings",
    "idlelib",
    "lib2to3",
    "pydoc_data",
    "site-packages",
    "test",
    "tests",
    "turtledemo",
}


@functools.cache
def texts() -> tuple[tuple[str, str], ...]:
    """Return (name, text) per help topic and module, sorted; empty where Python has neither."""
    found: list[tuple[str, str]] = []
    size = 0
    for name, text in [*_topics(), *_docstrings()]:
        size += len(text.encode())
        if size > _LIMIT:
            break
        found.append((name, text))
    return tuple(found)


def _topics() -> Iterator[tuple[str, str]]:
    try:
        from pydoc_data.topics import topics
    except ImportError:  # some distributions leave it out
        return
    for name in sorted(topics):
        text = topics[name].strip()
        if text:
            yield f"topic {name}", text + "\n"


def _docstrings() -> Iterator[tuple[str, str]]:
    root = Path(sysconfig.get_path("stdlib"))
    for path in sorted(root.rglob("*.py")):
        parts = path.relative_to(root).parts
        if any(part in _SKIPPED or part.startswith(("test_", "config-")) for part in parts):
            continue
        documentation = _module_docstrings(path)
        if documentation:
            yield "module " + ".".join(parts).removesuffix(".py"), documentation


def _module_docstrings(path: Path) -> str:
    """Join a module's docstrings in the order of the source; empty when it has none."""
    try:
        source = path.read_bytes()
        if b'"""' not in source and b"'''" not in source:
            return ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in somebody's string
            tree = ast.parse(source)
    except (OSError, SyntaxError, ValueError):
        return ""
    found = [inspect.cleandoc(text).strip() for text in _walk(tree.body)]
    text = "\n\n".join(piece for piece in found if piece)
    return text.encode(errors="ignore").decode() + "\n" if text else ""


def _walk(body: list[ast.stmt]) -> Iterator[str]:
    """Yield the docstring of `body`, then those of the classes and functions in it."""
    first = body[0] if body else None
    if (
        isinstance(first, ast.Expr)
        and isinstance(first.value, ast.Constant)
        and isinstance(first.value.value, str)
    ):
        yield first.value.value
    for statement in body:
        if isinstance(statement, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _walk(statement.body)
        elif isinstance(statement, ast.If | ast.Try):
            for inner in (statement.body, statement.orelse):
                yield from (text for text in _walk(inner))
