"""Bytes, seconds and fractions as people read them, in one place: tables, pictures, messages and the command line."""

from __future__ import annotations

BYTES_IN = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3), ("B", 1.0))
SECONDS_IN = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))


def unit_of(largest: float, units: tuple[tuple[str, float], ...]) -> tuple[str, float]:
    """The name and the size of the largest unit that `largest` holds at least once; the smallest unit where none is."""
    return next(((name, size) for name, size in units if abs(largest) >= size), units[-1])


def format_bytes(size_bytes: float) -> str:
    """As in "387.0 MB" or "1.25 GB": decimal units, three to four digits."""
    unit, size = unit_of(size_bytes, BYTES_IN)
    return f"{size_bytes / size:,.{2 if unit == 'GB' else 0 if unit == 'B' else 1}f} {unit}"


def format_seconds(seconds: float) -> str:
    """As in "1.25 ms"."""
    unit, size = unit_of(seconds, SECONDS_IN)
    return f"{seconds / size:,.{1 if unit == 'us' else 2}f} {unit}" if seconds else "0"


def format_percent(fraction: float, digits: int = 1, sign: bool = False) -> str:
    """As in "7.5 %" of 0.075, or "+7.5 %" with its sign."""
    return f"{100 * fraction:{'+' if sign else ''},.{digits}f} %"
