"""Reports: charts and one page that works anywhere, made from files alone.

Of a run how it was trained and what it scored, of several runs both beside each other, of a
composition its scores beside its experts'. The same files give the same report, byte for byte.
"""

from __future__ import annotations

from pathlib import Path

from nacre.errors import ConfigError, Problem
from nacre.folders import COMPOSITION
from nacre.report import comparison, page
from nacre.report.files import RunFiles, StageView, load_run
from nacre.report.tables import ledger_table, stage_table

__all__ = ["RunFiles", "StageView", "ledger_table", "load_run", "stage_table", "write"]


def write(*folders: str | Path, out: str | Path | None = None) -> Path:
    """Write the report of a run, a composition, or several runs together; return its `index.html`.

    It goes to the folder `out`; by default to `report/` in the run or composition, of several runs
    in the current folder. Raises ConfigError for folders that do not go together or an `out` that
    holds something else, CheckpointError and FingerprintError as each page does.
    """
    paths = list(map(Path, folders))
    problems: list[Problem] = []
    if not paths:
        problems.append(Problem("runs", "there are none", "name a run, or several"))
    if len({path.resolve() for path in paths}) < len(paths):
        problems.append(Problem("runs", "one is named twice", "name each once"))
    if len(paths) > 1:
        problems += [
            Problem(str(path), "is a composition", "report it alone, or name runs only")
            for path in paths
            if _is_composition(path)
        ]
    target = Path("report") if out is None and len(paths) > 1 else out and Path(out)
    if target and (problem := _taken(target)):
        problems.append(Problem("--out", problem, "name a new folder, or that of a report"))
    if problems:
        raise ConfigError(problems)
    if len(paths) > 1:
        assert target
        return comparison.write(paths, target)
    if not _is_composition(paths[0]):
        return page.write(paths[0], target or None)
    from nacre.report import composition  # imports torch, which the page of a run does without

    return composition.write(paths[0], target or None)


def _is_composition(path: Path) -> bool:
    return (path / COMPOSITION).is_file()


def _taken(target: Path) -> str:
    """Say why a report cannot replace what is at a place, if it cannot."""
    if not target.exists():
        return ""
    if not target.is_dir():
        return f"{target} is a file"
    names = sorted(path.name for path in target.iterdir())
    beside = {".svg": ".png", ".tex": ".csv"}  # a report has no SVG or LaTeX without the other form
    strange = [
        name
        for name in names
        if (end := Path(name).suffix) not in (".html", ".png", ".csv")
        and str(Path(name).with_suffix(beside.get(end, ".none"))) not in names
    ]
    if strange or (names and "index.html" not in names):
        return f"{target} holds what is no report ({(strange or names)[0]})"
    return ""
