"""The long fuzz campaign: python benchmarks/fuzz.py [--inputs 1000000] [--seed 0] [--only NAME ...]

Damaged files of every kind that nacre reads, each read as the library does, in this process. A
`NacreError` is a refusal; any other error is a crash, more than 5 s of the processor (or 60 s of
waiting) a hang, more than 500 MiB a case of memory. What went wrong is printed at once, and its
first inputs are kept in --keep.

    --coverage NAME    let atheris (where it is installed) draw the inputs of one target
"""

from __future__ import annotations

import argparse
import logging
import math
import os
import pickle
import platform
import random
import sys
import tempfile
import time
import warnings
from collections import Counter
from importlib import metadata
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "fuzz"))

EVERY_SECONDS = 20
BATCH = 200
PACKAGES = ("torch", "transformers", "tokenizers", "safetensors", "pydantic", "pyyaml")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--inputs", type=int, default=1_000_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--keep", type=Path, default=None)
    parser.add_argument("--coverage", default=None)
    asked = parser.parse_args()
    warnings.simplefilter("ignore")
    logging.disable(logging.CRITICAL)
    os.environ |= {"HF_HUB_OFFLINE": "1", "RUST_BACKTRACE": "0"}
    place = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=place) as folder:
        if asked.coverage:
            guided(asked.coverage, Path(folder) / "all")
        else:
            campaign(asked, Path(folder) / "all")


def campaign(asked: argparse.Namespace, root: Path) -> None:
    import torch
    from attempt import attempt
    from targets import make_all

    torch.set_num_threads(1)
    targets = {n: t for n, t in make_all(root).items() if not asked.only or n in asked.only}
    total = sum(target.weight for target in targets.values())
    draws = {name: random.Random(f"{asked.seed} {name}") for name in targets}
    due = {name: math.ceil(asked.inputs * t.weight / total) for name, t in targets.items()}
    found = {name: Counter[str]() for name in targets}
    crashes: Counter[str] = Counter()
    begin = said = time.perf_counter()
    spent = dict.fromkeys(targets, 0.0)
    while any(found[name].total() < due[name] for name in targets):
        for name, target in targets.items():
            batch = max(1, round(BATCH * target.weight))
            before = time.perf_counter()
            for _ in range(min(batch, due[name] - found[name].total())):
                given = target.make(draws[name])
                outcome = attempt(target, given)
                found[name][outcome.kind] += 1
                if not outcome.sound:
                    what = f"{name}: {outcome.kind} at {outcome.where}"
                    crashes[what] += 1
                    if crashes[what] == 1:
                        print(f"! {what}: {outcome.said}\n  {given!r:.600}", flush=True)
                    if asked.keep and crashes[what] <= 3:
                        asked.keep.mkdir(parents=True, exist_ok=True)
                        number = list(crashes).index(what) + 1
                        kept = asked.keep / f"{number:03d}-{crashes[what]}.pickle"
                        kept.write_bytes(pickle.dumps((name, given)))
            spent[name] += time.perf_counter() - before
            if time.perf_counter() - said > EVERY_SECONDS:
                said = time.perf_counter()
                done = sum(each.total() for each in found.values())
                rate = f"{done / (said - begin):,.0f} a second"
                print(f"{said - begin:7.0f} s  {done:9,} inputs  {rate}  {crashes.total()} wrong",
                      file=sys.stderr, flush=True)  # fmt: skip
    report(found, spent, crashes, time.perf_counter() - begin)


def report(
    found: dict[str, Counter[str]], spent: dict[str, float], crashes: Counter[str], seconds: float
) -> None:
    import nacre

    versions = [("nacre", nacre.__version__), *((n, metadata.version(n)) for n in PACKAGES)]
    packages = ", ".join(f"{name} {version}" for name, version in versions)
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one used; {platform.system()}"
    print(f"command   python benchmarks/fuzz.py {' '.join(sys.argv[1:])}".rstrip())
    print(f"date      {time.strftime('%Y-%m-%d')}")
    print(f"machine   {machine}")
    print(f"versions  Python {platform.python_version()}, {packages}")
    total = sum(each.total() for each in found.values())
    print(f"inputs    {total:,} in {seconds:,.0f} s")
    print(f"wrong     {crashes.total()}\n")
    print(f"{'target':28}{'inputs':>10}{'accepted':>10}{'refused':>10}{'wrong':>7}{'seconds':>9}")
    for name, kinds in found.items():
        wrong = kinds.total() - kinds["accepted"] - kinds["refused"]
        print(f"{name:28}{kinds.total():10,}{kinds['accepted']:10,}{kinds['refused']:10,}"
              f"{wrong:7}{spent[name]:9,.0f}")  # fmt: skip
    for what, times in crashes.most_common():
        print(f"{times:7}  {what}")


def guided(name: str, root: Path) -> None:
    """Let atheris draw what changes; it follows which lines of nacre are reached."""
    import atheris

    with atheris.instrument_imports(include=["nacre"]):
        from attempt import attempt
        from targets import make_all

    target = make_all(root)[name]

    def one(data: bytes) -> None:
        given = target.make(random.Random(data))
        outcome = attempt(target, given)
        if not outcome.sound:
            raise RuntimeError(f"{outcome.kind} at {outcome.where}: {outcome.said}: {given!r}")

    atheris.Setup([sys.argv[0]], one)
    atheris.Fuzz()


if __name__ == "__main__":
    main()
