"""What a trunk cache's folder holds, and how that is told from another cache and from damage."""

from __future__ import annotations

import contextlib
import dataclasses
import re
from dataclasses import dataclass
from pathlib import Path
from typing import get_args

from nacre.atomic import sync_folder
from nacre.growth import ledger
from nacre.growth.cache.records import Dtype, record_bytes
from nacre.untrusted import parse_json, read_bytes

MANIFEST = "manifest.json"
FORMAT = 1
FIX = "resume the run, which builds the cache again, or delete the folder"

_OURS = re.compile(
    r"manifest(-\d{5,})?\.json|segment-\d{5,}\.bin|\.(manifest(-\d{5,})?|segment-\d{5,})\.partial"
)


@dataclass(frozen=True)
class Identity:
    """What a cache holds. Two caches with equal identities hold the same records.

    `trunk` is a SHA-256 over every tensor under the crown, `depth` the blocks of that trunk,
    `corpus` the token store's fingerprint, `order` says which windows in which order
    (`Windows.order`), `windows` is the number of records, `context` T, `width` D.
    """

    trunk: str
    depth: int
    corpus: str
    order: str
    windows: int
    context: int
    width: int
    dtype: Dtype


def cache_bytes(identity: Identity) -> int:
    """Return the bytes of all records on disk; the manifest is not counted."""
    return identity.windows * record_bytes(identity.context, identity.width, identity.dtype)


@dataclass(frozen=True)
class Manifest:
    """`segments` maps the number of every complete segment to its SHA-256 (hex).

    `seconds` is the time that making them took, over all processes that did.
    """

    identity: Identity
    segment_windows: int
    segments: dict[int, str]
    seconds: float = 0.0

    def lists_the_same(self, other: Manifest) -> bool:
        """Tell whether both list segments of the same cache."""
        cache = (other.identity, other.segment_windows)
        return (self.identity, self.segment_windows) == cache

    @property
    def count(self) -> int:
        """The segments of a whole cache."""
        return -(-self.identity.windows // self.segment_windows)

    @property
    def record_bytes(self) -> int:
        """The bytes of one record."""
        return record_bytes(self.identity.context, self.identity.width, self.identity.dtype)

    def records(self, number: int) -> range:
        """Return the records of a segment."""
        begin = number * self.segment_windows
        return range(begin, min(begin + self.segment_windows, self.identity.windows))

    def fault(self, folder: Path, number: int, *, verify: bool) -> str | None:
        """Return what is wrong with a listed segment's file, None where nothing is."""
        path = folder / segment_name(number)
        expected = len(self.records(number)) * self.record_bytes
        if not path.is_file():
            return f"{path} is missing"
        if (found := path.stat().st_size) != expected:
            return f"{path} has {found:,} bytes instead of {expected:,}"
        if verify:
            try:
                sha = ledger.file_hash(path)
            except OSError as error:
                return f"{path} cannot be read: {error.strerror or error}"
            if sha != self.segments[number]:
                return f"{path} is damaged: its SHA-256 is not the one it was written with"
        return None


class Unreadable(Exception):
    """A manifest that is damaged or, where `format` is given, of another format."""

    def __init__(self, reason: str, format: int | None = None) -> None:
        super().__init__(reason)
        self.format = format


def manifest_name(part: int) -> str:
    """Return the name of the manifest that one of several builders writes; 0 is the cache's own."""
    return f"manifest-{part:05d}.json" if part else MANIFEST


def other_manifests(folder: Path) -> list[Path]:
    """Return the manifests of builders beside the first, which a finished cache has none of."""
    return sorted(folder.glob("manifest-*.json"))


def read_manifest(folder: Path, name: str = MANIFEST) -> Manifest:
    """Read the manifest; raises OSError or `Unreadable`."""
    text = read_bytes(folder / name)
    try:
        data = parse_json(text)
        found = data["format"]
        if type(found) is not int:
            raise TypeError
    except (ValueError, KeyError, TypeError):
        raise Unreadable(f"{MANIFEST} is damaged") from None
    if found != FORMAT:
        raise Unreadable(f"format {found}, this nacre writes {FORMAT}", found)
    try:
        identity = Identity(**data["identity"])
        segments = {int(number): sha for number, sha in data["segments"].items()}
        seconds = float(data.get("seconds", 0.0))
        manifest = Manifest(identity, data["segment_windows"], segments, seconds)
        sizes = [identity.depth, identity.windows, identity.context, identity.width]
        names = [identity.trunk, identity.corpus, identity.order, *segments.values()]
        sound = (
            all(type(size) is int and size >= 0 for size in [*sizes, manifest.segment_windows])
            and manifest.segment_windows > 0
            and all(isinstance(name, str) for name in names)
            and identity.dtype in get_args(Dtype)
            and all(0 <= number < manifest.count for number in segments)
        )
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError):
        sound = False
    if not sound:
        raise Unreadable(f"{MANIFEST} is damaged")
    return manifest


def read_identity(folder: Path) -> Identity | None:
    """Return what the cache in `folder` holds, None where there is no readable manifest."""
    try:
        return read_manifest(folder).identity
    except (OSError, Unreadable):
        return None


def build_seconds(folder: Path) -> float:
    """Return the seconds that making the cache in `folder` took, over all processes that did."""
    return read_manifest(folder).seconds


def faults(folder: Path) -> list[str]:
    """Read the segments that the cache in `folder` lists; return what is wrong with them.

    One without a manifest lists none: its build has not begun, or it is being deleted.
    """
    try:
        manifest = read_manifest(folder)
    except FileNotFoundError:
        return []
    except (OSError, Unreadable) as error:
        return [f"{folder}: {error}"]
    found = [manifest.fault(folder, number, verify=True) for number in manifest.segments]
    return [fault for fault in found if fault]


def drop(folder: Path) -> None:
    """Delete the cache in `folder`, the manifest first, so that no half of it passes for a cache.

    Files that are not a cache's stay, and with them the folder.
    """
    if not folder.is_dir():
        return
    if (folder / MANIFEST).exists():
        (folder / MANIFEST).unlink()
        sync_folder(folder)
    for path in cache_files(folder):
        path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):
        folder.rmdir()


def segment_name(number: int) -> str:
    """Return the name of a segment's file."""
    return f"segment-{number:05d}.bin"


def partial_path(path: Path) -> Path:
    """Return the name that a file has until it is whole."""
    return path.with_name(f".{path.stem}.partial")


def cache_files(folder: Path) -> list[Path]:
    """Return the files of a cache, whole or not, listed or not."""
    return sorted(path for path in folder.iterdir() if _OURS.fullmatch(path.name))


def difference(found: Identity, wanted: Identity) -> tuple[str, str, str] | None:
    """Return the first field that differs and both values, long ones shortened."""
    for field in dataclasses.fields(Identity):
        one, two = str(getattr(found, field.name)), str(getattr(wanted, field.name))
        if one != two:
            if one[:12] != two[:12]:
                one, two = (v if len(v) <= 16 else f"{v[:12]}..." for v in (one, two))
            return field.name, one, two
    return None
