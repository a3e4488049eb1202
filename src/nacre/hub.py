"""Names on the Hugging Face hub: fetched into its cache, then read as any folder.

So what comes from the hub is checked as what lies on the disk is, before anything reads it.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
"""Configuration and tokenizer: everything at the top of a repository but weights and code."""


def fetch(name: str, patterns: Sequence[str] = SMALL) -> Path:
    """Return the folder that holds the newest files of a repository that match, fetching them.

    Without a network it is what was fetched before. Raises OSError or ValueError where there is no
    such name, no network and nothing in the cache.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))
