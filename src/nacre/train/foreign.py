"""What a checkpoint's folder must be before `transformers` reads it.

Nothing of a checkpoint is executed, and it costs no more memory than its own files: a folder that
would make `transformers` run code, follow a path out of the folder, or build what no file holds is
refused with one message. Only configuration, index and the headers of weights are read here.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nacre import hub, model_config
from nacre.errors import CheckpointError, NacreError, one_line
from nacre.model_config import CONFIG, GENERATION
from nacre.untrusted import HEADER_BYTES, as_object, check_links, is_path, parse_json, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
ADAPTER = "adapter_config.json"

MOST_DIMENSIONS = 16
BUFFER_BYTES = 2**28
"""Of what a model makes for itself and no file holds, such as masks."""

BITS = {
    "BOOL": 8, "U8": 8, "I8": 8, "F8_E4M3": 8, "F8_E5M2": 8, "F8_E8M0": 8, "F8_E4M3FNUZ": 8,
    "F8_E5M2FNUZ": 8, "I16": 16, "U16": 16, "F16": 16, "BF16": 16, "I32": 32, "U32": 32, "F32": 32,
    "I64": 64, "U64": 64, "F64": 64, "C64": 64, "F4": 4, "F6_E2M3": 6, "F6_E3M2": 6,
}  # fmt: skip
"""Of the types in safetensors."""


@dataclass(frozen=True)
class Stored:
    """What the headers of a folder's weights say: how many tensors, of how many numbers in all.

    `packed` is true where there are bytes that may hold more numbers than one.
    """

    tensors: int
    numbers: int
    packed: bool


def place(named: str | Path, *, weights: bool = False) -> Path:
    """Return the checked folder of what is named, a folder here or a name on the hub.

    What the hub has is fetched first, its weights only where `weights` asks for them. Raises
    CheckpointError.
    """
    folder = Path(named)
    if isinstance(named, str) and not folder.exists() and not named.startswith((".", "/", "~")):
        folder = guarded(named, lambda: hub.fetch(named))
        check_folder(folder)
        if weights:
            files = [path.name for path in shards(folder)]
            folder = guarded(named, lambda: hub.fetch(named, [*hub.SMALL, *files]))
    check_folder(folder)
    return folder


def check_folder(folder: Path) -> None:
    """Refuse a folder whose files are not its own, or whose configuration asks for others.

    Raises CheckpointError; reads `config.json` and the index of shards.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder")
    if not (folder / CONFIG).is_file():
        raise CheckpointError(f"{folder}: holds no model ({CONFIG} is missing)")
    try:
        check_links(folder)
    except OSError as error:
        raise CheckpointError(f"{folder}: {error}") from None
    if (folder / ADAPTER).exists():
        fix = "merge the adapter into its model and save that"
        raise CheckpointError(f"{folder}: holds an adapter ({ADAPTER}), which is not loaded; {fix}")
    for name in (CONFIG, GENERATION):
        if (folder / name).exists():
            try:
                model_config.check(folder / name)
            except (OSError, ValueError) as error:
                raise CheckpointError(f"{folder}: cannot be loaded: {name}: {error}") from None
    weight_map(folder)


def _object(path: Path) -> dict[str, Any]:
    try:
        return as_object(read_json(path))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.parent}: cannot be loaded: {path.name}: {error}") from None


def weight_map(folder: Path) -> dict[str, str] | None:
    """Return the file of each tensor by the index of shards, None for a folder without an index.

    Raises CheckpointError for an index that is damaged, or names files that are not in the folder
    or no safetensors.
    """
    if not (folder / INDEX).exists():
        return None
    data = _object(folder / INDEX)
    if "weight_map" not in data:
        raise CheckpointError(f"{folder / INDEX}: damaged: lacks 'weight_map'")
    owners = data["weight_map"]
    if not isinstance(owners, dict):
        raise CheckpointError(f"{folder / INDEX}: weight_map is no mapping of tensors to files")
    for shard in owners.values():
        plain = isinstance(shard, str) and is_path(shard) and Path(shard).name == shard
        if not plain or "\\" in shard:
            raise CheckpointError(f"{folder / INDEX}: {shard!r} is no file of the folder")
        if not shard.endswith(".safetensors"):
            raise CheckpointError(f"{folder / INDEX}: {shard!r} is no file in safetensors")
    return owners


