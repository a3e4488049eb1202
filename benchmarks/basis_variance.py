"""How much of the pictures' variance the first `width` coefficients keep, by basis.

    python benchmarks/basis_variance.py [--text FILE ...] [--json]

Two sets of pictures: every drawn character of Unifont alone, and the most frequent n-grams of a
text (by default the standard library's `pydoc_data.topics`). Three bases around the same mean:

- separable PCA: what nacre ships, in its integer arithmetic;
- 2-D DCT, float64, ordered by the variance measured on what the shipped basis was fitted on
  (characters and windows of neighboring code points, equal weight);
- PCA fitted on the same, float64, unquantized: the best a linear basis can do on what it was
  fitted on, at 16 x S by 16 x S numbers (1 million at side 64).

Makes the figures of docs/substrate.md.
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from nacre.substrate import basis, glyphs

WIDTHS = (64, 128, 192, 256, 384, 512, 768, 1024, 2048)
WINDOWS = (2, 3, 4, 6)


def chunks(strings: Sequence[str], side: int) -> Iterator[np.ndarray]:
    """Yield pictures, uint8 [n, 16, S]."""
    for start in range(0, len(strings), glyphs.CHUNK):
        yield glyphs.draw(strings[start : start + glyphs.CHUNK], side)[0]


def scatter(strings: Sequence[str], fixed: basis.Basis) -> np.ndarray:
    """Return the mean outer product of pictures around the shipped mean, float64 [16 S, 16 S]."""
    total = np.zeros((fixed.mean.size, fixed.mean.size))
    for pictures in chunks(strings, fixed.mean.shape[1]):
        flat = (pictures.astype(np.float64) - fixed.mean).reshape(len(pictures), -1)
        total += flat.T @ flat
    return total / len(strings)


def shipped_energy(strings: Sequence[str], fixed: basis.Basis) -> np.ndarray:
    """Return the mean squared coefficients of the shipped basis, in its order."""
    total = np.zeros(fixed.order.size)
    for pictures in chunks(strings, fixed.mean.shape[1]):
        total += (fixed.project(pictures, total.size) ** 2).sum(axis=0)
    return total


def dct(side: int, lines: int) -> np.ndarray:
    """Return the orthonormal DCT-II on H lines that stand for S / H equal ones, float64 [S, H]."""
    frequency, place = np.mgrid[:side, :side]
    matrix = np.cos(np.pi * (2 * place + 1) * frequency / (2 * side)) * (2 / side) ** 0.5
    matrix[0] /= 2**0.5
    return matrix.reshape(side, lines, -1).sum(axis=2)


def dct_variance(matrix: np.ndarray, side: int) -> np.ndarray:
    """Return the variance of every DCT coefficient of pictures with this scatter, [S * S]."""
    down, across = dct(side, 16), dct(side, side)
    blocks = matrix.reshape(16, side, 16, side)
    return np.einsum(
        "ui,iajb,uj,va,vb->uv", down, blocks, down, across, across, optimize=True
    ).ravel()


def kept(energies: np.ndarray, widths: Sequence[int]) -> list[float]:
    sums = np.cumsum(energies) / energies.sum()
    return [float(sums[min(width, len(sums)) - 1]) for width in widths]


def ngrams(text: str, count: int) -> list[str]:
    """Return the most frequent strings of 2 to 6 characters without a line break."""
    lines = text.splitlines()
    found = Counter(
        line[at : at + n] for line in lines for n in range(2, 7) for at in range(len(line) - n + 1)
    )
    return [gram for gram, _ in found.most_common() if not gram.isspace()][:count]


def measure(sets: dict[str, list[str]], windows: list[str]) -> list[dict[str, float | str]]:
    rows: list[dict[str, float | str]] = []
    for side, fixed in glyphs.table().bases.items():
        widths = [width for width in WIDTHS if basis.side_for(width) == side]
        scatters = {name: scatter(strings, fixed) for name, strings in sets.items()}
        alone, together = scatters["characters"], scatter(windows, fixed)
        both = alone / np.trace(alone) + together / np.trace(together)
        axes = np.linalg.eigh(both)[1][:, ::-1]
        by_variance = np.argsort(-dct_variance(both, side), kind="stable")
        for name, strings in sets.items():
            results = {
                "separable PCA": kept(shipped_energy(strings, fixed), widths),
                "DCT": kept(dct_variance(scatters[name], side)[by_variance], widths),
                "PCA": kept(np.einsum("ij,ij->j", axes, scatters[name] @ axes), widths),
            }
            for at, width in enumerate(widths):
                shares = {kind: values[at] for kind, values in results.items()}
                rows.append({"width": width, "side": side, "pictures": name, **shares})
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--text", type=Path, nargs="+", help="texts to take n-grams from")
    parser.add_argument("--ngrams", type=int, default=20_000, help="how many n-grams")
    parser.add_argument("--json", action="store_true", help="print JSON instead of a table")
    args = parser.parse_args()
    if args.text:
        text = "\n".join(path.read_text("utf-8") for path in args.text)
    else:
        from pydoc_data import topics

        text = "\n".join(topics.topics.values())
    table = glyphs.table()
    singles = [character for character, place in table.index.items() if not table.blank[place]]
    line = "".join(singles)
    windows = [line[at : at + n] for n in WINDOWS for at in range(0, len(line) - n + 1, 2)]
    sets = {"characters": singles, "n-grams": ngrams(text, args.ngrams)}
    rows = measure(sets, windows)
    if args.json:
        print(json.dumps(rows, indent=1))
        return
    print(f"{len(singles):,} characters, {len(sets['n-grams']):,} n-grams")
    names = ("separable PCA", "DCT", "PCA")
    print(f"| width | side | pictures | {' | '.join(names)} |\n|---|---|---|---|---|---|")
    for row in rows:
        shares = " | ".join(f"{row[name]:.1%}" for name in names)
        print(f"| {row['width']:,} | {row['side']} | {row['pictures']} | {shares} |")


if __name__ == "__main__":
    main()
