from __future__ import annotations

import contextlib
import dataclasses
import errno
import gc
import hashlib
import itertools
import json
import os
import random
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from nacre.errors import CheckpointError, FingerprintError
from nacre.growth.cache import (
    CacheBuilder,
    Dtype,
    Identity,
    TrunkCache,
    build_seconds,
    cache_bytes,
    drop,
    read_identity,
    record_bytes,
)
from nacre.growth.cache.records import decode, encode

T, D, BATCH, WINDOWS = 4, 8, 2, 11  # with SEGMENT: segments of 4, 4 and 3 records
DTYPES: tuple[Dtype, ...] = ("fp32", "bf16", "fp8")
LARGEST = 448.0  # of float8_e4m3fn
OTHER: dict[str, Any] = {
    "trunk": "b" * 64,
    "depth": 3,
    "corpus": "d" * 64,
    "order": "f" * 64,
    "windows": 12,
    "context": 5,
    "width": 9,
    "dtype": "bf16",
}


def identity(dtype: Dtype = "fp32", **other: Any) -> Identity:
    made = Identity("a" * 64, 2, "c" * 64, "e" * 64, WINDOWS, T, D, dtype)
    return dataclasses.replace(made, **other)


def outputs(records: range) -> torch.Tensor:
    """Return the trunk's made-up output `[B, T, D]` for some windows, the same every time."""
    generator = torch.Generator().manual_seed(1)
    everything = torch.randn(WINDOWS, T, D, generator=generator) * 10
    return everything.to(torch.bfloat16).float()[records.start : records.stop]


def parts(records: range) -> Iterator[torch.Tensor]:
    return iter(outputs(records).split(BATCH))


def builder(
    folder: Path,
    wanted: Identity | None = None,
    batch: int = BATCH,
    part: tuple[int, int] = (0, 1),
) -> CacheBuilder:
    wanted = wanted or identity()
    segment = 2 * BATCH * record_bytes(wanted.context, wanted.width, wanted.dtype)
    return CacheBuilder(folder, wanted, batch_windows=batch, segment_bytes=segment, part=part)


def build(folder: Path, wanted: Identity | None = None) -> list[range]:
    """Build what is missing and return it."""
    built = []
    with builder(folder, wanted) as cache:
        for records in cache.missing():
            cache.write(records, parts(records))
            built.append(records)
        cache.finish()
    return built


