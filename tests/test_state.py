"""The state of a running stage: it comes back exactly, or the one before it does."""

from __future__ import annotations

import hashlib
import json
import os
import pickle
from pathlib import Path

import pytest
import torch

from nacre.errors import CheckpointError
from nacre.train import state as states

PROGRESS = dict.fromkeys(states.PROGRESS, 0) | {
    "stage": 2,
    "step": 7,
    "best": 1.25,
    "cursor": {"epoch": 0},
    "history": [],
}
TENSORS = "shard-00001-model-00001-of-00001.safetensors"


@pytest.fixture
def state(tmp_path: Path) -> tuple[Path, dict[str, torch.Tensor]]:
    tensors = {
        "weight.a": torch.randn(3, 2),
        "step.a": torch.tensor(7.0),
        "random.0": torch.get_rng_state(),
    }
    states.save(tmp_path / "state", tensors, PROGRESS)
    return tmp_path / "state", tensors


def test_a_state_comes_back_exactly(state: tuple) -> None:
    folder, tensors = state
    saved = states.load(folder)
    assert saved is not None
    assert saved.progress == PROGRESS
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    saved.read(found)
    assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())


def test_a_tensor_that_a_state_does_not_hold(state: tuple) -> None:
    folder, tensors = state
    saved = states.load(folder)
    assert saved is not None
    with pytest.raises(CheckpointError, match=r"state: cannot be read: .*exp_avg\.a"):
        saved.read({**tensors, "exp_avg.a": torch.zeros(3, 2)})


def test_a_state_says_what_it_holds(state: tuple) -> None:
    saved = states.load(state[0])
    assert saved is not None
    assert saved.holds("random.0")
    assert not saved.holds("random.1")


def test_a_state_is_replaced_whole_and_cleared(state: tuple) -> None:
    folder, tensors = state
    states.save(folder, tensors, {**PROGRESS, "step": 8})
    saved = states.load(folder)
    assert saved is not None
    assert saved.progress["step"] == 8
    names = sorted(path.name for path in folder.parent.iterdir())
    assert names == ["state", "state.previous"]
    states.clear(folder)
    assert states.load(folder) is None
    assert list(folder.parent.iterdir()) == []


def test_a_crash_between_the_two_renames_loses_nothing(state: tuple) -> None:
    folder, *_ = state
    folder.rename(folder.with_name("state.previous"))
    saved = states.load(folder)
    assert saved is not None
    assert saved.progress == PROGRESS


def test_no_state_is_no_error(tmp_path: Path) -> None:
    assert states.load(tmp_path / "state") is None


@pytest.mark.parametrize(
    ("name", "damage"),
    [
        (name, damage)
        for name in (TENSORS, "progress.json")
        for damage in ("truncate", "garbage", "empty", "remove")
        if (name, damage) != ("progress.json", "remove")  # then there is no saved state
    ],
)
def test_a_damaged_state_is_refused(name: str, damage: str, state: tuple) -> None:
    folder, *_ = state
    path = folder / name
    data = path.read_bytes()
    if damage == "remove":
        path.unlink()
    else:
        kinds = {"truncate": data[: len(data) // 2], "garbage": b"\x93garbage", "empty": b""}
        path.write_bytes(kinds[damage])
    with pytest.raises(CheckpointError) as caught:
        states.load(folder)
    assert str(folder) in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("damage", ["truncate", "flip", "remove"])
@pytest.mark.parametrize("name", [TENSORS, "progress.json"])
def test_from_a_damaged_state_the_one_before_goes_on(name: str, damage: str, state: tuple) -> None:
    folder, tensors = state
    states.save(folder, tensors, {**PROGRESS, "step": 8})
    path = folder / name
    data = bytearray(path.read_bytes())
    if damage == "remove":
        path.unlink()
    elif damage == "truncate":
        path.write_bytes(data[: len(data) // 2])
    else:
        data[len(data) // 2] ^= 0x40
        path.write_bytes(data)
    saved = states.load(folder)
    assert saved is not None
    assert saved.progress["step"] == 7
    if (name, damage) != ("progress.json", "remove"):
        assert str(folder) in str(saved.damaged)


def test_no_flipped_bit_in_the_record_changes_it(state: tuple) -> None:
    folder, *_ = state
    path = folder / "progress.json"
    data = path.read_bytes()
    for place in range(len(data)):
        damaged = bytearray(data)
        damaged[place] ^= 1 << place % 8
        path.write_bytes(damaged)
        try:
            saved = states.load(folder)
        except CheckpointError:
            continue
        assert saved is not None
        assert saved.progress == PROGRESS, f"byte {place}: white space at most"


def test_damaged_states_are_refused_with_what_to_do(state: tuple) -> None:
    folder, tensors = state
    states.save(folder, tensors, PROGRESS)
    for each in (folder, folder.with_name("state.previous")):
        (each / TENSORS).write_bytes(b"")
    with pytest.raises(CheckpointError) as caught:
        states.load(folder)
    assert str(caught.value) == (
        f"{folder}: damaged: {TENSORS} is not what was saved (restore it, or delete "
        f"{folder} and {folder}.previous to begin the stage anew)"
    )


@pytest.mark.parametrize("without", ["skipped", "the hash of progress.json"])
def test_a_state_of_another_version_is_not_called_damaged(without: str, state: tuple) -> None:
    folder, tensors = state
    older = {key: value for key, value in PROGRESS.items() if key != without}
    states.save(folder, tensors, older)
    if without != "skipped":
        record = json.loads((folder / "progress.json").read_text())
        del record["sha256"]["progress.json"]
        (folder / "progress.json").write_text(json.dumps(record))
    with pytest.raises(CheckpointError) as caught:
        states.check(folder)
    assert str(caught.value) == f"{folder}: another version of nacre wrote it, without {without}"


def test_a_flipped_bit_in_weights_is_noticed(state: tuple) -> None:
    folder, *_ = state
    path = folder / TENSORS
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(CheckpointError, match="is not what was saved"):
        states.load(folder)


def resigned(folder: Path, name: str, data: bytes) -> None:
    """Change a file of a state and the hash that its record has of it."""
    (folder / name).write_bytes(data)
    record = json.loads((folder / states.RECORD).read_text())
    record["sha256"][name] = hashlib.sha256(data).hexdigest()
    (folder / states.RECORD).write_text(json.dumps(record))


def test_a_file_that_was_not_saved_is_not_read(state: tuple) -> None:
    folder, _ = state
    (folder / "more.safetensors").write_bytes((folder / TENSORS).read_bytes())
    with pytest.raises(CheckpointError, match=r"more\.safetensors was not saved with the others"):
        states.check(folder)


def test_a_pickle_in_the_place_of_tensors_is_not_loaded(state: tuple, tmp_path: Path) -> None:
    class Touch:
        def __reduce__(self) -> tuple:
            return os.mkdir, (str(tmp_path / "ran"),)

    folder, _ = state
    resigned(folder, TENSORS, pickle.dumps(Touch()))
    with pytest.raises(CheckpointError, match="header does not fit"):
        states.check(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["../x", "a/b", "x" * 300, "\0", ""])
def test_a_hash_of_what_is_no_file_of_the_state(name: str, state: tuple) -> None:
    folder, _ = state
    record = json.loads((folder / states.RECORD).read_text())
    record["sha256"][name] = "0" * 64
    (folder / states.RECORD).write_text(json.dumps(record))
    with pytest.raises(CheckpointError, match="damaged: lacks the hashes of its files"):
        states.check(folder)
