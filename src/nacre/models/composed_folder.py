"""Where the folder of a composition is: here, or on the hub."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import snapshot_download

HUB_OPTIONS = ("revision", "cache_dir", "token", "local_files_only", "force_download")


def local_folder(name: Any, options: Mapping[str, Any]) -> Path:
    """Return the folder of that name; what is no folder here is fetched from the hub, all of it.

    `options` are those of `from_pretrained`; what is known of the hub among them counts. Raises
    what the hub's client raises.
    """
    folder = Path(name)
    if folder.is_dir() or folder.is_absolute() or str(name).startswith("."):
        return folder
    known = {key: options[key] for key in HUB_OPTIONS if options.get(key) is not None}
    return Path(snapshot_download(str(name), **known))
