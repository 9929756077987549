"""Optimal checkpointing of a chain (Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova 2019: "rotor"), on the chain of pieces
that lie between the narrow cuts of a graph.

A piece is kept whole, or run again from the bytes that cross its beginning. With C(s, t, c) the least seconds run again in
the backward of pieces s to t, of which the first input is there, beside c bytes that are kept for others:

    C(s, s, c) = 0 where what s keeps fits beside c
    C(s, t, c) = min( C(s + 1, t, c + kept(s)),                                                            s is kept whole
                      min over s < u <= t: time(s .. u - 1) + C(u, t, c + crossing(u)) + C(s, u - 1, c) )   u's input is kept

What runs inside of a piece and the forward's own bytes are not in the recursion; the exact replay judges, and the recursion
is asked again for less.
"""

from __future__ import annotations

import itertools
from dataclasses import dataclass

import numpy as np

from .base import Answer, Task, cheapest, register_solver
from .segments import Segment, crossing_bytes, narrow_cuts, wishes_of
from .stages import Compiled, compile_problem

SLOTS = 300  # bytes are counted in so many parts of the budget
MOST_PIECES = 60
BUDGETS = (1.0, 0.97, 0.94, 0.9, 0.85, 0.8, 0.7, 0.6)  # of the room, asked for in turn


@register_solver("rotor")
def rotor(task: Task) -> Answer:
    """The recursion at shrinking budgets; the cheapest of its schedules that fit."""
    compiled = compile_problem(task.problem)
    chain = _chain(compiled, narrow_cuts(compiled, MOST_PIECES))
    found = []
    for part in BUDGETS:
        if task.out_of_time and found:
            break
        root = _Recursion(chain, task.budget_bytes, part).tree()
        if root is None:  # nor is there one for less
            break
        found.append(wishes_of(compiled, root))
        if cheapest(task, compiled, found[-1:]).schedule is not None:
            break
    return cheapest(task, compiled, found)


@dataclass(frozen=True)
class _Chain:
    """Pieces [edges[i], edges[i + 1]) of the storages: seconds to run each again, bytes that cross its beginning, bytes that
    its backward reads of it, and bytes that lie there during its backward whatever is kept."""

    edges: tuple[int, ...]
    seconds: tuple[float, ...]
    crossing: tuple[int, ...]
    kept: tuple[int, ...]
    during: tuple[int, ...]


def _chain(compiled: Compiled, cuts: list[int]) -> _Chain:
    edges = (0, *cuts, len(compiled.sizes))
    crossing = crossing_bytes(compiled)
    place = [i for i, (a, b) in enumerate(itertools.pairwise(edges)) for _ in range(a, b)]
    count = len(edges) - 1
    seconds, kept, during = [0.0] * count, [0] * count, [0] * count
    for index in compiled.problem.forward:
        again = compiled.recomputes.get(index)
        if again and again.outputs:
            seconds[place[again.outputs.bit_length() - 1]] += again.time_s
    read, now = 0, count - 1
    for stage in compiled.stages:
        if stage.needs:
            now = min(now, place[stage.needs.bit_length() - 1])
            read |= stage.needs
        during[now] = max(during[now], stage.options[0].during_bytes, stage.head_bytes, stage.between_bytes)
    for k, size in enumerate(compiled.sizes):
        kept[place[k]] += size if read >> k & 1 else 0
    return _Chain(edges, tuple(seconds), tuple(crossing[e] for e in edges[:-1]), tuple(kept), tuple(during))


class _Recursion:
    """C of all pairs, as an array over the bytes kept for others."""

    def __init__(self, chain: _Chain, budget_bytes: int, part: float):
        self.chain = chain
        free_bytes = budget_bytes - min(chain.during)
        self.slot_bytes = max(1.0, part * free_bytes / SLOTS)
        self.kept = [self._slots(b) for b in chain.kept]
        self.crossing = [self._slots(b) for b in chain.crossing]
        self.room = [int((budget_bytes - b) * part // self.slot_bytes) for b in chain.during]
        self.before = np.concatenate([[0.0], np.cumsum(chain.seconds)])
        self.table: dict[tuple[int, int], np.ndarray] = {}
        self._fill()

    def _slots(self, size_bytes: int) -> int:
        return int(-(-size_bytes // self.slot_bytes))

    def _fill(self) -> None:
        count, carried = len(self.kept), np.arange(SLOTS + 1)
        for s in range(count):
            self.table[s, s] = np.where(carried + self.kept[s] <= self.room[s], 0.0, np.inf)
        for length in range(1, count):
            for s in range(count - length):
                self.table[s, s + length] = np.min([way for _, way in self._ways(s, s + length)], axis=0)

    def _ways(self, s: int, t: int):
        """Every way to begin with s to t: (piece whose input is kept, or s where s is kept whole; seconds)."""
        whole = _beside(self.table[s + 1, t], self.kept[s])
        yield s, np.where(np.isfinite(self.table[s, s]), whole, np.inf)
        for u in range(s + 1, t + 1):
            again = self.before[u] - self.before[s]
            yield u, again + _beside(self.table[u, t], self.crossing[u]) + self.table[s, u - 1]

    def tree(self) -> Segment | None:
        """The segments that C(first, last, 0) stands for."""
        last = len(self.kept) - 1
        return self._segment(0, last, 0) if np.isfinite(self.table[0, last][0]) else None

    def _segment(self, s: int, t: int, carried: int) -> Segment:
        edges = self.chain.edges
        if s == t:
            return Segment(edges[s], edges[s + 1])
        u, _ = min(((u, way[carried]) for u, way in self._ways(s, t)), key=lambda choice: choice[1])
        if u == s:
            piece = Segment(edges[s], edges[s + 1])
            parts = Segment(piece.start, piece.stop, kept=piece.bits), self._segment(s + 1, t, carried + self.kept[s])
        else:
            parts = self._segment(s, u - 1, carried), self._segment(u, t, carried + self.crossing[u])
        return Segment(edges[s], edges[t + 1], parts)


def _beside(costs: np.ndarray, slots: int) -> np.ndarray:
    """The costs with so many more slots taken."""
    moved = np.full_like(costs, np.inf)
    if slots < len(costs):
        moved[: len(costs) - slots] = costs[slots:]
    return moved
