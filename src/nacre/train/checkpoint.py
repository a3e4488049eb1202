"""Checkpoints on disk: stages sharded by growth step.

A stage is a stock Hugging Face folder. Its weights stand in one shard for the substrate, one for
the blocks of each growth step, and one for norm and head; a shard that did not change is the same
file as in the stage before (a hard link where the file system has them). Whatever is written is
written under a temporary name and renamed, so a reader never sees half of it.
"""

from __future__ import annotations

import shutil
from collections.abc import Collection, Sequence
from functools import partial
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel

from nacre import hub
from nacre.errors import CheckpointError, FingerprintError
from nacre.models import stock
from nacre.train import foreign
from nacre.train.files import RECORD, link, read_record, stages, write_json
from nacre.train.foreign import INDEX

SUBSTRATE_SHARD = "substrate.safetensors"
HEAD_SHARD = "head.safetensors"


def blocks_shard(stage: int) -> str:
    """Return the shard name of the blocks that a stage added; 0 is a checkpoint grown from."""
    return f"blocks-{stage:02d}.safetensors"


def shard_of(model: PreTrainedModel, growth: Sequence[tuple[int, int]]) -> dict[str, str]:
    """Map every tensor name to its shard.

    `growth` lists (stage, blocks added) in order; what is neither block, norm nor head belongs to
    the substrate's shard.
    """
    parts = stock.find_parts(model)
    owners = [blocks_shard(stage) for stage, count in growth for _ in range(count)]
    assert len(owners) == len(parts.blocks), "every block belongs to one growth step"
    shards: dict[str, str] = {}
    for name in model.state_dict():
        index = stock.block_index(parts, name)
        if index is not None:
            shards[name] = owners[index]
        elif name.startswith((f"{parts.head_name}.", f"{parts.norm_name}.")):
            shards[name] = HEAD_SHARD
        else:
            shards[name] = SUBSTRATE_SHARD
    return shards


def save_weights(
    model: PreTrainedModel,
    folder: Path,
    growth: Sequence[tuple[int, int]],
    *,
    unchanged: Collection[str] = (),
    previous: Path | None = None,
) -> list[str]:
    """Write the model's shards, index and config into a folder; return the shards that were linked.

    A shard whose tensors are all in `unchanged` is linked from the `previous` stage, if that has
    the same ones in it. Where a shard changes, what did not is read from there: a trunk may have
    left memory, or lie there in lower precision.
    """
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    shards = shard_of(model, growth)
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    linked: list[str] = []
    owners_below = _shards(previous) if previous is not None else {}
    for shard in dict.fromkeys(shards.values()):
        names = [name for name, owner in shards.items() if owner == shard]
        kept = [name for name in names if name in unchanged and name in owners_below]
        same = [name for name, owner in owners_below.items() if owner == shard]
        if previous is not None and sorted(kept) == sorted(names) == sorted(same):
            link((previous / shard).resolve(), folder / shard)  # the hub's cache has symlinks
            linked.append(shard)
        else:
            tensors = {name: state[name].detach().cpu() for name in names if name not in kept}
            for name in kept:
                assert previous is not None
                with safe_open(previous / owners_below[name], "pt") as file:
                    tensors[name] = file.get_tensor(name)
            save_file(tensors, folder / shard, metadata={"format": "pt"})
            shutil.copymode(folder / "config.json", folder / shard)
    total = sum(tensor.numel() * _stored_size(tensor) for tensor in state.values())
    write_json(folder / INDEX, {"metadata": {"total_size": total}, "weight_map": shards})
    if model.generation_config is not None:
        model.generation_config.save_pretrained(folder)
    return linked


def _shards(folder: Path) -> dict[str, str]:
    """Return the shard that holds each tensor of a stage; without an index it is one file."""
    if (owners := foreign.weight_map(folder)) is not None:
        return owners
    if not (folder / foreign.WEIGHTS).exists():
        return {}
    with safe_open(folder / foreign.WEIGHTS, "pt") as file:
        return dict.fromkeys(file.keys(), foreign.WEIGHTS)


