"""Orders in which the operators of a step can run, and what the plain step's peak is in each. No torch.

The program order is that of the trace; any other that keeps data before its readers, the forward before the backward, and
what was said to wait behind what it waits for, computes the same. `candidates` are

- the trace's own;
- *largest decrease first*: of the operators that can run, the one that frees most bytes beyond those that it makes (list
  scheduling as for registers, Sethi and Ullman 1970; Steiner et al. 2023, OLLA, solve the same question as a program);
- *early gradients*: what makes nothing but results of the step, gradients of parameters above all, runs as soon as it can, so
  that the activation that it reads dies there; everything else as in the trace;
- *late gradients*: the same, but results that are larger than all that only waits for them (what is read for them and dies in
  the backward) are made at the end of the step, as the gradients of weights that outweigh their layers' activations;
- on small graphs the order of the least plain peak, by a complete search.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import Any

from .errors import ProblemError
from .problem import Problem
from .schedule import inplace_pair, plain_schedule, simulate
from .solvers.stages import members

MOST_STATES = 1_000  # of the complete search, in each of forward and backward

Order = tuple[int, ...]
Waits = Iterable[tuple[int, int]]


def reordered(problem: Problem, order: Sequence[int]) -> Problem:
    """The same step with its program operators in another order: operator `order[i]` is the new problem's i-th.

    Raises ProblemError where that is no order of all of them, takes operators across the end of the forward, or puts a reader
    before what it reads.
    """
    if sorted(order) != list(range(problem.num_program)) or sorted(order[: problem.num_forward]) != list(problem.forward):
        raise ProblemError(
            f"an order of this step names each of its {problem.num_program} operators once, the {problem.num_forward} of the "
            f"forward first; {list(order)!r} does not"
        )
    place = {p: i for i, p in enumerate(order)}
    beside = (
        o if o.replaces is None else replace(o, replaces=place[o.replaces]) for o in problem.operators[problem.num_program :]
    )
    return replace(problem, operators=(*(problem.operators[p] for p in order), *beside))


def peak_of(problem: Problem, order: Sequence[int]) -> int:
    """Bytes at the peak of the plain step in that order, by the simulator."""
    other = reordered(problem, order)
    return simulate(other, plain_schedule(other)).peak_bytes


def trace_order(problem: Problem) -> Order:
    return tuple(range(problem.num_program))


def largest_decrease_first(problem: Problem, waits: Waits = ()) -> Order:
    """Of all that can run, what frees most; among equals the trace's first."""
    return _by_key(problem, waits, lambda phase, p, done: phase.change_bytes(p, done))


def early_gradients(problem: Problem, waits: Waits = ()) -> Order:
    """Results of the step as soon as they can be made, everything else as in the trace."""
    early = _makers_of_results(problem)
    return _by_key(problem, waits, lambda phase, p, done: p not in early)


def late_gradients(problem: Problem, waits: Waits = ()) -> Order:
    """Results of the step as soon as they can be made, but for those larger than what has to wait with them: these at the end,
    what frees most first. Everything else as in the trace."""
    results, waits = _makers_of_results(problem), tuple(waits)
    backward = _Phase(problem, problem.backward, waits)

    def grows(p: int) -> bool:
        operator = problem.operators[p]
        held_bytes = sum(backward.sizes[s] for s in operator.inputs if s in backward.mortal)
        return sum(backward.sizes[s] for s in operator.outputs) > held_bytes

    late = {p for p in results if grows(p)}

    def key(phase: _Phase, p: int, done: int) -> tuple[int, int]:
        return (2, phase.change_bytes(p, done)) if p in late else (p not in results, 0)

    return _by_key(problem, waits, key)


def _makers_of_results(problem: Problem) -> set[int]:
    """The backward's operators that make nothing but results of the step."""
    made = ((p, problem.operators[p].outputs) for p in problem.backward)
    return {p for p, outputs in made if outputs and problem.outputs.issuperset(outputs)}


def least_peak_order(problem: Problem, waits: Waits = (), most_states: int = MOST_STATES) -> Order | None:
    """The order with the least peak of the plain step, or None where it is not found within so many states of a phase."""
    waits, order = tuple(waits), ()
    for operators in (problem.forward, problem.backward):
        found = _search(_Phase(problem, operators, waits), most_states)
        if found is None:
            return None
        order += found
    return order


def candidates(problem: Problem, waits: Waits = ()) -> dict[str, Order]:
    """Different orders by name, the trace's first. waits: pairs (operator, operator that has to run behind it)."""
    waits = tuple(waits)
    found = {
        "trace": trace_order(problem),
        "largest decrease first": largest_decrease_first(problem, waits),
        "early gradients": early_gradients(problem, waits),
        "late gradients": late_gradients(problem, waits),
        "complete search": least_peak_order(problem, waits),
    }
    kept: dict[str, Order] = {}
    for name, order in found.items():
        if order is not None and order not in kept.values():
            kept[name] = order
    return kept


