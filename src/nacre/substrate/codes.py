"""The code substrate: a token's row is its id in binary, lifted to the width.

The papers' smallest substrate (arXiv 2507.04886: 16 bits, vocabulary 65,536). A bit stays 0 or 1
and the most significant comes first; id 0 is therefore all zeros, as in the papers: the one row
without length, and still no other token's. Ids may be recoded by an affine map over GF(2) first: a
bijection, so rows stay distinct, while neighboring ids stop sharing most of their bits.

Shapes: V tokens, B bits, D width.
"""

from __future__ import annotations

import hashlib

import numpy as np

from nacre.errors import ConfigError, Problem

PAPER_BITS = 16
"""Bits of the papers' code."""


def code_bits(bits: int | None, vocabulary: int, width: int) -> int:
    """Return the bits of a code for `vocabulary` tokens that `width` is a multiple of.

    `bits` None takes the papers' 16 where they number the vocabulary and divide the width, else the
    fewest that do. Raises ConfigError if `bits` number too few tokens or do not divide the width.
    """
    least = max(1, (vocabulary - 1).bit_length())
    problems = []
    if bits is None:
        if least <= PAPER_BITS and width % PAPER_BITS == 0:
            return PAPER_BITS
        fitting = [count for count in range(least, width + 1) if width % count == 0]
        if fitting:
            return fitting[0]
        message = f"{width} numbers cannot hold a code for {vocabulary:,} tokens"
        raise ConfigError(Problem("width", message, f"use a width of at least {least}"))
    if bits < least:
        message = f"{bits} bits number {2**bits:,} tokens, the vocabulary has {vocabulary:,}"
        problems.append(Problem("substrate.bits", message, f"use at least {least}"))
    if width % bits:
        below, above = width // bits * bits, (width // bits + 1) * bits
        near = f"{below} or {above}" if below else f"{above}"
        message = f"{width} is not a multiple of the {bits} bits of the code"
        problems.append(Problem("width", message, f"the nearest that are: {near}"))
    if problems:
        raise ConfigError(problems)
    return bits


def code_rows(
    vocabulary: int, width: int, bits: int, lift: str = "repeat_interleave", seed: int | None = None
) -> np.ndarray:
    """Return the rows of ids 0 .. V - 1, float32 [V, D] of zeros and ones.

    `lift` "repeat_interleave" stands each bit D / B times in a row (`b0 b0 .. b1 b1 ..`), "tile"
    repeats the whole code (`b0 b1 .. b0 b1 ..`). `seed` recodes the ids, see `affine_map`.
    """
    ids_V1 = np.arange(vocabulary, dtype=np.int64)[:, None]
    code_VB = (ids_V1 >> np.arange(bits - 1, -1, -1) & 1).astype(np.uint8)
    if seed is not None:
        matrix_BB, offset_B = affine_map(seed, bits)
        code_VB = (code_VB @ matrix_BB.T & 1) ^ offset_B
    copies = width // bits
    lifted = np.repeat(code_VB, copies, axis=1) if lift != "tile" else np.tile(code_VB, copies)
    return lifted.astype(np.float32)


def affine_map(seed: int, bits: int) -> tuple[np.ndarray, np.ndarray]:
    """Return an invertible matrix, uint8 [B, B], and an offset, uint8 [B], over GF(2).

    The matrix is a permutation of a lower times an upper triangle with unit diagonals, so it is
    invertible whatever the seed. All bits come from SHAKE-128 of the seed: the same everywhere.
    """
    size = 2 * bits * bits + bits + 8 * bits
    stream = hashlib.shake_128(f"nacre affine 1 {bits} {seed}".encode()).digest(size)
    low, high, offset, keys = np.split(
        np.frombuffer(stream, np.uint8),
        [bits * bits, 2 * bits * bits, 2 * bits * bits + bits],
    )
    unit = np.eye(bits, dtype=np.uint8)
    lower = np.tril(low.reshape(bits, bits) & 1, -1) | unit
    upper = np.triu(high.reshape(bits, bits) & 1, 1) | unit
    # Entries of the product are at most `bits`; uint8 wraps at 256, which keeps the parity.
    order = np.argsort(keys.view("<u8"), kind="stable")
    return (lower @ upper & 1)[order], offset & 1


def random_rows(vocabulary: int, width: int, seed: int) -> np.ndarray:
    """Return rows of independent, nearly normal numbers, each of unit length, float32 [V, D].

    A number is a sum of eight random bytes (Irwin-Hall: within 2% of the normal distribution), made
    odd so that none is zero, from the raw stream of PCG64, which numpy keeps stable: the same rows
    everywhere, and a smaller vocabulary's are the first of a larger one's.
    """
    source = np.random.PCG64(seed)
    rows = np.empty((vocabulary, width), np.float32)
    step = max(1, (1 << 20) // width)
    for start in range(0, vocabulary, step):
        count = min(step, vocabulary - start)
        words = np.asarray(source.random_raw(count * width), dtype="<u8")
        sums = words.view(np.uint8).reshape(-1, 8).sum(axis=1, dtype=np.int64)
        values = (2 * sums - (8 * 255 + 1)).astype(np.float64).reshape(count, width)
        lengths = np.sqrt(np.einsum("nd,nd->n", values, values))  # exact sums of whole numbers
        rows[start : start + count] = values / lengths[:, None]
    return rows
