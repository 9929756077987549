"""Placing intervals one by one, each into a gap between those that are there: in which order decides how well it goes.

- *By size*: the largest first (Pisarchyk and Lee 2020, "Efficient memory management for deep neural net inference").
- *By breadth*: moment by moment, those with most bytes alive first, and in each the largest first (the same).
- By how long they live, by size times life, by the most bytes alive meanwhile, by when they begin or end, and mixtures.

Each with first fit (the lowest gap), some with best fit (the tightest). None promises anything; of a training step's
intervals, some order nearly always reaches the most bytes alive, below which nothing goes. An order takes O(n^2) in numpy.
"""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from .intervals import Sections


def portfolio(sections: Sections) -> Iterator[tuple[str, np.ndarray]]:
    """Each method's name and the offsets that it gives, those first that are best most often."""
    ordered = orders(sections)
    for name, order in ordered.items():
        yield name, place(sections, order)
    for name in ("by size", "by breadth", "by area"):
        yield f"{name}, best fit", place(sections, ordered[name], best_fit=True)


def orders(sections: Sections) -> dict[str, np.ndarray]:
    """The orders by name: of each the intervals' indices, the first to be placed first."""
    first, last, sizes = sections.first, sections.last, sections.sizes.astype(float)
    lives = last - first + 1.0
    peaks = most_in_life(sections)
    keys = {
        "by size": (-sizes, -lives),
        "by life": (-lives, -sizes),
        "by area": (-lives * sizes,),
        "by breadth": (-peaks, -sizes),
        "by breadth, then life": (-peaks, -lives, -sizes),
        "by breadth, then area": (-peaks, -lives * sizes),
        "by begin": (first, -lives, -sizes),
        "by end": (-last, -lives, -sizes),
        "by size and root of life": (-sizes * np.sqrt(lives),),
        "by life and root of size": (-lives * np.sqrt(sizes),),
        "by size and root of peak": (-sizes * np.sqrt(peaks),),
    }
    return {name: np.lexsort(key[::-1]) for name, key in keys.items()}


def most_in_life(sections: Sections) -> np.ndarray:
    """For each interval the most bytes alive while it is."""
    bounds = np.stack((sections.first, sections.last + 1), axis=1).ravel()
    return np.maximum.reduceat(np.append(sections.loads, 0), bounds)[::2]


def place(sections: Sections, order: np.ndarray, best_fit: bool = False) -> np.ndarray:
    """Offsets in bytes of the sections' intervals, placed in that order into the lowest gap that holds them, or the tightest;
    on top of everything where there is none."""
    count = len(order)
    first, last, bottoms, tops = (np.zeros(count, np.int64) for _ in range(4))
    offsets = np.zeros(count, np.int64)
    for done, i in enumerate(order):
        meets = np.flatnonzero((first[:done] <= sections.last[i]) & (last[:done] >= sections.first[i]))
        offset = _gap(bottoms[meets], tops[meets], int(sections.sizes[i]), int(sections.alignments[i]), best_fit)
        first[done], last[done], offsets[i] = sections.first[i], sections.last[i], offset
        bottoms[done], tops[done] = offset, offset + sections.sizes[i]
    return offsets


def _gap(bottoms: np.ndarray, tops: np.ndarray, size: int, alignment: int, best_fit: bool) -> int:
    """Where `size` fits among what lies from bottoms to tops."""
    order = np.argsort(bottoms, kind="stable")
    starts = np.maximum.accumulate(np.append(0, tops[order]))
    starts = -(-starts // alignment) * alignment
    room = bottoms[order] - starts[:-1]
    holds = np.flatnonzero(room >= size)
    if not len(holds):
        return int(starts[-1])
    return int(starts[holds[np.argmin(room[holds])] if best_fit else holds[0]])
