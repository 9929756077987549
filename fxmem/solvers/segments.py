"""Checkpoints at the ends of segments, and segments within segments: states that follow from a cut of the forward.

While the backward works in a segment, all of that segment is kept, and of what lies before only what crosses into later
segments; where segments are cut again, that holds for each level. One level is Chen et al. 2016 (sqrt(N) memory) and the
usual torch.utils.checkpoint; two halves on every level are their recursive form (log N memory).
"""

from __future__ import annotations

import bisect
import functools
import itertools
import math
import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from ..schedule import Schedule
from .stages import Compiled, members
from .state import desires

# stages x storages up to which keeping nothing is looked at, or ten times as many for the least peak
MOST_FOR_NOTHING = 100_000
SEGMENT_COUNTS = (2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)


@dataclass(frozen=True)
class Segment:
    """Storages [start, stop) in the order in which the forward makes them; `parts` are the segments that it is cut into, or
    none. kept: bits of it that stay even while the backward works elsewhere."""

    start: int
    stop: int
    parts: tuple[Segment, ...] = ()
    kept: int = 0

    @property
    def bits(self) -> int:
        return (1 << self.stop) - (1 << self.start)


def starting_states(compiled: Compiled, starts: Sequence[Schedule] = ()) -> list[tuple[int, ...]]:
    """The given schedules, everything kept, segments of equal bytes, halves within halves, and where the graph is small enough
    to make everything again for each stage, nothing kept; with thrift everywhere too; as wishes for each stage."""
    count = len(compiled.stages)
    found = [tuple(desires(compiled, schedule)) for schedule in starts]
    found += [(compiled.everything,) * count, *equal_segments(compiled), wishes_of(compiled, nested(compiled, 2, count))]
    found += nothing_kept(compiled, MOST_FOR_NOTHING)
    if any(stage.thrifty is not None for stage in compiled.stages):
        found += [tuple(bits | compiled.thrift for bits in wishes) for wishes in found]
    return found


def nothing_kept(compiled: Compiled, most: int = 3 * MOST_FOR_NOTHING) -> list[tuple[int, ...]]:
    """All made again for each stage, on a graph of `most` stages x storages at most: larger ones take long to judge."""
    count = len(compiled.stages)
    return [(0,) * count] if count * len(compiled.sizes) <= most else []


def equal_segments(compiled: Compiled) -> Iterator[tuple[int, ...]]:
    """Wishes for segments of equal bytes, for several numbers of segments."""
    total_bytes = sum(compiled.sizes)
    for count in SEGMENT_COUNTS:
        if count < len(compiled.sizes):
            yield wishes_of(compiled, cut(compiled, max(1, total_bytes // count)))


def cut(compiled: Compiled, segment_bytes: int, start: int = 0, stop: int | None = None) -> Segment:
    """One level of segments that make segment_bytes each."""
    stop = len(compiled.sizes) if stop is None else stop
    parts, begin, filled = [], start, 0
    for k in range(start, stop):
        if filled >= segment_bytes:
            parts.append(Segment(begin, k))
            begin, filled = k, 0
        filled += compiled.sizes[k]
    return Segment(start, stop, (*parts, Segment(begin, stop)))


def nested(compiled: Compiled, arity: int, depth: int, start: int = 0, stop: int | None = None) -> Segment:
    """`depth` levels of `arity` segments of equal bytes each."""
    stop = len(compiled.sizes) if stop is None else stop
    size_bytes = sum(compiled.sizes[start:stop])
    if depth == 0 or stop - start < 2:
        return Segment(start, stop)
    level = cut(compiled, max(1, -(-size_bytes // arity)), start, stop)
    if len(level.parts) < 2:
        return Segment(start, stop)
    return Segment(start, stop, tuple(nested(compiled, arity, depth - 1, part.start, part.stop) for part in level.parts))


def wishes_of(compiled: Compiled, root: Segment) -> tuple[int, ...]:
    """What to carry into each stage, for a tree of segments."""
    leaves: list[tuple[int, int]] = []
    _collect(root, 0, read_until(compiled), leaves)
    edges = [start for start, _ in leaves]
    place = len(leaves) - 1
    places = [bisect.bisect_right(edges, s.needs.bit_length() - 1) - 1 if s.needs else None for s in compiled.stages]
    last = list(itertools.accumulate(reversed(places), lambda high, p: high if p is None else max(high, p), initial=0))[:0:-1]
    wishes = []
    for now, high in zip(places, last, strict=True):  # a segment is entered at its first read, and left after its last
        wishes.append(functools.reduce(operator.or_, (leaf for _, leaf in leaves[place : high + 1]), leaves[place][1]))
        place = place if now is None else min(place, now)
    return tuple(wishes)


def _collect(segment: Segment, above: int, last: list[int], leaves: list[tuple[int, int]]) -> None:
    """The leaves in forward order: where each starts, and all that is to be kept while the backward works in it."""
    if not segment.parts:
        leaves.append((segment.start, above | segment.bits))
        return
    before = 0
    for part in segment.parts:
        _collect(part, above | before, last, leaves)
        crossing = sum(1 << k for k in range(part.start, part.stop) if last[k] >= part.stop)
        before |= crossing | part.kept


def read_until(compiled: Compiled) -> list[int]:
    """For each storage the last storage that is made from it."""
    last = list(range(len(compiled.sizes)))
    for again in compiled.recomputes.values():
        if again.outputs:
            made = again.outputs.bit_length() - 1
            for k in members(again.inputs):
                last[k] = max(last[k], made)
    return last


def crossing_bytes(compiled: Compiled) -> list[int]:
    """For each place between storages, the bytes made before it that something made behind it is made from."""
    change = [0] * (len(compiled.sizes) + 2)
    for k, last in enumerate(read_until(compiled)):
        if last > k:
            change[k + 1] += compiled.sizes[k]
            change[last + 1] -= compiled.sizes[k]
    return list(itertools.accumulate(change))[: len(compiled.sizes) + 1]


def narrow_cuts(compiled: Compiled, most: int = 1 << 30) -> list[int]:
    """Places where no more bytes cross than at their neighbours; the ends are none. Of more than `most` - 1 those remain
    between which most bytes are made."""
    crossing = [math.inf, *crossing_bytes(compiled)[1:-1], math.inf]
    cuts = [k for k in range(1, len(compiled.sizes)) if crossing[k] <= min(crossing[k - 1], crossing[k + 1])]
    before = [0, *itertools.accumulate(compiled.sizes)]
    while len(cuts) >= most:
        edges = [0, *cuts, len(compiled.sizes)]
        smallest = min(range(1, len(edges) - 1), key=lambda i: before[edges[i + 1]] - before[edges[i - 1]])
        cuts.remove(edges[smallest])
    return cuts
