"""The complete search for a placement within a capacity, after MiniMalloc (Moffitt, ASPLOS 2023), branching by valleys.

Intervals are laid down from offset zero up, each where it touches what is beneath it (a *canonical* solution: if there is any
solution, pushing everything down gives one). The state is the *floor* of each section, the lowest offset at which anything
can still lie there, and the intervals left. From these follow, again and again until nothing moves:

- the *head* of each interval left, the lowest offset that it can have: the highest floor in its life, aligned;
- the floor of each section: the lowest head of what is left in it.

A state is given up where a section cannot hold what is left in it: for each head h, h and the sizes of all whose heads are no
lower must fit (the bound of one-machine scheduling with release times), and where it is *dominated*: where the same intervals
were left over floors as low or lower, and that has failed before. What is left is *decomposed* wherever no interval crosses; a
part that fails sends the search back to the choice that made it, past all choices in other parts.

Where MiniMalloc tries every interval next, in order of offsets, here one section at the bottom of a *valley* (floors are
higher on both sides) is chosen, the one with fewest options: an interval of the valley lies on the floor there, each in turn,
or nothing does, and the floor rises to the next offset at which something can. These cases exclude each other, so nothing is
searched twice, and sections without slack leave little choice.

Complete: without a limit it ends with a placement or with the proof that there is none. A node takes O(intervals x sections)
at most, in numpy; what a choice cannot have changed is not looked at again.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from .intervals import Sections

NODES_BETWEEN_LOOKS = 16  # at the clock
MOST_REMEMBERED_BYTES = 1 << 28  # of states that failed; past that the search goes on without learning


@dataclass(frozen=True)
class Preference:
    """What is tried first, which decides how long the search takes, not what it finds in the end.

    rank: of each interval, which of several goes first where they could lie at one place.
    pull: choices stay near each other: an option weighs by that part more with each section away from the choice before.
        Unrelated choices between a wrong one and its failure make the search go through all their combinations.
    """

    rank: np.ndarray
    pull: float = 0.0


@dataclass(frozen=True)
class Outcome:
    """What a search found. offsets: of the sections' intervals, or None; proven: there is none, where offsets is None."""

    offsets: np.ndarray | None
    proven: bool
    nodes: int


@dataclass(frozen=True)
class _Part:
    """A state: intervals left (by first section), connected in time, over the sections from `begin` on.

    floors, loads: of each section; loads are the sizes left. heads: of each interval. Floors and heads have not settled yet
    after the change to the sections changed[0] to changed[1] - 1. parent: the place on the stack of the choice that made
    it; near: the section of that choice.
    """

    left: np.ndarray
    begin: int
    floors: np.ndarray
    loads: np.ndarray
    heads: np.ndarray
    changed: tuple[int, int]
    parent: int
    near: int


