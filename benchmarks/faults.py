"""The long fault campaign: python benchmarks/faults.py [--faults N] [--seed S] [--place FOLDER]

Growths of five stages (no trunk, cached, run for every batch, adapters, chosen by measuring) are
killed, get disk errors, lose what had not reached the disk, and have bits flipped in what they
left, at points drawn at random, one fault after the other until each has ended. What must come out
every time is the model and the metrics of the run that nothing happened to, bit for bit, with at
most `save_every` steps done again, or twice as many where the newest state is damaged. A flipped
bit may instead be refused, if `nacre verify` finds it too; the bit is then set right, and the
growth goes on.

The results file is written anew after every growth. FOLDER on a file system of its own of at most
256 MB (a tmpfs) adds the faults of a disk that is really full.
"""

from __future__ import annotations

import argparse
import platform
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests" / "faults"))

import torch
from injection import (
    BUG,
    DONE,
    FLIPPED,
    KINDS,
    MENDABLE,
    SAVE_EVERY,
    Attempt,
    Fault,
    Kind,
    attempt,
    draw_fault,
    flip,
    places,
    redone,
    result,
    short_plan,
)  # fmt: skip

from nacre.growth.plan import Plan
from nacre.train import folder
from nacre.train.device import cpu_features
from nacre.train.verify import verify

SMALL_DISK = 256 * 2**20


Place = tuple[str, str]
"""A kind of fault, and where it came."""


@dataclass
class Row:
    """What became of the faults of one kind in one region."""

    faults: int = 0
    refused: int = 0
    lost: int = 0
    redone: int = 0


@dataclass
class Growth:
    """One growth through its faults: which came, which were refused, the steps done again."""

    plan: Plan
    out: Path
    met: list[Place] = field(default_factory=list)
    refused: Counter[Place] = field(default_factory=Counter)
    redone: Counter[Place] = field(default_factory=Counter)
    reached: tuple[int, int] | None = None

    def go_on(self, fault: Fault | None) -> Attempt:
        """Grow until it ends or the fault ends it; count the steps that were done before."""
        ended = attempt(self.plan, self.out, fault)
        (self.out.parent / "filler").unlink(missing_ok=True)
        if ended.steps:
            if self.reached and self.met:
                place, count = self.met[-1], redone(self.reached, ended.steps[0])
                self.redone[place] = max(self.redone[place], count)
            self.reached = ended.steps[-1]
        return ended

    def flip(self, what: str, draw: random.Random) -> str:
        """Flip a bit and go on; return what went wrong. A refusal is right if verify agrees."""
        flipped = flip(self.out, what, draw)
        if flipped is None:
            return ""
        self.met[-1] = ("bit flip", what)
        found = [each for each in verify(self.out) if each.wrong]
        ended = self.go_on(None)
        if ended.code == DONE:
            return ""
        path, held = flipped
        if ended.code != MENDABLE or not found:
            return f"a bit of {path.relative_to(self.out)}: {ended.said}"
        self.refused[self.met[-1]] += 1
        path.write_bytes(held)
        return ""

    def wrong(self, expected: dict[str, Any]) -> str:
        """Return what is wrong with what came out, nothing if it is what it must be."""
        if result(self.out) != expected:
            return "another model or other metrics"
        for place, count in self.redone.items():
            if count > SAVE_EVERY * (2 if place == ("bit flip", "a state") else 1):
                return f"{' in '.join(place)}: {count} steps done again"
        return "; ".join(f"{each.what}: {each.wrong}" for each in verify(self.out) if each.wrong)


