"""Numbers as people read them."""

from __future__ import annotations


def count(number: float) -> str:
    """Shorten a count: 9,812 stays; then 32.9K, 105.0M, 68.90B."""
    if number < 10_000:
        return f"{number:,.0f}"
    if round(number / 1e3, 1) < 1000:
        return f"{number / 1e3:.1f}K"
    if round(number / 1e6, 1) < 1000:
        return f"{number / 1e6:.1f}M"
    return f"{number / 1e9:.2f}B"


def size(number: float) -> str:
    """Write bytes as MB, GB, TB or PB, powers of ten."""
    if round(number / 1e6) < 1000:
        return f"{number / 1e6:.0f} MB"
    unit, name = next((u, n) for u, n in ((1e9, "GB"), (1e12, "TB"), (1e15, "PB"))
                      if round(number / u, 2) < 1000 or n == "PB")  # fmt: skip
    return f"{number / unit:.2f} {name}"


def duration(seconds: float) -> str:
    """Write seconds in the unit in which they are easiest to read: 8.2 ms, 42 s, 3.1 h, 12 days."""
    for unit, name, least in ((86_400, "days", 2), (3600, "h", 1), (60, "min", 2), (1, "s", 1)):
        if seconds >= least * unit:
            value = seconds / unit
            return f"{value:,.0f} {name}" if value >= 10 else f"{value:.1f} {name}"
    return f"{1e3 * seconds:.3g} ms"


def age(seconds: float) -> str:
    """Write a time span by its largest unit: seconds, minutes, hours or days."""
    for unit, length in (("d", 86_400), ("h", 3_600), ("min", 60)):
        if seconds >= length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(seconds, 0):.0f} s"
