"""The check of a placement, which shares nothing with what makes placements: a sweep over time.

At each moment the live buffers are kept in order of offset; a buffer that comes alive must fit between its two neighbours.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence

from ..errors import PlacementError
from .intervals import Interval, check_intervals


def verify(intervals: Sequence[Interval], offsets: Sequence[int], arena_bytes: int) -> None:
    """Check that no two buffers alive at once overlap, and that each is aligned and, where it is ever alive, within
    [0, arena_bytes).

    Raises PlacementError, which names the buffers, their bytes and the moment, and OffsetError for what are no intervals.
    """
    check_intervals(intervals)
    if len(intervals) != len(offsets):
        raise PlacementError(f"{len(offsets)} offsets were given for {len(intervals)} intervals; each needs one")
    for interval, offset in zip(intervals, offsets, strict=True):
        if offset % interval.alignment:
            raise PlacementError(f"{interval.id!r} is at offset {offset}, which is not a multiple of {interval.alignment}")
        if offset < 0 or (interval.end > interval.begin and offset + interval.size_bytes > arena_bytes):
            raise PlacementError(
                f"{interval.id!r} takes bytes {offset} to {offset + interval.size_bytes}, outside of the arena's {arena_bytes}"
            )
    _sweep(intervals, offsets)


def _sweep(intervals: Sequence[Interval], offsets: Sequence[int]) -> None:
    """Ends come before begins at the same moment, as lives are half-open."""
    events = []
    for i, interval in enumerate(intervals):
        if interval.size_bytes and interval.end > interval.begin:
            events += [(interval.begin, 1, i), (interval.end, 0, i)]
    live: list[tuple[int, int]] = []  # (offset, interval), by offset
    for moment, begins, i in sorted(events):
        at = bisect_left(live, (offsets[i], i))
        if not begins:
            del live[at]
            continue
        for offset, j in live[max(0, at - 1) : at + 1]:
            if offset < offsets[i] + intervals[i].size_bytes and offsets[i] < offset + intervals[j].size_bytes:
                ours, other = (f"{intervals[k].id!r} at {offsets[k]} ({intervals[k].size_bytes} bytes)" for k in (i, j))
                raise PlacementError(f"{ours} overlaps {other}: both are alive at moment {moment}")
        live.insert(at, (offsets[i], i))
