"""Numbers as people read them."""

from __future__ import annotations

import pytest

from nacre import numbers


@pytest.mark.parametrize(
    ("number", "text"),
    [
        (0, "0"), (9_999, "9,999"), (10_000, "10.0K"), (32_864, "32.9K"), (999_949, "999.9K"),
        (999_950, "1.0M"), (104_900_000, "104.9M"), (999_960_000, "1.00B"), (68.9e9, "68.90B"),
    ],
)  # fmt: skip
def test_count(number: float, text: str) -> None:
    assert numbers.count(number) == text


def test_size() -> None:
    assert [numbers.size(n) for n in (519_045_120, 999_400_000, 999_600_000, 1_500_000_000)] == [
        "519 MB", "999 MB", "1.00 GB", "1.50 GB",
    ]  # fmt: skip
    assert [numbers.size(n) for n in (999.99e9, 999.999e9, 6.8e14, 8e18)] == [
        "999.99 GB", "1.00 TB", "680.00 TB", "8000.00 PB",
    ]  # fmt: skip


def test_duration() -> None:
    seconds = (0.00258, 1.5, 119, 150, 3600, 31_320, 172_799, 172_800, 1.5e6)
    assert [numbers.duration(n) for n in seconds] == [
        "2.58 ms", "1.5 s", "119 s", "2.5 min", "1.0 h", "8.7 h", "48 h", "2.0 days", "17 days",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(-1, "0 s"), (59, "59 s"), (60, "1 min"), (7_200, "2 h"), (200_000, "2 d")],
)
def test_age(seconds: float, text: str) -> None:
    assert numbers.age(seconds) == text
