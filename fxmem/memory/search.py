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
in numpy, in 64 bits or, where the capacity allows, 32.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass

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
    """Intervals left (by first section), connected in time, over sections [begin, begin + len(floors)); parent: the place on
    the stack of the choice that made it; near: the section of that choice."""

    left: np.ndarray
    begin: int
    floors: np.ndarray
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
        self.weights = (sections.covers * self.sizes[:, None]).astype(dtype)
        self.failed: dict[bytes, list[np.ndarray]] = {}
        self.remembered_bytes = 0

    def run(self, preference: Preference, node_limit: float, deadline: float) -> Outcome:
        """Look for a placement. node_limit: states to look at; deadline: of time.monotonic()."""
        offsets = np.zeros(len(self.sizes), np.int64)
        floors = np.zeros(self.sections.count, self.sizes.dtype)
        agenda = None
        for part in self._parts(np.arange(len(self.sizes)), 0, floors, -1, 0):
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

    def _children(self, part: _Part, preference: Preference, offsets: np.ndarray, place: int) -> Iterator[list[_Part]]:
        """The cases of a state: for each, the parts that are left, all of which must be solved."""
        left, columns = part.left, slice(part.begin, part.begin + len(part.floors))
        weights = self.weights[left, columns]
        covers = weights > 0
        floors, heads = self._settle(part, covers)
        slack = self._slack(left, weights, floors, heads)
        key = self._key(left)
        if slack is None or any((known <= floors).all() for known in self.failed.get(key, ())):
            return
        away = np.abs(np.arange(len(floors)) + part.begin - part.near)
        column, lying = _choose(covers, floors, heads, slack / (self.capacity + 1), 1 + preference.pull * away)
        floor, near, tried = floors[column], part.begin + column, set()
        for i in sorted(lying, key=lambda i: preference.rank[left[i]]):
            same = (self.sizes[left[i]], self.alignments[left[i]], covers[i].tobytes())
            if same in tried:
                continue
            tried.add(same)
            offsets[left[i]] = floor
            above = np.where(covers[i], floor + self.sizes[left[i]], floors)
            yield self._parts(np.delete(left, i), part.begin, above, place, near)
        if slack[column]:
            raised = self._next_floor(left, covers, heads, column, lying)
            if raised - floor <= slack[column]:
                above = floors.copy()
                above[column] = raised
                yield [_Part(left, part.begin, above, place, near)]
        self._remember(key, floors)

    def _settle(self, part: _Part, covers: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Floors and heads that follow from each other."""
        left, floors = part.left, part.floors
        bounds = np.empty(2 * len(left), np.int64)
        bounds[::2], bounds[1::2] = self.sections.first[left] - part.begin, self.sections.last[left] + 1 - part.begin
        while True:
            heads = np.maximum.reduceat(np.append(floors, floors.dtype.type(0)), bounds)[::2]
            if self.aligned:
                heads = -(-heads // self.alignments[left]) * self.alignments[left]
            settled = np.where(covers, heads[:, None], self.never).min(axis=0)
            if (settled == floors).all():
                return floors, heads
            floors = settled

    def _slack(self, left: np.ndarray, weights: np.ndarray, floors: np.ndarray, heads: np.ndarray) -> np.ndarray | None:
        """What each section has to spare, or None where one cannot hold what is left."""
        order = np.argsort(-heads, kind="stable")
        sums = np.cumsum(weights[order], axis=0, dtype=weights.dtype)
        slack = self.capacity - floors - sums[-1]
        if (heads + self.sizes[left] > self.capacity).any() or (slack < 0).any():
            return None
        sums += heads[order][:, None]
        return None if sums.max() > self.capacity else slack

    def _next_floor(self, left: np.ndarray, covers: np.ndarray, heads: np.ndarray, column: int, lying: np.ndarray) -> int:
        """The lowest offset in the section if nothing lies on its floor: that of what cannot lie there anyway, or upon an
        interval that is not in this section, and that overlaps one that could lie there."""
        higher = heads[covers[:, column] & (heads > heads[lying[0]])]
        beside = covers[lying] @ covers[~covers[:, column]].T
        tops = (heads + self.sizes[left])[~covers[:, column]]
        return min(int(higher.min(initial=self.never)), int(np.where(beside, tops, self.never).min(initial=self.never)))

    def _key(self, left: np.ndarray) -> bytes:
        bits = np.zeros(len(self.sizes), bool)
        bits[left] = True
        return np.packbits(bits).tobytes()

    def _remember(self, key: bytes, floors: np.ndarray) -> None:
        if self.remembered_bytes < MOST_REMEMBERED_BYTES:
            self.failed.setdefault(key, []).append(floors)
            self.remembered_bytes += floors.nbytes + len(key)

    def _parts(self, left: np.ndarray, begin: int, floors: np.ndarray, parent: int, near: int) -> list[_Part]:
        """Cut where no interval crosses; the largest first, as the last one is taken first."""
        if not len(left):
            return []
        first, last = self.sections.first[left], self.sections.last[left]
        reach = np.maximum.accumulate(last)
        cuts = [0, *(np.flatnonzero(first[1:] > reach[:-1]) + 1), len(left)]
        parts = []
        for a, b in zip(cuts, cuts[1:], strict=False):
            span = slice(first[a] - begin, reach[b - 1] + 1 - begin)
            parts.append(_Part(left[a:b], int(first[a]), floors[span], parent, near))
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
    lying = covers & (heads[:, None] == floors)
    options = lying.sum(axis=0) + (slack > 0)
    column = int(np.argmin(np.where(valley, options * weights + slack, np.inf)))
    return column, np.flatnonzero(lying[:, column])