def _stored_size(tensor: torch.Tensor) -> int:
    """Return the bytes of a number in a checkpoint: fp32, whatever a trunk computes in."""
    return 4 if tensor.is_floating_point() else tensor.element_size()


def load_model(folder: str | Path) -> PreTrainedModel:
    """Load a stage or any Hugging Face causal LM, in fp32, from safetensors only.

    No code of a checkpoint is run. Raises `CheckpointError` if the folder holds no such model.
    """
    place = foreign.place(folder, weights=True)
    config = _config(place, folder)
    foreign.check_weights(place, config, folder)
    model, loaded = foreign.guarded(
        folder,
        lambda: AutoModelForCausalLM.from_pretrained(
            place,
            config=config,
            dtype=torch.float32,
            use_safetensors=True,
            trust_remote_code=False,
            local_files_only=True,
            output_loading_info=True,
        ),
    )
    wrong = sorted(map(str, [*loaded["missing_keys"], *loaded["mismatched_keys"]]))
    if wrong:
        raise CheckpointError(f"{folder}: {len(wrong)} tensors are missing, first {wrong[0]}")
    return model


def has_weights(folder: Path) -> bool:
    """Tell whether a folder holds weights in safetensors."""
    return any(folder.glob("*.safetensors"))


def check_has_weights(folder: Path) -> None:
    """Raise `CheckpointError` for a folder without weights in safetensors."""
    if not has_weights(folder):
        fix = "save it again with safe serialization"
        raise CheckpointError(f"{folder}: holds no weights in safetensors; {fix}")


def check_tokenizer(folder: Path, fingerprint: str) -> None:
    """Raise `FingerprintError` if a stage was not made with the tokenizer that lies in its folder.

    `fingerprint` is that tokenizer's. What nacre did not grow says nothing of it.
    """
    record = read_record(folder) if (folder / RECORD).is_file() else {}
    recorded = record.get("tokenizer", fingerprint)
    if recorded != fingerprint:
        what, fix = f"the tokenizer in {folder}", f"restore the tokenizer's files in {folder}"
        raise FingerprintError(what, f"{recorded[:12]} (stage.json)", fingerprint[:12], fix)


def load_config(folder: str | Path) -> PreTrainedConfig:
    """Read a checkpoint's configuration without its weights; raises as `load_model` does."""
    return _config(foreign.place(folder), folder)


def _config(place: Path, named: str | Path) -> PreTrainedConfig:
    read = partial(
        AutoConfig.from_pretrained, place, trust_remote_code=False, local_files_only=True
    )
    return foreign.guarded(named, read)


def newest(path: str | Path) -> str | Path:
    """Return the checkpoint meant by a path: a run means its newest stage.

    "hf:NAME" means a folder of that name, or what nacre pushed there, fetched. What else is no
    folder is returned as it is, less "hf:": it may be a model on the hub that transformers loads.
    Raises `CheckpointError` for a run without a finished stage.
    """
    if str(path).startswith(hub.PREFIX):
        path = str(path).removeprefix(hub.PREFIX)
        if not Path(path).is_dir():
            return hub.fetch_grown(path) or path
    if not (Path(path) / "plan.yaml").exists():
        return path
    finished = stages(Path(path))
    if not finished:
        raise CheckpointError(
            f"{path}: this run has no finished stage yet; continue it with "
            f"`nacre grow --resume --out {path}`"
        )
    return finished[-1]


def newest_folder(path: str | Path) -> Path:
    """Return the folder of the checkpoint meant by a path, as `newest`; any "hf:NAME" is fetched.

    Raises `HubError` for what cannot be fetched, and as `newest`.
    """
    found = Path(newest(path))
    if str(path).startswith(hub.PREFIX) and not found.is_dir():
        return hub.fetch_whole(str(path))
    return found