def _by_key(problem: Problem, waits: Waits, key: Callable[[_Phase, int, int], Any]) -> Order:
    """List scheduling: of the operators that can run, the one with the least key, then the trace's first.

    A key may depend on what is done only by what dies in the operator.
    """
    waits, order = tuple(waits), []
    for operators in (problem.forward, problem.backward):
        phase, done = _Phase(problem, operators, waits), 0
        ready = phase.ready
        queue = [(key(phase, p, 0), p) for p in members(ready)]
        heapq.heapify(queue)
        while queue:
            known, p = heapq.heappop(queue)
            if not ready >> p & 1 or known != key(phase, p, done):
                continue  # there is a newer entry
            before, done = ready, done | 1 << p
            ready = phase.ready_after(ready, p, done)
            order.append(p)
            changed = ready & (~before | phase.last_readers(p, done))
            for q in members(changed):
                heapq.heappush(queue, (key(phase, q, done), q))
    return tuple(order)


class _Phase:
    """What running forward or backward operators, given those of the phase that are done (as bits), does to memory."""

    def __init__(self, problem: Problem, operators: range, waits: Waits):
        self.problem, self.operators = problem, operators
        self.sizes = [s.size_bytes for s in problem.storages]
        inside, later = set(operators), range(operators.stop, problem.num_program)
        makers = {s: p for p in operators for s in problem.operators[p].outputs}
        self.readers = dict.fromkeys(range(len(self.sizes)), 0)
        self.needs = dict.fromkeys(operators, 0)
        for p in operators:
            for s in problem.operators[p].inputs:
                self.readers[s] |= 1 << p
                self.needs[p] |= 1 << makers[s] if s in makers else 0
        for before, after in waits:
            if before in inside and after in inside:
                self.needs[after] |= 1 << before
        if operators and operators == problem.forward:  # the operator that ends it
            self.needs[operators[-1]] |= sum(1 << p for p in operators[:-1])
        self.behind: dict[int, list[int]] = {p: [] for p in operators}
        for p, needed in self.needs.items():
            for q in members(needed):
                self.behind[q].append(p)
        self.ready = sum(1 << p for p in operators if not self.needs[p])
        self.everything = sum(1 << p for p in operators)
        staying = {s for p in later for s in problem.operators[p].inputs} | problem.outputs
        staying |= {s for s, made_by in enumerate(problem.producers) if not made_by}
        self.mortal = set(range(len(self.sizes))) - staying
        self.eager = all(
            len({min(self.sizes[i], self.sizes[o]) for i, o in problem.operators[p].inplace}) < 2 for p in operators
        )

    def dying(self, p: int, done: int) -> list[int]:
        """Storages that die when `p` runs after `done`."""
        operator, others = self.problem.operators[p], ~(done | 1 << p)
        touched = dict.fromkeys((*operator.inputs, *operator.outputs))
        return [s for s in touched if s in self.mortal and not self.readers[s] & others]

    def change_bytes(self, p: int, done: int) -> int:
        """Bytes alive after `p` beyond those before it."""
        made = sum(self.sizes[s] for s in self.problem.operators[p].outputs)
        return made - sum(self.sizes[s] for s in self.dying(p, done))

    def extra_bytes(self, p: int, done: int) -> int:
        """Bytes alive while `p` runs beyond those before it."""
        operator = self.problem.operators[p]
        pair = inplace_pair(operator, self.dying(p, done))
        saved = min(self.sizes[pair[0]], self.sizes[pair[1]]) if pair else 0
        return sum(self.sizes[s] for s in operator.outputs) - saved + operator.workspace_bytes

    def ready_after(self, ready: int, p: int, done: int) -> int:
        """What can run when `p`, the last of `done`, has run."""
        return (ready & ~(1 << p)) | sum(1 << q for q in self.behind[p] if not self.needs[q] & ~done)

    def last_readers(self, p: int, done: int) -> int:
        """The operators that alone are left to read something that `p` has read."""
        found = 0
        for s in self.problem.operators[p].inputs:
            left = self.readers[s] & ~done
            found |= left if left and not left & (left - 1) else 0
        return found


def _search(phase: _Phase, most_states: int) -> Order | None:
    """Best first over sets of operators that have run: the one reached with the least peak is looked at first, so the first
    that is complete is the least.

    Where an operator can run within that peak and leaves no more alive than before, nothing else is looked at: run now, what
    comes before it in any other order has no more alive beside it, for what an operator frees only grows with what is done.
    """
    queue = [(0, 0, 0, phase.ready, 0, ())]
    seen: set[int] = set()
    while queue:
        peak_bytes, left, done, ready, live_bytes, path = heapq.heappop(queue)
        if done in seen:
            continue
        seen.add(done)
        if done == phase.everything:
            return _unrolled(path)
        if len(seen) > most_states:
            return None
        moves = [
            (max(peak_bytes, live_bytes + phase.extra_bytes(p, done)), phase.change_bytes(p, done), p) for p in members(ready)
        ]
        free = [move for move in moves if phase.eager and move[0] <= peak_bytes and move[1] <= 0]
        for peak, change, p in free[:1] or moves:
            after = done | 1 << p
            heapq.heappush(queue, (peak, left - 1, after, phase.ready_after(ready, p, after), live_bytes + change, (path, p)))
    return ()


def _unrolled(path: tuple) -> Order:
    order = []
    while path:
        path, p = path
        order.append(p)
    return tuple(reversed(order))
