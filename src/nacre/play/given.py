"""What the page was given: runs, checkpoints, compositions and studies, told apart by their files.

Reads no weights and imports no torch, so that the page is up before anything slow is loaded.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from nacre.errors import ConfigError, Problem
from nacre.folders import COMPOSITION, PLAN, RESULTS, STAGE, STUDY, stages
from nacre.untrusted import read_json

Kind = Literal["run", "checkpoint", "composition", "study"]

SIGNS: dict[str, Kind] = {
    PLAN: "run",
    COMPOSITION: "composition",
    RESULTS: "study",
    "config.json": "checkpoint",
}
"""A file that tells what its folder is; the first one that is there decides."""


@dataclass(frozen=True)
class Given:
    """The folders that the page shows and may read, by what they are, in the order given."""

    runs: tuple[Path, ...] = ()
    checkpoints: tuple[Path, ...] = ()
    compositions: tuple[Path, ...] = ()
    studies: tuple[Path, ...] = ()

    @property
    def experts(self) -> tuple[Path, ...]:
        """What a composition can be made of: runs and checkpoints."""
        return self.runs + self.checkpoints

    @property
    def model(self) -> Path | None:
        """The run or checkpoint whose depths are shown."""
        return self.experts[0] if self.experts else None

    @property
    def title(self) -> str:
        """The names of the folders, for the head of the page."""
        paths = [*self.compositions, *self.runs, *self.checkpoints, *self.studies]
        return " + ".join(path.absolute().name for path in paths)

    @property
    def first_tab(self) -> str:
        """The tab that shows what was given first of all."""
        if self.model:
            return "grow" if len(self.experts) == 1 or self.compositions else "compose"
        return "compose" if self.compositions else "study"


def look(paths: Sequence[str | Path]) -> Given:
    """Tell what each path is; raise `ConfigError` with every path that is nothing of nacre."""
    found: dict[Kind, list[Path]] = {"run": [], "checkpoint": [], "composition": [], "study": []}
    problems: list[Problem] = []
    if not paths:
        fix = "name a run, a checkpoint, a composition or a study"
        problems.append(Problem("PATH", "there is none", fix))
    for path in map(Path, paths):
        folder = path.parent if path.name in SIGNS and path.is_file() else path
        kind: Kind | None = next(
            (kind for sign, kind in SIGNS.items() if (folder / sign).is_file()), None
        )
        if kind is None:
            problems.append(Problem(str(path), *_nothing(path)))
        elif folder in found[kind]:
            problems.append(Problem(str(path), "is named twice", "name it once"))
        else:
            found[kind].append(folder)
    single: tuple[Kind, ...] = ("composition", "study")
    for one in single:
        for path in found[one][1:]:
            fix = "open it with a `nacre play` of its own"
            problems.append(Problem(str(path), f"is a second {one}", fix))
    if problems:
        raise ConfigError(problems)
    return Given(
        tuple(found["run"]),
        tuple(found["checkpoint"]),
        tuple(found["composition"]),
        tuple(found["study"]),
    )


def _nothing(path: Path) -> tuple[str, str]:
    """Say why a path cannot be shown, and what to do."""
    if not path.exists():
        return "there is no such folder", "name the --out folder of a nacre command"
    if (path / STUDY).is_file():
        fix = f"write them with `nacre study {path / STUDY} --no-run --out {path}`"
        return "this study has no results yet", fix
    if path.is_file():
        return "is a file", "name a folder"
    looked = ", ".join(SIGNS)
    fix = "name the --out folder of a nacre command, or a Hugging Face folder"
    return f"holds no run, checkpoint, composition or study (none of {looked})", fix


def stage_depths(path: Path) -> list[int]:
    """Return the blocks after each finished stage of a run, or those of a checkpoint; [] of none.

    What is damaged counts as none here: whoever loads it says what is wrong.
    """
    try:
        if (path / PLAN).is_file():
            return [int(read_json(stage / STAGE)["depth"]) for stage in stages(path)]
        config = read_json(path / "config.json")
        return [int(config.get("num_hidden_layers") or config.get("n_layer") or 0)]
    except (OSError, ValueError, LookupError, TypeError, AttributeError, OverflowError):
        return []


def expert_count(given: Given) -> int:
    """Return how many experts can play at most: a composition's own and the others given."""
    inside = 0
    for path in given.compositions:
        try:
            inside += len(read_json(path / COMPOSITION)["experts"])
        except (OSError, ValueError, LookupError, TypeError):
            continue  # whoever loads it says what is wrong
    return inside + len(given.experts)
