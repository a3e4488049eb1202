"""Text from anywhere, as documents, token shards and resumable batches."""

from __future__ import annotations

from nacre.data.corpus import DEFAULT, Document, Inventory, check, read
from nacre.data.loader import Loader, LoaderState, validation_batches
from nacre.data.sampling import sample
from nacre.data.shards import TokenStore, tokenize

__all__ = [
    "DEFAULT",
    "Document",
    "Inventory",
    "Loader",
    "LoaderState",
    "TokenStore",
    "check",
    "read",
    "sample",
    "tokenize",
    "validation_batches",
]
