"""The fixed basis of the glyph substrate: a separable PCA of Unifont, exact on every machine.

A picture is `side x side` grey levels in 0..255. The mean picture is subtracted, then one
orthonormal matrix is applied to the columns and one to the rows: the principal axes of Unifont's
lines in each direction, fitted once, shipped as integers. The coefficients come in the shipped
order, largest variance first, so that keeping the first `width` keeps most of it.

Every number is a whole number held in float64 below 2**53, so a product is exact whatever the BLAS,
the number of threads or the instruction set.

Shapes: N pictures, H lines (each stands for S / H equal lines), S side, D width.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

SIDES = (16, 32, 64)
"""Sides a picture may have; the smallest whose square reaches the width is taken."""

ENTRY_BITS = 13
"""Fraction bits of an entry of the matrices."""

COEFFICIENT_BITS = 8
"""Fraction bits kept in a coefficient: steps of 1/256 of a grey level."""


def side_for(width: int) -> int:
    """Return the side of the picture behind a row of `width` numbers; ValueError above 64 x 64."""
    for side in SIDES:
        if side * side >= width:
            return side
    raise ValueError(f"no picture has {width} pixels: the largest is {SIDES[-1]} x {SIDES[-1]}")


@dataclass(frozen=True, eq=False)
class Basis:
    """The basis of one side.

    `mean` uint8 [16, S], a line standing for S / 16 equal ones; `down` and `across` int16 [S, S],
    orthonormal rows times 2**ENTRY_BITS; `order` [S * S]: flat indices `down * S + across`.
    """

    mean: np.ndarray
    down: np.ndarray
    across: np.ndarray
    order: np.ndarray

    def mean_lines(self, lines: int) -> np.ndarray:
        """Return the mean picture on H lines, a multiple of 16: uint8 [H, S]."""
        return np.repeat(self.mean, lines // len(self.mean), axis=0)

    def project(self, pictures_NHS: np.ndarray, width: int) -> np.ndarray:
        """Return the first `width` coefficients, whole numbers in float64 [N, D].

        `pictures_NHS` is uint8. A coefficient's unit is 2**-COEFFICIENT_BITS grey levels.
        """
        count, lines, side = pictures_NHS.shape
        across_SS = self.across.astype(np.float64)
        down_HH = self.down[:lines].reshape(lines, lines, side // lines).sum(axis=2) * 1.0
        bound = 255.0 * np.abs(across_SS).sum(axis=1).max() * np.abs(down_HH).sum(axis=1).max()
        assert bound < 2.0**53, "a partial sum could pass 2**53: the product would not be exact"
        centered = pictures_NHS.astype(np.float64)
        centered -= self.mean_lines(lines)
        half = centered.reshape(-1, side) @ across_SS.T
        full = np.matmul(down_HH, half.reshape(count, lines, side)).reshape(count, lines * side)
        # Axes beyond the first H are differences between equal lines: zero, and last in the order.
        kept = self.order[:width]
        kept = kept[kept < lines * side]
        chosen = np.take(full, kept, axis=1)
        chosen *= 2.0 ** (COEFFICIENT_BITS - 2 * ENTRY_BITS)
        chosen += 0.5
        coefficients = np.zeros((count, width))
        np.floor(chosen, out=coefficients[:, : len(kept)])
        return coefficients

    def reconstruct(self, coefficients_ND: np.ndarray) -> np.ndarray:
        """Return the pictures that the first D coefficients still describe, float64 [N, S, S]."""
        side = len(self.across)
        down_SS, across_SS = self.down / 2.0**ENTRY_BITS, self.across / 2.0**ENTRY_BITS
        full = np.zeros((len(coefficients_ND), side * side))
        kept = self.order[: coefficients_ND.shape[1]]
        full[:, kept] = coefficients_ND / 2.0**COEFFICIENT_BITS
        return down_SS.T @ full.reshape(-1, side, side) @ across_SS + self.mean_lines(side)


def principal(pictures_NHS: np.ndarray, fitted: np.ndarray, width: int) -> np.ndarray:
    """Return coefficients in the principal axes of these very pictures, float64 [N, D].

    The papers' way (arXiv 2507.04886): PCA on the vocabulary, by an eigendecomposition of the
    covariance of the pictures selected by `fitted` (bool [N]). An axis points to where its largest
    entry is positive; axes beyond the pictures' rank are zero. The unit is that of `Basis.project`,
    and the numbers are whole. Unlike there, the result depends on the vocabulary and, in its last
    bits, on the machine.
    """
    count, lines, side = pictures_NHS.shape
    flat = pictures_NHS.reshape(count, lines * side)
    rows = np.zeros((count, width))
    chosen = np.flatnonzero(fitted)
    if len(chosen) == 0:
        return rows
    blocks = [chosen[start : start + 8192] for start in range(0, len(chosen), 8192)]
    mean = sum(flat[block].sum(axis=0, dtype=np.float64) for block in blocks) / len(chosen)
    scatter = np.zeros((lines * side, lines * side))
    for block in blocks:
        centered = flat[block] - mean
        scatter += centered.T @ centered
    axes = np.linalg.eigh(scatter)[1][:, ::-1][:, :width]
    strongest = np.abs(axes).argmax(axis=0)
    axes = axes * np.where(axes[strongest, np.arange(axes.shape[1])] < 0, -1.0, 1.0)
    scale = 2.0**COEFFICIENT_BITS * (side / lines) ** 0.5  # a line stands for side / lines
    for start in range(0, count, 8192):
        block = slice(start, start + 8192)
        rows[block, : axes.shape[1]] = np.rint((flat[block] - mean) @ axes * scale)
    return rows