@dataclass
class Campaign:
    """A plan, what it ends in without faults, and what has happened so far."""

    plan: Plan
    place: Path
    draw: random.Random
    kinds: list[Kind]
    growths: int = 0
    rows: dict[Place, Row] = field(default_factory=dict)
    troubles: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Grow once without faults: measure it, count the lines and operations of every region."""
        started = time.perf_counter()
        self.whole = attempt(self.plan, self.place / "whole", None)
        self.seconds = time.perf_counter() - started
        assert self.whole.code == DONE, self.whole.said
        self.expected = result(self.place / "whole")

    @property
    def faults(self) -> int:
        """How many faults came."""
        return sum(row.faults for row in self.rows.values())

    def grow(self) -> None:
        """Grow through faults until one run ends; count what became of them."""
        self.growths += 1
        growth = Growth(self.plan, self.place / f"growth-{self.growths}")
        while True:
            kind, region = self.choose()
            fault = draw_fault(self.draw, kind, region, self.whole, self.seconds)
            ended, trouble = growth.go_on(fault), ""
            if ended.came:
                growth.met.append((kind if kind != "bit flip" else "kill", region or "anywhere"))
            if ended.code == BUG or (ended.code == MENDABLE and not ended.came):
                trouble = f"{kind} in {region}: {ended.said}"
            if ended.came and kind == "bit flip":
                what = min(FLIPPED, key=lambda what: self.count("bit flip", what))
                trouble = growth.flip(what, self.draw)
            if trouble or ended.code == DONE:
                break
        self.record(growth, trouble or growth.wrong(self.expected))
        shutil.rmtree(growth.out, ignore_errors=True)

    def choose(self) -> tuple[Kind, str | None]:
        """Return a kind of fault and where it comes, those that came least most probably."""
        kind = self.draw.choice(self.kinds)
        regions = places(kind, self.whole)
        weights = [1 / (1 + self.count(kind, region or "anywhere")) ** 2 for region in regions]
        return kind, self.draw.choices(regions, weights)[0]

    def count(self, kind: str, region: str) -> int:
        """Return how many such faults came."""
        return self.rows.get((kind, region), Row()).faults

    def record(self, growth: Growth, trouble: str) -> None:
        """Count what became of a growth's faults: where one went wrong, all of them are lost."""
        for place, count in Counter(growth.met).items():
            row = self.rows.setdefault(place, Row())
            row.faults += count
            row.lost += count * bool(trouble)
            row.refused += growth.refused[place]
            row.redone = max(row.redone, growth.redone[place])
        if trouble:
            listed = ", then ".join(" in ".join(place) for place in growth.met)
            self.troubles.append(f"growth {self.growths}: {trouble} (after {listed})")

    def report(self, command: str, seconds: float) -> str:
        """Return what has happened so far as text."""
        lost = sum(row.lost for row in self.rows.values())
        refused = sum(row.refused for row in self.rows.values())
        versions = folder.versions() | {"python": platform.python_version()}
        lines = [
            command,
            f"{datetime.now(UTC).date()}, {machine()}, one thread; "
            + ", ".join(f"{name} {version}" for name, version in versions.items()),
            "",
            f"{self.faults} faults in {self.growths} growths, {seconds:.0f} s: "
            f"{self.faults - lost} ended in the same model and metrics, bit for bit "
            f"({refused} of them after a refusal that nacre verify confirmed), {lost} lost.",
            f"Steps are saved every {SAVE_EVERY}; those done again after a fault are at most:",
            "",
            f"{'kind':22} {'where':30} {'faults':>6} {'refused':>7} {'lost':>4} {'redone':>6}",
        ]
        for (kind, region), row in sorted(self.rows.items()):
            numbers = f"{row.faults:6} {row.refused:7} {row.lost:4} {row.redone:6}"
            lines.append(f"{kind:22} {region:30} {numbers}")
        never = [
            f"{kind} in {region}"
            for kind in self.kinds
            for region in places(kind, self.whole)
            if kind not in ("bit flip", "kill at a random time")
            and not self.count(kind, str(region))
        ]
        lines += ["", f"Never came: {', '.join(never)}"] if never else []
        return "\n".join([*lines, "", *self.troubles]).rstrip() + "\n"


def machine() -> str:
    name = torch.cpu.get_capabilities().get("cpu_name", platform.processor())
    return ", ".join([name, *(each for each, there in cpu_features().items() if there)])


def main() -> int:
    options = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    options.add_argument("--faults", type=int, default=300)
    options.add_argument("--seed", type=int, default=0)
    options.add_argument("--place", type=Path)
    options.add_argument("--results", type=Path, default=Path("docs/results/faults.txt"))
    asked = options.parse_args()
    torch.set_num_threads(1)
    command = f"python benchmarks/faults.py --faults {asked.faults} --seed {asked.seed}"
    command += " --place FOLDER" * (asked.place is not None)
    with tempfile.TemporaryDirectory(dir=asked.place) as place:
        small = shutil.disk_usage(place).total <= SMALL_DISK
        kinds = [*KINDS, *(["full disk"] if small else [])]
        campaign = Campaign(short_plan(Path(place)), Path(place), random.Random(asked.seed), kinds)
        started = time.perf_counter()
        while campaign.faults < asked.faults:
            campaign.grow()
            text = campaign.report(command, time.perf_counter() - started)
            asked.results.write_text(text, encoding="utf-8")
            lost = sum(row.lost for row in campaign.rows.values())
            print(
                f"{campaign.faults} faults in {campaign.growths} growths, {lost} lost", flush=True
            )
    print(text)
    return 1 if campaign.troubles else 0


if __name__ == "__main__":
    sys.exit(main())