def content(folder: Path) -> dict[str, bytes]:
    """Return what every file holds; the manifest without the time that it took."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    if "manifest.json" in found:
        taken = rb'"seconds": [^,}\s]+'
        found["manifest.json"] = re.sub(taken, b'"seconds": 0', found["manifest.json"])
    return found


def segment(folder: Path, number: int) -> Path:
    return folder / f"segment-{number:05d}.bin"


def listed(folder: Path) -> set[int]:
    manifest = json.loads((folder / "manifest.json").read_text())
    return {int(number) for number in manifest["segments"]}


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "run" / "cache"


@pytest.fixture
def reference(tmp_path: Path) -> dict[str, bytes]:
    """What an uninterrupted build leaves."""
    build(tmp_path / "reference")
    return content(tmp_path / "reference")


@pytest.mark.parametrize("dtype", DTYPES)
def test_sizes_are_those_of_the_files(folder: Path, dtype: Dtype) -> None:
    build(folder, identity(dtype))
    assert record_bytes(T, D, dtype) == {"fp32": 128, "bf16": 64, "fp8": 48}[dtype]
    sizes = [segment(folder, number).stat().st_size for number in range(3)]
    assert sizes == [records * record_bytes(T, D, dtype) for records in (4, 4, 3)]
    assert sum(sizes) == cache_bytes(identity(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_any_slots_in_any_order_come_back(folder: Path, dtype: Dtype) -> None:
    build(folder, identity(dtype))
    expected = decode(encode(outputs(range(WINDOWS)), dtype), T, D, dtype)
    assert expected.dtype == (torch.float32 if dtype == "fp32" else torch.bfloat16)
    if dtype != "fp8":
        assert torch.equal(expected.float(), outputs(range(WINDOWS)))
    cache = TrunkCache.open(folder, identity(dtype))
    generator = np.random.default_rng(0)
    for size in (0, 1, 3, WINDOWS, 40):
        slots = generator.integers(0, WINDOWS, size)
        read = cache.read(slots)
        assert read.dtype == expected.dtype
        assert torch.equal(read, expected[torch.from_numpy(slots)])
    out = torch.empty(2, T, D, dtype=expected.dtype)
    assert cache.read(np.array([10, 0]), out) is out
    assert torch.equal(out, expected[[10, 0]])
    cache.close()
    cache.close()


def test_a_slot_that_is_none_is_an_index_error(folder: Path) -> None:
    build(folder)
    cache = TrunkCache.open(folder, identity())
    for slot in (-1, WINDOWS):
        with pytest.raises(IndexError, match="11 windows"):
            cache.read(np.array([0, slot]))
    cache.close()


def test_bf16_numbers_survive_bf16_bit_for_bit() -> None:
    every = torch.arange(2**16, dtype=torch.int32).to(torch.uint16).view(torch.bfloat16)
    finite = every[torch.isfinite(every.float())][: 254 * 256].view(1, 254, 256)
    read = decode(encode(finite, "bf16"), 254, 256, "bf16")
    assert torch.equal(read.view(torch.uint16), finite.view(torch.uint16))
    wide = encode(finite.float(), "fp32")
    assert torch.equal(decode(wide, 254, 256, "fp32").to(torch.bfloat16), finite)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_fp8_stays_within_its_stated_bounds(dtype: torch.dtype) -> None:
    h_BTD = torch.randn(2, 500, 512).to(dtype)
    h_BTD *= torch.logspace(-30, 30, 500, dtype=dtype)[None, :, None]  # of one token: one size
    h_BTD[0] *= torch.logspace(-8, 0, 512, dtype=dtype)  # and within a token, many
    read = decode(encode(h_BTD, "fp8"), 500, 512, "fp8")
    h_BTD, error = h_BTD.double(), (read.double() - h_BTD.double()).abs()
    amax_BT1 = h_BTD.abs().amax(-1, keepdim=True)
    assert (error <= (1 / 28 + 1 / 256) * amax_BT1 * (1 + 1e-6)).all()
    near = torch.maximum((1 / 16 + 1 / 256) * h_BTD.abs(), amax_BT1 / 2**18)
    assert (error <= near * (1 + 1e-6)).all()
    assert (error / amax_BT1).max() > 1 / 32  # the bound is tight


def test_fp8_scales_are_per_token_and_reach_the_largest_number() -> None:
    h_BTD = torch.zeros(1, 4, 8)
    h_BTD[0, 0, 3] = -3.0
    h_BTD[0, 1] = 448.0
    h_BTD[0, 3, 0] = 1e-44  # whose scale would be zero
    records_BR = encode(h_BTD, "fp8")
    scales = records_BR[0, :16].clone().view(torch.float32)
    smallest = torch.finfo(torch.float32).tiny
    assert torch.equal(scales, torch.tensor([3 / LARGEST, 1.0, 1.0, smallest]))
    values = records_BR[:, 16:].view(torch.float8_e4m3fn).float().view(4, 8)
    assert values[0, 3] == -LARGEST
    read = decode(records_BR, 4, 8, "fp8")
    assert read.isfinite().all()
    assert (read[0, 2] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
def test_numbers_that_are_not_finite_are_refused(folder: Path, dtype: Dtype, bad: float) -> None:
    h_BTD = torch.ones(4, T, D)
    h_BTD[1, 2, 3] = bad
    with pytest.raises(ValueError, match="not finite"):
        encode(h_BTD, dtype)
    cache = builder(folder, identity(dtype))
    cache.write(range(4), [h_BTD])
    with pytest.raises(ValueError, match="not finite"):
        cache.finish()
    assert set(content(folder)) == {"manifest.json"}


def test_a_number_too_large_for_bf16_is_refused() -> None:
    with pytest.raises(ValueError, match="not finite"):
        encode(torch.full((1, 1, 2), 3.4e38), "bf16")


@pytest.mark.parametrize("field", OTHER)
def test_each_field_of_the_identity_is_compared(folder: Path, field: str) -> None:
    build(folder)
    wanted = identity(**{field: OTHER[field]})
    old, new = (str(getattr(one, field))[:12] for one in (identity(), wanted))
    with pytest.raises(FingerprintError) as caught:
        TrunkCache.open(folder, wanted)
    message = str(caught.value)
    assert f": {field} does not match: expected {new}" in message
    assert f"found {old}" in message
    assert "resume the run" in message

    with builder(folder, wanted) as cache:
        assert cache.done == 0
        assert f"another {field}: {old}" in str(cache.replaced)
        assert f"now {new}" in str(cache.replaced)
    assert set(content(folder)) == {"manifest.json"}
    assert read_identity(folder) == wanted


def test_the_first_field_that_differs_is_named_and_alike_values_are_shown_whole(
    folder: Path,
) -> None:
    build(folder)
    wanted = identity(corpus="c" * 63 + "d", order="other")
    with pytest.raises(FingerprintError, match=f"corpus .* expected {'c' * 63}d, found {'c' * 64}"):
        TrunkCache.open(folder, wanted)


def test_batch_windows_decide_the_segments(folder: Path) -> None:
    build(folder)
    with builder(folder, batch=1) as cache:  # 4 is a multiple of 1: kept
        assert (cache.replaced, cache.done) == (None, WINDOWS)
    with builder(folder, batch=3) as cache:
        assert "segments of 4 windows, no multiple of a batch of 3" in str(cache.replaced)
        assert list(cache.missing()) == [range(3), range(3, 6), range(6, 9), range(9, 11)]
    whole = CacheBuilder(folder, identity(), batch_windows=5, segment_bytes=1)
    assert list(whole.missing()) == [range(5), range(5, 10), range(10, 11)]


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"format": 2}, "format 2, this nacre writes 1"),
        ({"format": None}, "manifest.json is damaged"),
        ({"identity": {"depth": 2}}, "manifest.json is damaged"),
        ({"segment_windows": 0}, "manifest.json is damaged"),
        ({"segment_windows": "4"}, "manifest.json is damaged"),
        ({"segments": {"3": "0" * 64}}, "manifest.json is damaged"),
        ({"segments": {"0": None}}, "manifest.json is damaged"),
        ({"segments": []}, "manifest.json is damaged"),
        ("[1, 2]", "manifest.json is damaged"),
        ('{"format": 1', "manifest.json is damaged"),
    ],
)
def test_a_manifest_that_cannot_be_read_is_another_cache(
    folder: Path, reference: dict[str, bytes], change: dict[str, Any] | str, reason: str
) -> None:
    build(folder)
    path = folder / "manifest.json"
    if isinstance(change, dict):
        change = json.dumps({**json.loads(path.read_text()), **change})
    path.write_text(change)
    assert read_identity(folder) is None
    refusal = FingerprintError if reason.startswith("format") else CheckpointError
    with pytest.raises(refusal, match=r"format does not match|damaged") as caught:
        TrunkCache.open(folder, identity())
    assert "resume the run" in str(caught.value)
    with builder(folder) as cache:
        assert cache.replaced == f"the trunk cache could not be read: {reason}"
        assert cache.done == 0
    assert len(build(folder)) == 3
    assert content(folder) == reference


def test_what_is_no_cache_is_refused(folder: Path) -> None:
    assert read_identity(folder) is None
    with pytest.raises(CheckpointError, match="is no trunk cache: No such file"):
        TrunkCache.open(folder, identity())
    with builder(folder) as cache:
        cache.write(range(4), parts(range(4)))
    with pytest.raises(CheckpointError, match="is incomplete: 1 of 3 segments"):
        TrunkCache.open(folder, identity())


def test_drop_leaves_nothing_but_what_is_not_its_own(folder: Path) -> None:
    drop(folder)
    build(folder)
    (folder / ".segment-00007.partial").write_bytes(b"half")
    (folder / "notes.txt").write_text("mine")
    drop(folder)
    assert content(folder) == {"notes.txt": b"mine"}
    (folder / "notes.txt").unlink()
    build(folder)
    drop(folder)
    assert not folder.exists()


def test_segments_without_a_manifest_are_never_a_cache(
    folder: Path, reference: dict[str, bytes]
) -> None:
    build(folder)
    (folder / "manifest.json").unlink()
    with builder(folder) as cache:
        assert cache.replaced == "the trunk cache had no manifest.json"
        assert cache.done == 0
    assert len(build(folder)) == 3
    assert content(folder) == reference


def truncate(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[17] ^= 4
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("damage", "message"),
    [(truncate, "511 bytes instead of 512"), (flip, "SHA-256"), (Path.unlink, "is missing")],
)
def test_damage_is_found_and_only_it_is_built_again(
    folder: Path, reference: dict[str, bytes], damage: Callable[[Path], None], message: str
) -> None:
    build(folder)
    damage(segment(folder, 1))
    with pytest.raises(CheckpointError, match=rf"segment-00001\.bin .*{message}.*resume the run"):
        TrunkCache.open(folder, identity())
    with builder(folder) as cache:
        assert (cache.damaged, cache.done, cache.replaced) == (1, 7, None)
        assert list(cache.missing()) == [range(4, 8)]
    assert not segment(folder, 1).exists()
    assert listed(folder) == {0, 2}
    assert build(folder) == [range(4, 8)]
    assert content(folder) == reference


def test_what_the_disk_cannot_read_is_damaged(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: Any) -> None:
        raise OSError(errno.EIO, os.strerror(errno.EIO))

    build(folder)
    monkeypatch.setattr(hashlib, "file_digest", broken)
    with pytest.raises(CheckpointError, match="cannot be read: Input/output error"):
        TrunkCache.open(folder, identity())
    with builder(folder) as cache:
        assert (cache.damaged, cache.done) == (3, 0)


def test_sizes_are_checked_without_verification_too(folder: Path) -> None:
    build(folder)
    flip(segment(folder, 0))
    TrunkCache.open(folder, identity(), verify=False).close()
    truncate(segment(folder, 2))
    with pytest.raises(CheckpointError, match=r"segment-00002\.bin has 383 bytes"):
        TrunkCache.open(folder, identity(), verify=False)


def test_writing_what_is_not_a_missing_segment_is_refused(folder: Path) -> None:
    with builder(folder) as cache:
        for wrong in (range(2), range(2, 6), range(8, 12)):
            with pytest.raises(ValueError, match="no segment that is missing"):
                cache.write(wrong, parts(wrong))
        cache.write(range(4), parts(range(4)))
        with pytest.raises(ValueError, match="no segment that is missing"):
            cache.write(range(4), parts(range(4)))


@pytest.mark.parametrize(
    "wrong",
    [
        [torch.ones(2, T, D)],
        [torch.ones(3, T, D), torch.ones(2, T, D)],
        [torch.ones(4, T, D + 1)],
        [torch.ones(4, T, D, dtype=torch.int64)],
    ],
)
def test_parts_that_are_not_the_segment_leave_it_missing(
    folder: Path, reference: dict[str, bytes], wrong: list[torch.Tensor]
) -> None:
    with builder(folder) as cache:
        with pytest.raises(ValueError, match=r"parts of|a part of"):
            cache.write(range(4), wrong)
        for records in cache.missing():
            cache.write(records, itertools.chain([torch.ones(0, T, D)], parts(records)))
        cache.finish()
    assert content(folder) == reference


def test_parts_of_any_size_and_kind_give_the_same_bytes(
    folder: Path, reference: dict[str, bytes]
) -> None:
    with builder(folder) as cache:
        for records in cache.missing():
            weights = outputs(records).to(torch.bfloat16).requires_grad_()
            strided = weights.transpose(1, 2).contiguous().transpose(1, 2)
            cache.write(records, strided.split([1, len(records) - 1]))
        cache.finish()
    assert content(folder) == reference


def test_an_error_of_the_caller_leaves_no_thread_and_no_temporary_file(folder: Path) -> None:
    def failing() -> Iterator[torch.Tensor]:
        yield torch.ones(2, T, D)
        raise KeyboardInterrupt

    def interrupted() -> None:
        with builder(folder) as cache:
            cache.write(range(4), parts(range(4)))
            cache.write(range(4, 8), failing())

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert set(content(folder)) == {"manifest.json", "segment-00000.bin"}
    assert listed(folder) == {0}
    assert not any("cache" in thread.name for thread in threading.enumerate())


def test_an_empty_cache_is_complete(folder: Path) -> None:
    assert build(folder, identity(windows=0)) == []
    cache = TrunkCache.open(folder, identity(windows=0))
    assert cache.read(np.empty(0, np.int64)).shape == (0, T, D)
    cache.close()


class Disk:
    """Fails at the n-th call of one operation, and if `dead` at every one after it.

    A dead disk is what a killed process leaves: no cleaning up happens after that moment. A write
    that fails has written half of its bytes.
    """

    OPERATIONS = ("open", "write", "fsync", "replace", "unlink")

    def __init__(self, operation: str, nth: int, dead: bool, code: int) -> None:
        self.operation, self.nth, self.dead, self.code = operation, nth, dead, code
        self.calls, self.failed = 0, False
        self.real = {name: getattr(os, name) for name in self.OPERATIONS}

    def call(self, name: str, *arguments: Any, **options: Any) -> Any:
        reads = name == "open" and not arguments[1] & os.O_WRONLY
        if name == self.operation and not reads and not self.failed:
            self.calls += 1
            if self.calls == self.nth:
                self.failed = True
                if name == "write":
                    self.real[name](arguments[0], arguments[1][: len(arguments[1]) // 2])
                raise OSError(self.code, os.strerror(self.code))
        if self.failed and self.dead and not reads:
            raise OSError(errno.EIO, "the disk is dead")
        return self.real[name](*arguments, **options)

    @contextlib.contextmanager
    def mounted(self) -> Iterator[None]:
        with pytest.MonkeyPatch.context() as patch:
            for name in self.OPERATIONS:
                patch.setattr(os, name, lambda *a, _name=name, **o: self.call(_name, *a, **o))
            yield


@pytest.mark.parametrize("dead", [True, False], ids=["killed", "failed"])
@pytest.mark.parametrize(
    ("operation", "calls"), [("open", 7), ("write", 10), ("fsync", 11), ("replace", 7)]
)
def test_a_build_cut_off_anywhere_goes_on(
    tmp_path: Path, reference: dict[str, bytes], operation: str, calls: int, dead: bool
) -> None:
    # a segment: 2 parts, an fsync; each of 4 manifests: a write, 2 fsyncs (its own, the folder's)
    for nth in range(1, calls + 1):
        folder = tmp_path / str(nth)
        disk = Disk(operation, nth, dead, errno.ENOSPC)
        with disk.mounted(), pytest.raises(OSError) as caught:
            build(folder)
        assert caught.value.errno == errno.ENOSPC
        if not dead:
            assert not list(folder.glob(".*")), "a failure that is survived leaves nothing half"
        before = {n: segment(folder, n).stat() for n in listed_or_none(folder)}
        again = build(folder)
        assert len(again) == 3 - len(before), "what is finished is not built again"
        for number, state in before.items():
            assert segment(folder, number).stat().st_mtime_ns == state.st_mtime_ns
        assert content(folder) == reference
    disk = Disk(operation, calls + 1, dead, errno.ENOSPC)
    with disk.mounted():
        build(tmp_path / "whole")
    assert disk.calls == calls, "every call was made to fail"


def listed_or_none(folder: Path) -> set[int]:
    return listed(folder) if (folder / "manifest.json").exists() else set()


def test_damage_that_cannot_be_dropped_is_dropped_later(
    folder: Path, reference: dict[str, bytes]
) -> None:
    for operation, nth in [("open", 1), ("write", 1), ("fsync", 1), ("replace", 1), ("unlink", 1)]:
        build(folder)
        flip(segment(folder, 1))
        disk = Disk(operation, nth, True, errno.EIO)
        with disk.mounted(), pytest.raises(OSError, match="Input/output"):
            builder(folder)
        assert build(folder) == [range(4, 8)]
        assert content(folder) == reference


def test_a_cache_dropped_halfway_is_no_cache(folder: Path, reference: dict[str, bytes]) -> None:
    for nth in range(1, 5):
        build(folder)
        disk = Disk("unlink", nth, True, errno.EIO)
        with disk.mounted(), pytest.raises(OSError, match="Input/output"):
            drop(folder)
        left = len(content(folder))
        assert left == 5 - nth
        assert (read_identity(folder) is None) == (nth > 1)
        assert len(build(folder)) == (0 if nth == 1 else 3)
        assert content(folder) == reference


def test_a_full_disk_reaches_the_caller_at_the_next_segment(folder: Path) -> None:
    tried = []
    disk = Disk("write", 4, False, errno.ENOSPC)  # the first part of the second segment is the 5th
    with disk.mounted():
        cache = builder(folder)
        with pytest.raises(OSError, match="No space left") as caught:  # noqa: PT012
            for records in cache.missing():
                tried.append(records)
                cache.write(records, parts(records))
            cache.finish()
        assert caught.value.errno == errno.ENOSPC
        with pytest.raises(OSError, match="No space left") as again, cache:
            pass
        assert again.value is caught.value
    assert len(tried) > 1, "the disk was full in the first segment"
    assert set(content(folder)) == {"manifest.json", "segment-00000.bin"}


KILLED = """
import os, random, signal, sys, time
from pathlib import Path
sys.path.insert(0, sys.argv[2])
import test_cache

