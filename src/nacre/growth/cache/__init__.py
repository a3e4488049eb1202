"""Trunk caches on disk: the trunk's output for every window of a stage's text.

    FOLDER/manifest.json        identity, windows a segment, SHA-256 of every complete segment
    FOLDER/segment-00000.bin    consecutive records; all segments but the last are equally long

A record is one window's `h_TD` (see `nacre.growth.cache.records`). The manifest lists a segment
only once its file is whole on the disk. What computes the outputs, and when to use a cache, is
not decided here.
"""

from __future__ import annotations

from nacre.growth.cache.builder import CacheBuilder
from nacre.growth.cache.manifest import (
    Identity,
    build_seconds,
    cache_bytes,
    drop,
    faults,
    read_identity,
)
from nacre.growth.cache.reader import TrunkCache
from nacre.growth.cache.records import Dtype, record_bytes

__all__ = [
    "CacheBuilder",
    "Dtype",
    "Identity",
    "TrunkCache",
    "build_seconds",
    "cache_bytes",
    "drop",
    "faults",
    "read_identity",
    "record_bytes",
]