def shards(folder: Path) -> list[Path]:
    """Return the files that hold a folder's weights, by its index or by the usual name."""
    owners = weight_map(folder)
    names = [WEIGHTS] if owners is None else sorted(set(owners.values()))
    return [folder / name for name in names]


def check_weights(folder: Path, config: PreTrainedConfig, named: str | Path) -> None:
    """Refuse a configuration that describes more than the folder's weights.

    `transformers` would make up what is missing. Raises CheckpointError also for files that are
    missing or whose headers are damaged.
    """
    stored = stored_in(shards(folder))
    text = config.get_text_config()
    claimed = text.num_hidden_layers
    if claimed > stored.tensors:
        message = f"describes {claimed:,} blocks, the files hold {stored.tensors:,} tensors"
        raise CheckpointError(f"{named}: cannot be loaded: {CONFIG} {message}")
    model = guarded(named, lambda: empty(config))
    described = sum(parameter.numel() for parameter in model.parameters())
    numbers = stored.numbers * (16 if stored.packed else 1)
    made = sum(buffer.nbytes for buffer in model.buffers())
    if described > 2 * numbers + 2**20 or made > 8 * numbers + BUFFER_BYTES:
        message = f"describes {described:,} weights and {made:,} bytes of masks"
        held = f"the files hold {stored.numbers:,} numbers"
        raise CheckpointError(f"{named}: cannot be loaded: {CONFIG} {message}, {held}")


def empty(config: PreTrainedConfig) -> PreTrainedModel:
    """Return a model of this configuration without numbers, on the meta device."""
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def stored_in(files: Iterable[Path]) -> Stored:
    """Count what files of weights hold, by their headers; raise CheckpointError if one is damaged.

    The tensors of a sound file lie one after the other and fill it.
    """
    tensors = numbers = 0
    packed = False
    for path in files:
        for entry in read_header(path).values():
            tensors += 1
            numbers += math.prod(entry["shape"])
            packed = packed or BITS[entry["dtype"]] <= 8
    return Stored(tensors, numbers, packed)


def read_header(path: Path) -> dict[str, Any]:
    """Return the entries of a safetensors header: `dtype`, `shape`, `data_offsets` of each tensor.

    Raises CheckpointError for a header that is damaged, or larger than `HEADER_BYTES`.
    """
    where = f"{path.parent}: cannot be loaded: {path.name}"
    try:
        if not path.is_file():
            raise CheckpointError(f"{where} is missing")
        size = path.stat().st_size
        with path.open("rb") as file:
            begin = file.read(8)
            length = struct.unpack("<Q", begin)[0] if len(begin) == 8 else 0
            if not 2 <= length <= size - 8:
                raise CheckpointError(f"{where}: is damaged or cut off: its header does not fit")
            if length > HEADER_BYTES:
                message = f"its header has {length:,} bytes, at most {HEADER_BYTES:,} are read"
                raise CheckpointError(f"{where}: {message}")
            header = parse_json(file.read(length))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{where}: {error}") from None
    entries = dict(header) if isinstance(header, dict) else {}
    entries.pop("__metadata__", None)
    for name, entry in entries.items():
        if not _is_entry(entry, size - 8 - length):
            raise CheckpointError(f"{where}: the header's entry of {name!r} is damaged")
    return entries


def _is_entry(entry: Any, available: int) -> bool:
    """Say whether a tensor's entry is what safetensors writes, and its bytes are in the file."""
    try:
        shape, (begin, end), bits = entry["shape"], entry["data_offsets"], BITS[entry["dtype"]]
        if len(shape) > MOST_DIMENSIONS:
            return False
        whole = all(type(number) is int and number >= 0 for number in (*shape, begin, end))
        return whole and begin <= end <= available and math.prod(shape) * bits == 8 * (end - begin)
    except (KeyError, TypeError, ValueError):
        return False


def guarded(folder: str | Path, read: Callable[[], Any]) -> Any:
    """Return what `read` returns; raise CheckpointError for anything that `transformers` raises.

    A configuration can make it raise errors of every kind.
    """
    try:
        return read()
    except NacreError:
        raise
    except Exception as error:
        raise CheckpointError(f"{folder}: cannot be loaded: {one_line(error)}") from None
