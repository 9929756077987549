"""What all pictures share: matplotlib where it is installed, colours that differ in grey too, a width that phones can show."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..errors import MissingExtraError

WIDTH_INCHES = 6.0  # at which labels of nine points can be read on a phone
LEGEND_BELOW_INCHES = 0.5
LONGEST_TITLE = 55  # characters
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


def title_of(model: str, text: str) -> str:
    """Of a picture: on two lines where one would be cut."""
    return f"{model}: {text}" if len(model) + len(text) < LONGEST_TITLE else f"{model}:\n{text}"


def legend_below(axes: Any, handles: Sequence[Any], columns: int = 3) -> None:
    """The legend under the x axis, where it covers nothing, whatever else there is in the figure."""
    from matplotlib.transforms import ScaledTranslation

    below = axes.transAxes + ScaledTranslation(0, -LEGEND_BELOW_INCHES, axes.figure.dpi_scale_trans)
    axes.legend(
        handles=handles, loc="upper center", bbox_to_anchor=(0.5, 0), bbox_transform=below, ncols=columns, frameon=False,
        fontsize=9, borderaxespad=0,
    )  # fmt: skip