class Search:
    """All searches for one capacity, a multiple of `sections.unit`: what failed in one is known to the next."""

    def __init__(self, sections: Sections, capacity: int):
        unit = sections.unit
        sizes, alignments = sections.sizes // unit, np.maximum(1, sections.alignments // unit)
        most = int(sections.loads.max() + sizes.max() + alignments.sum()) + capacity // unit
        dtype = np.int32 if most < np.iinfo(np.int32).max // 4 else np.int64
        self.sections, self.capacity = sections, capacity // unit
        self.never = np.iinfo(dtype).max // 2
        self.sizes, self.alignments = sizes.astype(dtype), alignments.astype(dtype)
        self.aligned = bool((alignments > 1).any())
        self.loads = (sections.loads // unit).astype(dtype)
        self.failed: dict[bytes, list[np.ndarray]] = {}
        self.remembered_bytes = 0

    def run(self, preference: Preference, node_limit: float, deadline: float) -> Outcome:
        """Look for a placement. node_limit: states to look at; deadline: of time.monotonic()."""
        offsets = np.zeros(len(self.sizes), np.int64)
        agenda = None
        for part in self._cut(self._root()):
            agenda = part, agenda
        stack, nodes = [], 0
        while agenda is not None:
            part, rest = agenda
            nodes += 1
            if nodes > node_limit or (nodes % NODES_BETWEEN_LOOKS == 0 and time.monotonic() > deadline):
                return Outcome(None, False, nodes)
            stack.append((self._children(part, preference, offsets, len(stack)), rest, part.parent))
            while stack:
                children, rest, parent = stack[-1]
                found = next(children, None)
                if found is not None:
                    break
                del stack[parent + 1 :]
            else:
                return Outcome(None, True, nodes)
            agenda = rest
            for part in found:
                agenda = part, agenda
        return Outcome(offsets * self.sections.unit, False, nodes)

    def _root(self) -> _Part:
        count, zeros = len(self.sizes), np.zeros_like(self.loads)
        return _Part(np.arange(count), 0, zeros, self.loads, np.zeros_like(self.sizes), (0, self.sections.count), -1, 0)

    def _children(self, part: _Part, preference: Preference, offsets: np.ndarray, place: int) -> Iterator[list[_Part]]:
        """The cases of a state: for each, the parts that are left, all of which must be solved."""
        left, columns = part.left, slice(part.begin, part.begin + len(part.floors))
        covers = self.sections.covers[left, columns]
        part, window = self._settle(part, covers)
        key = self._key(left)
        if not self._holds(part, covers, window) or any((k <= part.floors).all() for k in self.failed.get(key, ())):
            return
        slack = self.capacity - part.floors - part.loads
        away = np.abs(np.arange(len(slack)) + part.begin - part.near)
        column, lying = _choose(covers, part.floors, part.heads, slack / (self.capacity + 1), 1 + preference.pull * away)
        floor, tried = part.floors[column], set()
        part = replace(part, parent=place, near=part.begin + column)
        for i in sorted(lying, key=lambda i: preference.rank[left[i]]):
            same = tuple(array[left[i]] for array in (self.sizes, self.alignments, self.sections.first, self.sections.last))
            if same not in tried:
                tried.add(same)
                offsets[left[i]] = floor
                yield self._cut(self._without(part, i))
        if slack[column]:
            raised = self._next_floor(part, column, lying)
            if raised - floor <= slack[column]:
                above = part.floors.copy()
                above[column] = raised
                yield [replace(part, floors=above, changed=(part.near, part.near + 1))]
        self._remember(key, part.floors)

    def _settle(self, part: _Part, covers: np.ndarray) -> tuple[_Part, tuple[np.ndarray, int, int]]:
        """Floors and heads that follow from each other; and what may have changed: which intervals, and from which column to
        which."""
        first, last = self.sections.first[part.left] - part.begin, self.sections.last[part.left] - part.begin
        bounds = np.stack((first, last + 1), axis=1).ravel()
        low, high = part.changed[0] - part.begin, part.changed[1] - part.begin
        floors, heads = part.floors, part.heads
        while low < high:
            before = heads
            heads = np.maximum.reduceat(np.append(floors, floors.dtype.type(0)), bounds)[::2]
            if self.aligned:
                heads = -(-heads // self.alignments[part.left]) * self.alignments[part.left]
            moved = np.flatnonzero(heads != before)
            low, high = int(first[moved].min(initial=low)), int(last[moved].max(initial=high - 1)) + 1
            rows = np.flatnonzero((first < high) & (last >= low))
            settled = np.where(covers[rows, low:high], heads[rows, None], self.never).min(axis=0)
            if (settled == floors[low:high]).all():
                return replace(part, floors=floors, heads=heads), (rows, low, high)
            floors = np.concatenate((floors[:low], settled, floors[high:]))
        return part, (np.arange(0), 0, 0)

    def _holds(self, part: _Part, covers: np.ndarray, window: tuple[np.ndarray, int, int]) -> bool:
        """Whether each section can hold what is left in it, by the bound; where nothing changed it could before."""
        rows, low, high = window
        heads, sizes = part.heads[rows], self.sizes[part.left[rows]]
        if not len(rows):
            return True
        if (heads + sizes).max() > self.capacity or (part.floors + part.loads)[low:high].max() > self.capacity:
            return False
        order = np.argsort(-heads, kind="stable")
        sums = np.cumsum(covers[rows[order], low:high] * sizes[order, None], axis=0, dtype=sizes.dtype)
        sums += heads[order, None]
        return bool(sums.max() <= self.capacity)

    def _next_floor(self, part: _Part, column: int, lying: np.ndarray) -> int:
        """The lowest offset in the section if nothing lies on its floor: that of what cannot lie there anyway, or upon an
        interval that is not in this section, and that overlaps one that could lie there."""
        first, last = self.sections.first[part.left], self.sections.last[part.left]
        here = (first <= part.begin + column) & (last >= part.begin + column)
        higher = part.heads[here & (part.heads > part.floors[column])]
        under = ((first[lying, None] <= last) & (last[lying, None] >= first)).any(axis=0) & ~here
        tops = (part.heads + self.sizes[part.left])[under]
        return min(int(higher.min(initial=self.never)), int(tops.min(initial=self.never)))

    def _without(self, part: _Part, i: int) -> _Part:
        """The interval `left[i]` laid on the floor, which all of its sections share."""
        k = part.left[i]
        low, high = int(self.sections.first[k]), int(self.sections.last[k]) + 1
        span = slice(low - part.begin, high - part.begin)
        floors, loads = part.floors.copy(), part.loads.copy()
        floors[span] = part.heads[i] + self.sizes[k]
        loads[span] -= self.sizes[k]
        left, heads = np.delete(part.left, i), np.delete(part.heads, i)
        return replace(part, left=left, heads=heads, floors=floors, loads=loads, changed=(low, high))

    def _key(self, left: np.ndarray) -> bytes:
        bits = np.zeros(len(self.sizes), bool)
        bits[left] = True
        return np.packbits(bits).tobytes()

    def _remember(self, key: bytes, floors: np.ndarray) -> None:
        if self.remembered_bytes < MOST_REMEMBERED_BYTES:
            self.failed.setdefault(key, []).append(floors)
            self.remembered_bytes += floors.nbytes + len(key)

    def _cut(self, part: _Part) -> list[_Part]:
        """The parts between which no interval crosses; the largest first, as the last one is taken first."""
        if not len(part.left):
            return []
        first, last = self.sections.first[part.left], self.sections.last[part.left]
        reach = np.maximum.accumulate(last)
        cuts = [0, *(np.flatnonzero(first[1:] > reach[:-1]) + 1), len(first)]
        parts = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            low, high = int(first[a]), int(reach[b - 1]) + 1
            span, changed = slice(low - part.begin, high - part.begin), (max(low, part.changed[0]), min(high, part.changed[1]))
            left, heads, floors, loads = part.left[a:b], part.heads[a:b], part.floors[span], part.loads[span]
            parts.append(_Part(left, low, floors, loads, heads, changed, part.parent, part.near))
        return sorted(parts, key=lambda part: -len(part.left))


def _choose(
    covers: np.ndarray, floors: np.ndarray, heads: np.ndarray, slack: np.ndarray, weights: np.ndarray
) -> tuple[int, np.ndarray]:
    """The section in a valley with fewest options, each of the section's weight, and then least slack (a part of the
    capacity); and the intervals that can lie on its floor."""
    edges = np.flatnonzero(np.diff(floors)) + 1
    starts, ends = np.append(0, edges), np.append(edges, len(floors))
    lower_than_left = np.append(True, floors[edges] < floors[edges - 1])
    lower_than_right = np.append(floors[edges - 1] < floors[edges], True)
    valley = np.repeat(lower_than_left & lower_than_right, ends - starts)
    valleys = np.flatnonzero(valley)
    lying = covers[:, valleys] & (heads[:, None] == floors[valleys])
    options = lying.sum(axis=0) + (slack[valleys] > 0)
    best = int(np.argmin(options * weights[valleys] + slack[valleys]))
    return int(valleys[best]), np.flatnonzero(lying[:, best])
