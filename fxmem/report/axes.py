"""What all pictures share: matplotlib where it is installed, colours that differ in grey too, a width that phones can show."""

from __future__ import annotations

from typing import Any

from ..errors import MissingExtraError

WIDTH_INCHES = 7.0
BYTES_IN = (("GB", 1e9), ("MB", 1e6), ("KB", 1e3))
SECONDS_IN = (("s", 1.0), ("ms", 1e-3), ("us", 1e-6))
KIND_COLOURS = {  # from dark to light, so that neighbours in the stack differ without colour
    "parameter": "#1b2a49",
    "buffer": "#33507a",
    "input": "#5c7f9e",
    "activation": "#e0904a",
    "gradient": "#f3c98b",
    "workspace": "#fbeedb",
}
KEPT, RUN, IN_PLACE, AGAIN = "#c9d9e8", "#5b86ad", "#efa73e", "#7a1033"


def pyplot() -> Any:
    """matplotlib.pyplot. Raises MissingExtraError where matplotlib is not installed."""
    try:
        import matplotlib.pyplot
    except ModuleNotFoundError as error:
        raise MissingExtraError('matplotlib is not installed: pip install "fxmem[plot]" brings what pictures need') from error
    return matplotlib.pyplot


def unit_of(largest: float, units: tuple[tuple[str, float], ...]) -> tuple[str, float]:
    """The name and the size of the largest unit that `largest` holds at least once; the smallest unit where none is."""
    return next(((name, size) for name, size in units if largest >= size), units[-1])