random.seed(int(sys.argv[3]))
for number in range(int(sys.argv[4])):
    folder = Path(sys.argv[1]) / str(number)
    child = os.fork()
    if not child:
        test_cache.build(folder)
        os._exit(0)
    while not folder.exists():
        time.sleep(0.0002)
    time.sleep(random.uniform(0, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
def test_a_killed_build_goes_on(tmp_path: Path, reference: dict[str, bytes]) -> None:
    count, seed = 12, random.SystemRandom().randrange(10**6)
    command = [sys.executable, "-c", KILLED, tmp_path, Path(__file__).parent, seed, count]
    subprocess.run([str(word) for word in command], check=True, timeout=120)
    for number in range(count):
        folder = tmp_path / str(number)
        finished = listed_or_none(folder)
        again = build(folder)
        assert len(again) == 3 - len(finished)
        assert content(folder) == reference, f"seed {seed}, build {number}"


@pytest.fixture
def cache(folder: Path) -> Iterator[TrunkCache]:
    build(folder)
    cache = TrunkCache.open(folder, identity())
    yield cache
    cache.close()


def reader_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "cache-reader"]


@pytest.mark.parametrize("ahead", [1, 2, 50])
def test_a_stream_gives_what_reads_give(cache: TrunkCache, ahead: int) -> None:
    generator = np.random.default_rng(3)
    batches = [generator.integers(0, WINDOWS, size) for size in (3, 3, 0, 5, 1, 3)]
    streamed = list(cache.stream(batches, ahead=ahead))
    assert len(streamed) == len(batches)
    for slots, h_BTD in zip(batches, streamed, strict=True):
        assert torch.equal(h_BTD, outputs(range(WINDOWS))[torch.from_numpy(slots)])
    assert not reader_threads()


@pytest.mark.parametrize("taken", [0, 1, 5])
def test_leaving_an_endless_stream_leaves_no_thread(cache: TrunkCache, taken: int) -> None:
    stream = cache.stream(np.array([n % WINDOWS]) for n in itertools.count())
    seen = [next(stream) for _ in range(taken)]
    assert torch.equal(torch.cat([torch.empty(0, T, D), *seen]), outputs(range(taken)))
    assert len(reader_threads()) == (taken > 0)
    del stream
    gc.collect()
    assert not reader_threads()


def test_a_stream_reads_no_further_ahead_than_told(cache: TrunkCache) -> None:
    reads: list[int] = []
    read = cache.read
    cache.read = lambda slots, out=None: reads.append(1) or read(slots, out)  # type: ignore
    stream = cache.stream((np.array([0]) for _ in itertools.count()), ahead=3)
    for taken in (1, 2, 3):
        next(stream)
        deadline = time.monotonic() + 20
        while len(reads) < taken + 3 and time.monotonic() < deadline:
            time.sleep(0.001)
        time.sleep(0.03)  # in which one too many would be read
        assert len(reads) == taken + 3
    stream.close()  # type: ignore
    assert len(reads) == 6


def test_an_error_in_the_thread_reaches_the_consumer(cache: TrunkCache) -> None:
    def failing() -> Iterator[np.ndarray]:
        yield np.array([1])
        raise RuntimeError("of the caller")

    stream = cache.stream(failing())
    assert torch.equal(next(stream), outputs(range(1, 2)))
    with pytest.raises(RuntimeError, match="of the caller"):
        next(stream)
    with pytest.raises(IndexError):
        list(cache.stream([np.array([WINDOWS])]))
    assert not reader_threads()


@pytest.mark.parametrize("change", [truncate, flip, Path.unlink])
def test_a_file_that_changes_while_open_is_never_read(
    cache: TrunkCache, folder: Path, change: Callable[[Path], None]
) -> None:
    change(segment(folder, 2))
    with pytest.raises(CheckpointError, match=r"segment-00002\.bin was changed or deleted"):
        cache.read(np.array([0, 10]))
    with pytest.raises(CheckpointError, match="resume the run"):
        list(cache.stream([np.array([9])]))
    assert torch.equal(cache.read(np.array([0])), outputs(range(1)))


def test_short_reads_are_continued_and_an_early_end_is_refused(
    cache: TrunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, calls = os.preadv, []

    def in_small_pieces(file: int, buffers: list[memoryview], offset: int) -> int:
        calls.append(1)
        return real(file, [buffers[0][:50]], offset)

    slots = np.array([3, 2, 5, 4, 3])
    monkeypatch.setattr(os, "preadv", in_small_pieces)
    assert torch.equal(cache.read(slots), outputs(range(WINDOWS))[torch.from_numpy(slots)])
    assert len(calls) == 5 * 3

    def ending(file: int, buffers: list[memoryview], offset: int) -> int:
        return 0 if offset else in_small_pieces(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", ending)
    with pytest.raises(CheckpointError, match=r"segment-00000\.bin was changed"):
        cache.read(np.array([0]))


def test_neighbours_in_a_segment_are_one_read(
    cache: TrunkCache, monkeypatch: pytest.MonkeyPatch
) -> None:
    real, reads = os.preadv, []

    def counted(file: int, buffers: list[memoryview], offset: int) -> int:
        reads.append((offset // 128, len(buffers)))
        return real(file, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    cache.read(np.array([2, 3, 4, 5, 9, 1]))
    assert reads == [(1, 3), (0, 2), (1, 1)]
    reads.clear()
    monkeypatch.setattr("nacre.growth.cache.reader._BUFFERS", 3)
    assert torch.equal(cache.read(np.arange(4)), outputs(range(4)))
    assert reads == [(0, 3), (3, 1)]


def test_a_cache_survives_the_renaming_of_its_folder(cache: TrunkCache, folder: Path) -> None:
    folder.rename(folder.with_name("elsewhere"))
    assert torch.equal(cache.read(np.arange(WINDOWS)), outputs(range(WINDOWS)))


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="needs /proc")
def test_reading_maps_no_file(cache: TrunkCache, folder: Path) -> None:
    stream = cache.stream(np.arange(WINDOWS) for _ in itertools.count())
    for _ in range(3):
        next(stream)
        cache.read(np.arange(WINDOWS))
        assert str(folder) not in Path("/proc/self/maps").read_text()
    stream.close()  # type: ignore


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_pinned_batches_and_parts_on_the_device(folder: Path) -> None:
    with builder(folder, identity("fp8")) as cache:
        for records in cache.missing():
            with torch.cuda.stream(torch.cuda.Stream()):
                cache.write(records, [part.cuda() * 2 / 2 for part in parts(records)])
        cache.finish()
    opened = TrunkCache.open(folder, identity("fp8"))
    expected = decode(encode(outputs(range(WINDOWS)), "fp8"), T, D, "fp8")
    for h_BTD in opened.stream([np.arange(WINDOWS)] * 5, pin_memory=True):
        assert h_BTD.is_pinned()
        assert torch.equal(h_BTD.cuda(non_blocking=True).cpu(), expected)
    opened.close()


def test_two_builders_make_one_cache(folder: Path, reference: dict[str, bytes]) -> None:
    with builder(folder, part=(0, 2)) as first, builder(folder, part=(1, 2)) as second:
        for each in (first, second):
            for records in each.missing():
                each.write(records, parts(records))
            each.finish()
        first.adopt()
    assert content(folder) == reference


def test_what_another_builder_listed_before_a_crash_is_kept(folder: Path) -> None:
    with builder(folder, part=(0, 2)), builder(folder, part=(1, 2)) as second:
        for records in second.missing():
            second.write(records, parts(records))
        second.finish()
    with builder(folder) as again:
        assert listed(folder) == {1}
        assert [records.start // (2 * BATCH) for records in again.missing()] == [0, 2]
    assert not (folder / "manifest-00001.json").exists()


def test_the_time_of_several_builders_adds_up(folder: Path) -> None:
    def slow(records: range) -> Iterator[torch.Tensor]:
        time.sleep(0.05)
        return parts(records)

    started = time.perf_counter()
    for _ in range(3):  # one segment each
        with builder(folder) as cache:
            records = next(cache.missing())
            cache.write(records, slow(records))
    spent = time.perf_counter() - started
    assert 3 * 0.05 <= build_seconds(folder) <= spent
    assert build(folder) == []
    assert 3 * 0.05 <= build_seconds(folder) <= spent, "nothing was made again"
