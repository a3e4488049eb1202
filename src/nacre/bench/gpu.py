"""The suites that say something about a GPU, on a machine that has little installed.

`benchmarks/gpu.sh` runs this: `python -m nacre.bench.gpu FILE [--quick] [SUITE ...]`.
"""

from __future__ import annotations

import json
import sys
from importlib.util import find_spec
from pathlib import Path
from typing import Any

SUITES = ("paper", "step", "depth", "head")
NEEDED = (
    "torch", "transformers", "accelerate", "tokenizers", "safetensors", "numpy", "psutil",
    "pydantic", "yaml", "PIL",
)  # fmt: skip
"""What these suites import that is not Python's own."""


def main(arguments: list[str]) -> int:
    """Run the suites and write their JSON to a file after each; return the exit code."""
    out, *rest = arguments
    names = [argument for argument in rest if argument != "--quick"] or SUITES
    if lacking := missing():
        print(f"not installed: {', '.join(lacking)}", file=sys.stderr)
        return 1
    from nacre import bench

    record: dict[str, Any] = {}
    for name in names:
        results = bench.run([name], quick="--quick" in rest, progress=say)
        found = results.record()
        for key in ("suites", "seconds"):
            found[key] = record.get(key, {}) | found[key]
        record = found
        Path(out).write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
        print("\n".join(lines(record["suites"][name])))
    return 0


def missing() -> list[str]:
    """Return which of the needed packages are not installed."""
    return [name for name in NEEDED if find_spec(name) is None]


def say(suite: str, case: str) -> None:
    """Name a case on stderr before it is measured."""
    print(f"{suite}: {case}", file=sys.stderr, flush=True)


def lines(rows: list[dict[str, Any]]) -> list[str]:
    """Return one line a row: case, what was measured, and what it is compared with."""
    found: list[str] = []
    for row in rows:
        line = f"{row['suite']}: {row['case']}: {row['measured']:.5g} {row['unit']}"
        if row["ratio"] is not None:
            line += f", {row['ratio']:.2f}x {row['peer_name']}"
        if row["limit_ratio"] is not None:
            line += f", {row['limit_ratio']:.2f}x its limit"
        if row["met"] is not None:
            line += f", target {'met' if row['met'] else 'missed'}"
        found.append(line)
    return found


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
