"""Exhaustive search over schedules of a small problem: what the solvers are held against."""

from __future__ import annotations

import heapq
import itertools
import math

from fxmem.problem import Problem


def slots(problem: Problem) -> dict[int, int]:
    """The place of each forward operator and variant in the order in which one stage recomputes: program order, a variant
    right after the last of the operators that make its inputs and outputs."""
    first = {s: makers[0] for s, makers in enumerate(problem.producers) if makers}
    key = {p: (p, 0) for p in problem.forward}
    for p in problem.variants:
        operator = problem.operators[p]
        key[p] = (max(first[s] for s in (*operator.inputs, *operator.outputs) if s in first), p)
    return {p: place for place, p in enumerate(sorted(key, key=key.__getitem__))}


def least_time_s(problem: Problem, budget_bytes: int, *, ordered: bool) -> float:
    """The least seconds recomputed by any schedule whose peak is at most budget_bytes; infinity where there is none.

    Dijkstra over (operators done, storages alive). ordered: only schedules that, before each backward operator, recompute in
    the order of `slots`, each operator once at most; otherwise any schedule at all.
    """
    size = [s.size_bytes for s in problem.storages]
    fixed = {s for s, makers in enumerate(problem.producers) if not makers}
    place = slots(problem)
    again = [p for p in place if problem.operators[p].recomputable]
    start = (0, 0, frozenset())
    best, queue, count = {start: 0.0}, [(0.0, 0, start)], itertools.count(1)
    while queue:
        cost, _, state = heapq.heappop(queue)
        if cost > best[state]:
            continue
        done, slot, alive = state
        if done == problem.num_program:
            if alive <= problem.outputs:  # what dies, dies at a use: nothing is kept for show
                return cost
            continue
        actions = [(done, done + 1, 0, 0.0)]
        if done >= problem.num_forward:
            actions += [
                (p, done, place[p] + 1 if ordered else 0, problem.operators[p].again_s)
                for p in again
                if not ordered or place[p] >= slot
            ]
        for index, now_done, now_slot, extra_s in actions:
            for after in _runs(problem, index, alive, fixed, size, budget_bytes):
                following = (now_done, now_slot, after)
                if cost + extra_s < best.get(following, math.inf):
                    best[following] = cost + extra_s
                    heapq.heappush(queue, (cost + extra_s, next(count), following))
    return math.inf


def _runs(problem, index, alive, fixed, size, budget_bytes):
    """What can be alive after running an operator within the budget, over all choices of what dies in it."""
    operator = problem.operators[index]
    again = [s for s in operator.outputs if s in alive]
    if any(s not in alive and s not in fixed for s in operator.inputs) or any(s not in problem.outputs for s in again):
        return
    during = alive | set(operator.outputs)
    bytes_ = problem.fixed_bytes + sum(size[s] for s in during) + sum(size[s] for s in again) + operator.workspace_bytes
    mortal = [s for s in dict.fromkeys((*operator.inputs, *operator.outputs)) if s not in fixed and s not in problem.outputs]
    for count in range(len(mortal) + 1):
        for dying in itertools.combinations(mortal, count):
            pair = next((p for p in operator.inplace if p[0] in dying and p[1] not in again), None)
            saved = min(size[pair[0]], size[pair[1]]) if pair else 0
            if bytes_ - saved <= budget_bytes:
                yield frozenset(during - set(dying))
