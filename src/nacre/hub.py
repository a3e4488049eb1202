"""The Hugging Face hub, through its own client: what comes from there, what goes there.

Whatever the client raises becomes a `HubError` of one line.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any

from nacre.errors import NacreError
from nacre.folders import COMPOSITION, STAGE

PREFIX = "hf:"
LOG_IN = "log in with `hf auth login`"
WEIGHTS = ".safetensors"

SMALL = ("*.json", "*.txt", "*.model", "*.jinja")
"""Configuration and tokenizer: everything at the top of a repository but weights and code."""

# What a stage, a composition, a substrate or a tokenizer is made of.
PATTERNS = ("*.safetensors", "*.json", "*.txt", "*.model", "*.jinja", "*.py", "*.md")


class HubError(NacreError):
    """The hub, or the way to it, refused."""


def fetch(name: str, patterns: Sequence[str] = SMALL) -> Path:
    """Return the folder that holds the newest files of a repository that match, fetching them.

    So what comes from the hub is checked as what lies on the disk is, before anything reads it.
    Without a network it is what was fetched before. Raises OSError or ValueError where there is no
    such name, no network and nothing in the cache.
    """
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(name, allow_patterns=list(patterns), ignore_patterns=["*/*"]))


def fetch_whole(name: str, revision: str | None = None) -> Path:
    """Return the folder of a repository on the hub; what the client's cache has is not fetched.

    `name` may begin with "hf:". Raises `HubError`.
    """
    from huggingface_hub import snapshot_download

    name = name.removeprefix(PREFIX)
    with _calling(name):
        return Path(snapshot_download(name, revision=revision, allow_patterns=list(PATTERNS)))


@lru_cache
def fetch_grown(name: str) -> Path | None:
    """Return the folder of a stage or a composition on the hub, ledger and all.

    None for what nacre did not push and for what cannot be reached: it may be any model that
    transformers loads by its name.
    """
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(name, allow_patterns=[STAGE, COMPOSITION]))
    except Exception:  # who loads it by its name says why it cannot be
        return None
    grown = any((folder / record).is_file() for record in (STAGE, COMPOSITION))
    return fetch_whole(name) if grown else None


def check_login() -> None:
    """Raise `HubError` if the client knows no token to write with."""
    from huggingface_hub import get_token

    if get_token() is None:
        raise HubError(f"the Hugging Face hub is not open to you: there is no token; {LOG_IN}")


def send(
    name: str,
    files: Mapping[str, Path | bytes],
    message: str,
    *,
    private: bool = False,
    branch: str | None = None,
) -> None:
    """Make one commit of these files, by their names in the repository `name` (USER/NAME).

    The repository, and its branch (default: main), are made if need be. Weights that it holds
    beside these go from it, other files stay. A file of several names is sent once, one that the
    hub already has not at all. Raises `HubError`.
    """
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    check_login()
    api = HfApi()
    with _calling(name):
        api.create_repo(name, private=private or None, exist_ok=True)
        if branch is not None:
            api.create_branch(name, branch=branch, exist_ok=True)
        there = api.list_repo_files(name, revision=branch)
        stale = [path for path in there if path.endswith(WEIGHTS) and path not in files]
        added = {path: CommitOperationAdd(path, _content(what)) for path, what in files.items()}
        once = {_identity(what): added[path] for path, what in files.items()}
        api.preupload_lfs_files(name, list(once.values()), revision=branch)
        api.create_commit(
            name,
            [*added.values(), *(CommitOperationDelete(path) for path in stale)],
            commit_message=message,
            revision=branch,
        )


def _content(what: Path | bytes) -> str | bytes:
    return what if isinstance(what, bytes) else str(what)


def _identity(what: Path | bytes) -> Any:
    """Return what two names of one file have in common."""
    if isinstance(what, bytes):
        return what
    found = what.stat()
    return found.st_dev, found.st_ino


@contextmanager
def _calling(name: str) -> Iterator[None]:
    """Turn what the client raises about a repository into one line; it raises about anything."""
    try:
        yield
    except Exception as error:
        raise HubError(f"{name}: {_said(error)}") from None


def _said(error: Exception) -> str:
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    answer = getattr(error, "response", None)
    status = getattr(answer, "status_code", None)
    if status == 403:
        return f"the hub allows you no writing here; check the name, or {LOG_IN} as another user"
    if status == 401 or isinstance(error, RepositoryNotFoundError):
        return f"the hub has no such repository, or hides it; check the name, or {LOG_IN}"
    if isinstance(error, RevisionNotFoundError):
        return "the hub has no such revision of it; check its name"
    reasons = [str(each) or type(each).__name__ for each in (error, error.__cause__) if each]
    return " ".join(" ".join(reasons).split())[:300]
