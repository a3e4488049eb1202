from __future__ import annotations

import hashlib

import numpy as np
import pytest

from nacre.errors import ConfigError
from nacre.substrate.codes import affine_map, code_bits, code_rows, random_rows
from nacre.substrate.table import find_duplicate


def ids(rows: np.ndarray) -> np.ndarray:
    """Read the ids back from one copy of the code, most significant bit first."""
    return rows.astype(np.int64) @ (1 << np.arange(rows.shape[1])[::-1])


def test_a_row_is_the_id_in_binary() -> None:
    rows = code_rows(65_536, 16, 16)
    assert rows.dtype == np.float32
    assert rows[5].tolist() == [0] * 13 + [1, 0, 1]
    assert not rows[0].any()
    assert np.array_equal(ids(rows), np.arange(65_536))


def test_lifts_repeat_each_bit_or_the_whole_code() -> None:
    code = code_rows(10, 4, 4)
    assert np.array_equal(code_rows(10, 12, 4), np.repeat(code, 3, axis=1))
    assert np.array_equal(code_rows(10, 12, 4, "tile"), np.hstack([code] * 3))


@pytest.mark.parametrize("bits", [1, 2, 7, 16])
@pytest.mark.parametrize("seed", [0, 1, 99])
def test_recoding_is_a_bijection(bits: int, seed: int) -> None:
    recoded = ids(code_rows(2**bits, bits, bits, seed=seed))
    assert np.array_equal(np.sort(recoded), np.arange(2**bits))


def test_recoding_is_affine_and_differs_by_seed() -> None:
    matrix, offset = affine_map(3, 16)
    code = code_rows(1000, 16, 16).astype(np.int64)
    assert np.array_equal((code @ matrix.T + offset) % 2, code_rows(1000, 16, 16, seed=3))
    assert not np.array_equal(code_rows(99, 16, 16, seed=3), code_rows(99, 16, 16, seed=4))
    assert not np.array_equal(code_rows(99, 16, 16, seed=0), code_rows(99, 16, 16))


def test_recoding_is_the_golden_one() -> None:
    matrix, offset = affine_map(0, 16)
    found = hashlib.sha256(matrix.tobytes() + offset.tobytes()).hexdigest()
    assert found == "2f728a9a37ce3cb0b2ab228564d39bc38c39987e36d8ea7b513bf99f817e88ef"


@pytest.mark.parametrize(
    ("vocabulary", "width", "expected"),
    [
        (64, 32, 16),
        (65_536, 1024, 16),
        (65_537, 1024, 32),
        (131_072, 34, 17),
        (64, 12, 6),
        (1, 1, 1),
    ],
)
def test_default_bits(vocabulary: int, width: int, expected: int) -> None:
    assert code_bits(None, vocabulary, width) == expected


def test_too_few_bits() -> None:
    with pytest.raises(ConfigError, match=r"substrate.bits: 9 bits number 512 tokens.*at least 10"):
        code_bits(9, 513, 90)


def test_width_that_is_no_multiple_of_the_bits() -> None:
    with pytest.raises(ConfigError, match=r"width: 100 is not a multiple.*96 or 112"):
        code_bits(16, 512, 100)
    with pytest.raises(ConfigError, match=r"nearest that are: 16"):
        code_bits(16, 512, 10)


def test_width_too_small_for_any_code() -> None:
    with pytest.raises(ConfigError, match=r"width: 8 numbers cannot hold.*at least 10"):
        code_bits(None, 1024, 8)


def test_both_code_problems_in_one_message() -> None:
    with pytest.raises(ConfigError, match="2 problems") as caught:
        code_bits(9, 513, 100)
    assert [problem.field for problem in caught.value.problems] == ["substrate.bits", "width"]


def test_random_rows_are_seeded_unit_and_nearly_normal() -> None:
    rows = random_rows(3000, 96, 7)
    assert rows.dtype == np.float32
    assert np.allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-6)
    assert np.array_equal(rows[:100], random_rows(100, 96, 7))
    assert not np.array_equal(rows[:100], random_rows(100, 96, 8))
    assert find_duplicate(rows) is None
    values = rows.astype(np.float64).ravel() * 96**0.5
    assert abs(values.mean()) < 0.01
    assert abs(values.std() - 1) < 0.01
    assert abs((values**4).mean() - 3) < 0.25


def test_random_rows_are_the_golden_ones() -> None:
    found = hashlib.sha256(random_rows(50, 33, 0).astype("<f4").tobytes()).hexdigest()
    assert found == "39621abc60d52170c8400c32e84f33568d08dba209168d5c2fcd87596953de1d"
