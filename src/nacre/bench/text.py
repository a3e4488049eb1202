"""The English that suites work on."""

from __future__ import annotations

import argparse
import inspect


def english(quick: bool) -> list[str]:
    """Return documents: the default corpus (about 2 MB), or quickly one of about 100 kB."""
    if quick:
        return [inspect.getsource(argparse)]
    from nacre.data import embedded

    return [text for _, text in embedded.texts()]
