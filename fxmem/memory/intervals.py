"""What is to be placed: buffers with the span of time in which each is alive. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from ..errors import OffsetError

MOST_BYTES = 1 << 60  # sums of sizes stay within 64 bits


@dataclass(frozen=True)
class Interval:
    """A buffer that is alive at the moments begin, begin + 1, ... end - 1 (half-open), whatever a moment is.

    id: its name, a string. size_bytes: zero or more. alignment: its offset is a multiple of this power of two.
    An interval that ends where it begins is never alive.
    """

    id: str
    begin: int
    end: int
    size_bytes: int
    alignment: int = 1


@dataclass(frozen=True)
class MaxLive:
    """The most bytes alive at once, and the first moment at which they are: no arena can be smaller."""

    size_bytes: int
    moment: int
    ids: tuple[str, ...]


class Sections:
    """The intervals as arrays, and the *sections* that matter: moments whose live set lies within no other's.

    Two intervals are alive at once if and only if a section has both; in each interval's life they are contiguous (they are
    the maximal cliques of an interval graph, in order of time). Only intervals that take room are counted.

    index: for each counted interval its place in the given ones, by first section. sizes, alignments, first, last: of those
    (int64; first and last section, both within). count: of sections. moments: one moment of each.
    """

    def __init__(self, intervals: Sequence[Interval]):
        counted = [i for i, v in enumerate(intervals) if v.end > v.begin and v.size_bytes]
        begins = np.array([intervals[i].begin for i in counted], np.int64)
        ends = np.array([intervals[i].end for i in counted], np.int64)
        self.moments = _section_moments(begins, ends)
        self.count = len(self.moments)
        first = np.searchsorted(self.moments, begins)
        last = np.searchsorted(self.moments, ends) - 1
        order = np.lexsort((last, first))
        self.index, self.first, self.last = np.array(counted, np.int64)[order], first[order], last[order]
        self.sizes = np.array([intervals[i].size_bytes for i in self.index], np.int64)
        self.alignments = np.array([intervals[i].alignment for i in self.index], np.int64)

    @cached_property
    def loads(self) -> np.ndarray:
        """Bytes alive in each section."""
        change = np.zeros(self.count + 1, np.int64)
        np.add.at(change, self.first, self.sizes)
        np.subtract.at(change, self.last + 1, self.sizes)
        return np.cumsum(change)[:-1]

    @cached_property
    def unit(self) -> int:
        """Offsets of a placement in which everything is pushed down are multiples of this."""
        unit = int(np.gcd.reduce(self.sizes))
        return int(np.gcd.reduce(self.alignments[unit % self.alignments != 0], initial=unit))

    @cached_property
    def covers(self) -> np.ndarray:
        """Which interval (row) is alive in which section (column)."""
        sections = np.arange(self.count)
        return (self.first[:, None] <= sections) & (sections <= self.last[:, None])


def max_live(intervals: Sequence[Interval]) -> MaxLive:
    """The most bytes alive at once: the lower bound of every arena. OffsetError for what are no intervals."""
    check_intervals(intervals)
    sections = Sections(intervals)
    if not sections.count:
        return MaxLive(0, 0, ())
    moment = int(sections.moments[np.argmax(sections.loads)])
    alive = tuple(v.id for v in intervals if v.begin <= moment < v.end and v.size_bytes)
    return MaxLive(int(sections.loads.max()), moment, alive)


def check_intervals(intervals: Sequence[Interval]) -> None:
    """Refuse what cannot be placed, by value: OffsetError."""
    seen: set[str] = set()
    for interval in intervals:
        if not isinstance(interval, Interval):
            raise OffsetError(f"{interval!r} was given; intervals are needed: Interval(id, begin, end, size_bytes)")
        who = f"interval {interval.id!r}"
        for name in ("begin", "end", "size_bytes", "alignment"):
            value = getattr(interval, name)
            if not isinstance(value, int | np.integer) or isinstance(value, bool) or abs(value) > MOST_BYTES:
                raise OffsetError(f"{who} has {name}={value!r}; it must be an integer, of {MOST_BYTES} at most")
        if interval.end < interval.begin:
            raise OffsetError(f"{who} ends at {interval.end}, before it begins at {interval.begin}; need begin <= end")
        if interval.size_bytes < 0:
            raise OffsetError(f"{who} has size_bytes={interval.size_bytes}; it must be zero or more")
        if interval.alignment < 1 or interval.alignment & (interval.alignment - 1):
            raise OffsetError(f"{who} has alignment={interval.alignment}; it must be a power of two: 1, 2, 4, ...")
        if interval.id in seen:
            raise OffsetError(f"two intervals have the id {interval.id!r}; each needs one of its own")
        seen.add(interval.id)
    if sum(int(v.size_bytes) + int(v.alignment) for v in intervals) > MOST_BYTES:
        raise OffsetError(f"the intervals' sizes and alignments add up to more than {MOST_BYTES} bytes")


def _section_moments(begins: np.ndarray, ends: np.ndarray) -> np.ndarray:
    """The last begin before each end that has a begin between it and the end before."""
    starts, stops = np.unique(begins), np.unique(ends)
    return starts[np.unique(np.searchsorted(starts, stops) - 1)]
