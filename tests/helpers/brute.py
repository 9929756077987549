"""Exhaustive search over schedules of a small problem: what the solvers are held against."""

from __future__ import annotations

import functools
import heapq
import math
from collections.abc import Iterator

from fxmem.problem import Problem
from fxmem.schedule import plain_schedule, simulate


def slots(problem: Problem) -> dict[int, int]:
    """The place of each forward operator and variant in the order in which one stage recomputes: program order, a variant
    right after the last of the operators that make its outputs, and the inputs that are not made later than these."""
    first = {s: makers[0] for s, makers in enumerate(problem.producers) if makers and makers[0] < problem.num_program}
    key = {p: (p, 0) for p in problem.forward}
    for p in (*problem.variants, *problem.encoders):
        operator = problem.operators[p]
        made = [first[s] for s in operator.outputs if s in first]
        read = [first[s] for s in operator.inputs if s in first]
        key[p] = (max([*made, *(place for place in read if not made or place <= min(made))], default=0), p)
    return {p: place for place, p in enumerate(sorted(key, key=key.__getitem__))}


def frontier(problem: Problem, *, ordered: bool) -> dict[int, float]:
    """`least_time_s` at every budget from just below the plain peak down to the first that nothing fits. It is a step function,
    so between two budgets of equal time nothing is searched."""

    @functools.cache
    def least(budget_bytes: int) -> float:
        return least_time_s(problem, budget_bytes, ordered=ordered)

    def fill(low: int, high: int) -> None:
        if least(low) == least(high):
            found.update((b, least(low)) for b in range(low, high + 1))
        else:
            middle = (low + high) // 2
            fill(low, middle)
            fill(middle + 1, high)

    found: dict[int, float] = {}
    fill(0, simulate(problem, plain_schedule(problem)).peak_bytes - 1)
    lowest = max(b for b, seconds in found.items() if math.isinf(seconds))
    return {b: found[b] for b in sorted(found, reverse=True) if b >= lowest}


def least_time_s(problem: Problem, budget_bytes: int, *, ordered: bool) -> float:
    """The least seconds recomputed by any schedule whose peak is at most budget_bytes; infinity where there is none.

    Dijkstra over (operators done, storages alive, as bits). ordered: only schedules that, before each backward operator,
    recompute in the order of `slots`, each operator once at most; otherwise any schedule at all.
    """
    runs = [_Run(problem, index) for index in range(len(problem.operators))]
    place = slots(problem)
    again = [(place[p], p, problem.operators[p].time_s) for p in place if problem.operators[p].recomputable]
    encoders = [(p, extra_s) for _, p, extra_s in again if p in problem.encoders]
    behind = {p: _encoded(problem, p) for p in problem.encoders}
    outputs = sum(1 << s for s in problem.outputs)
    start = (0, 0, 0)
    best, queue = {start: 0.0}, [(0.0, start)]
    while queue:
        cost, state = heapq.heappop(queue)
        if cost > best[state]:
            continue
        done, slot, alive = state
        if done == problem.num_program:
            if not alive & ~outputs:  # what dies, dies at a use: nothing is kept for show
                return cost
            continue
        actions = [(p, done + 1, 0, problem.slower_s(p)) for p in (done, *problem.useful_alternatives.get(done, ()))]
        if 0 < done <= problem.num_forward and slot == 0:  # still in the forward
            actions += [(p, done, 0, extra_s) for p, extra_s in encoders if not ordered or behind[p] == done - 1]
        if done >= problem.num_forward:
            actions += [(p, done, at + 1 if ordered else 0, extra_s) for at, p, extra_s in again if not ordered or at >= slot]
        for index, now_done, now_slot, extra_s in actions:
            for after in runs[index].after(alive, budget_bytes):
                following = (now_done, now_slot, after)
                if cost + extra_s < best.get(following, math.inf):
                    best[following] = cost + extra_s
                    heapq.heappush(queue, (cost + extra_s, following))
    return math.inf


def _encoded(problem: Problem, encoder: int) -> int:
    """The forward operator that makes what an encoder reads."""
    makers = (problem.producers[s][0] for s in problem.operators[encoder].inputs if problem.producers[s])
    return max(makers, default=0)


class _Run:
    """What can be alive after running one operator, over all choices of what dies in it."""

    def __init__(self, problem: Problem, index: int):
        operator = problem.operators[index]
        size = [s.size_bytes for s in problem.storages]
        fixed = {s for s, makers in enumerate(problem.producers) if not makers}
        self.size, self.fixed_bytes = size, problem.fixed_bytes + operator.workspace_bytes
        self.inplace = [(1 << i, 1 << o, min(size[i], size[o])) for i, o in operator.inplace]
        self.inputs = sum(1 << s for s in operator.inputs if s not in fixed)
        self.outputs = sum(1 << s for s in operator.outputs)
        self.outlive = sum(1 << s for s in problem.outputs)
        mortal = sum(1 << s for s in {*operator.inputs, *operator.outputs} if s not in fixed and s not in problem.outputs)
        self.deaths = list(_subsets(mortal))

    def after(self, alive: int, budget_bytes: int) -> Iterator[int]:
        again = self.outputs & alive
        if self.inputs & ~alive or again & ~self.outlive:
            return
        during = alive | self.outputs
        bytes_ = self.fixed_bytes + self._bytes(during) + self._bytes(again)
        for dying in self.deaths:
            saved = next((saved for i, o, saved in self.inplace if i & dying and not o & again), 0)
            if bytes_ - saved <= budget_bytes:
                yield during & ~dying

    def _bytes(self, bits: int) -> int:
        total = 0
        while bits:
            total += self.size[(bits & -bits).bit_length() - 1]
            bits &= bits - 1
        return total


def _subsets(bits: int) -> Iterator[int]:
    chosen = bits
    while chosen:
        yield chosen
        chosen = (chosen - 1) & bits
    yield 0
